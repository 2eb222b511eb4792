import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchrec_sid.errors import SidError
from torchrec_sid.options import make_options
from torchrec_sid.parallel.planner_config import (
    COMPUTE_KERNELS,
    PARTITIONERS,
    PROPOSERS,
    SHARDING_TYPES,
    PlannerConfig,
    ReservationConfig,
    TableConstraint,
    TopologyConfig,
)
from torchrec_sid.parallel.planner_file import load_planner_config, save_planner_config
from torchrec_sid.parallel.presets import PRESETS, node_preset

YAML = """
batch_size: 4096
timeout_seconds: 30
proposers: [greedy, uniform]
partitioner: memory_balanced
topology:
  node: a100_80gb
  world_size: 16
  inter_node_gbps: 12
tables:
  history_*: {sharding_types: row_wise, compute_kernels: [fused]}
  item:
    compute_kernels: [fused_uvm_caching]
    cache_load_factor: 0.2
    cache_policy: lfu
    pooling_factors: [20, 1.5]
reservation: {kind: percentage, share: 0.2}
"""
TOML = """
batch_size = 4096
timeout_seconds = 30
proposers = ["greedy", "uniform"]
partitioner = "memory_balanced"
[topology]
node = "a100_80gb"
world_size = 16
inter_node_gbps = 12
[tables."history_*"]
sharding_types = "row_wise"
compute_kernels = ["fused"]
[tables.item]
compute_kernels = ["fused_uvm_caching"]
cache_load_factor = 0.2
cache_policy = "lfu"
pooling_factors = [20, 1.5]
[reservation]
kind = "percentage"
share = 0.2
"""
EXPECTED = PlannerConfig(
    TopologyConfig(node="a100_80gb", world_size=16, inter_node_gbps=12.0),
    batch_size=4096,
    tables={
        "history_*": TableConstraint(sharding_types=("row_wise",), compute_kernels=("fused",)),
        "item": TableConstraint(
            compute_kernels=("fused_uvm_caching",),
            cache_load_factor=0.2,
            cache_policy="lfu",
            pooling_factors=(20.0, 1.5),
        ),
    },
    reservation=ReservationConfig("percentage", 0.2),
    proposers=("greedy", "uniform"),
    partitioner="memory_balanced",
    timeout_seconds=30,
)


@pytest.mark.parametrize(("name", "text"), [("p.yaml", YAML), ("p.yml", YAML), ("p.toml", TOML)])
def test_files_read_as_the_dataclasses(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert load_planner_config(tmp_path / name) == EXPECTED


def test_an_empty_file_is_the_default(tmp_path):
    (tmp_path / "p.yaml").write_text("")
    assert load_planner_config(tmp_path / "p.yaml") == PlannerConfig()


positive = st.floats(0.1, 1e4, allow_nan=False)
constraints = st.builds(
    TableConstraint,
    sharding_types=st.none() | st.just(("row_wise", "table_wise")),
    ranks=st.none() | st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple),
    pooling_factors=st.none() | st.lists(positive, min_size=1, max_size=3).map(tuple),
    enforce_hbm=st.none() | st.booleans(),
    bounds_check=st.sampled_from([None, "fatal", "none"]),
)
configs = st.builds(
    PlannerConfig,
    topology=st.builds(
        TopologyConfig,
        device=st.sampled_from(["cuda", "cpu"]),
        world_size=st.none() | st.integers(1, 1024),
        node=st.sampled_from(sorted(PRESETS)),
        hbm_gib=st.none() | positive,
    ),
    batch_size=st.integers(1, 10**6),
    tables=st.dictionaries(st.text("abc_*", min_size=1), constraints, max_size=3),
    reservation=st.builds(ReservationConfig, share=st.floats(0, 0.99), dense_gib=st.none() | positive),
    timeout_seconds=st.none() | st.integers(1, 100),
)


@given(configs)
def test_a_configuration_survives_a_file(tmp_path_factory, config):
    path = tmp_path_factory.mktemp("config") / "planner.yaml"
    save_planner_config(path, config)
    assert load_planner_config(path) == config


@pytest.mark.parametrize(
    ("value", "where", "message"),
    [
        (
            {"batchsize": 1},
            "planner",
            "unknown key 'batchsize'. Did you mean batch_size? Known keys are topology, batch_size, tables",
        ),
        ({"topology": {"nodes": 1}}, "planner: topology", "Known keys are device, world_size"),
        (
            {"topology": {"world_size": "8"}},
            "planner: topology.world_size",
            "'8' is a str. It must be an int or null.",
        ),
        ({"batch_size": True}, "planner: batch_size", "True is a bool"),
        ({"topology": {"node": "h900"}}, "planner: topology: topology.node", "Presets are v100_32gb, a100"),
        ({"tables": {"t": {"ranks": ["a"]}}}, "planner: tables.t.ranks[0]", "'a' is a str"),
        ({"tables": [1]}, "planner: tables", "It must be a mapping, by name"),
        (
            {"tables": {"t": {"sharding_types": ["rowwise"]}}},
            "planner: tables.t: sharding_types",
            "'rowwise'",
        ),
        ([1], "planner", "It must be a mapping"),
        ({"reservation": {"share": 1}}, "planner: reservation: reservation.share", "1.0"),
    ],
)
def test_a_bad_key_or_value_is_named_with_its_path(value, where, message):
    with pytest.raises(SidError) as caught:
        make_options(PlannerConfig, value, "planner")
    assert str(caught.value).startswith(where)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.ini", "", "unknown suffix '.ini'"),
        ("p.yaml", "a: [", "cannot be read"),
        ("p.toml", "a = ", "cannot be read"),
        (None, "", "no such file"),
    ],
)
def test_unreadable_files(tmp_path, name, text, message):
    path = tmp_path / (name or "missing.yaml")
    if name:
        path.write_text(text)
    with pytest.raises(SidError, match=message):
        load_planner_config(path)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TopologyConfig(device="tpu"), "It is one of cuda, cpu"),
        (lambda: TopologyConfig(world_size=0), "topology.world_size: 0"),
        (lambda: TopologyConfig(world_size=12, local_world_size=8), "12 is not a multiple of 8"),
        (lambda: TopologyConfig(hbm_gib=-1), "topology.hbm_gib: -1"),
        (lambda: TableConstraint(sharding_types=()), "Name at least one of data_parallel"),
        (lambda: TableConstraint(sharding_types=("x",)), ", ".join(SHARDING_TYPES)),
        (lambda: TableConstraint(compute_kernels=("x",)), ", ".join(COMPUTE_KERNELS)),
        (lambda: TableConstraint(min_partition=6), "positive multiple of 4"),
        (lambda: TableConstraint(ranks=()), "at least one rank"),
        (lambda: TableConstraint(ranks=(-1,)), "at least one rank"),
        (lambda: TableConstraint(pooling_factors=(0.0,)), "pooling_factors: 0.0"),
        (lambda: TableConstraint(num_poolings=(-1.0,)), "num_poolings: -1.0"),
        (lambda: TableConstraint(cache_load_factor=1.5), "above 0, at most 1"),
        (lambda: TableConstraint(cache_policy="fifo"), "lru, lfu"),
        (lambda: TableConstraint(bounds_check="loud"), "fatal, warning, ignore, none"),
        (lambda: TableConstraint(output_dtype="fp8"), "fp32, fp16, bf16"),
        (
            lambda: TableConstraint(cache_load_factor=0.1, compute_kernels=("fused",)),
            "Allow fused_uvm_caching",
        ),
        (
            lambda: TableConstraint(sharding_types=("data_parallel",), compute_kernels=("fused",)),
            "data_parallel needs dense",
        ),
        (
            lambda: TableConstraint(sharding_types=("row_wise",), compute_kernels=("dense",)),
            "allow fused",
        ),
        (lambda: ReservationConfig(kind="none"), "heuristic, percentage, fixed"),
        (lambda: ReservationConfig(share=1.0), "reservation.share"),
        (lambda: ReservationConfig(gib=0), "reservation.gib"),
        (lambda: ReservationConfig(dense_gib=0), "reservation.dense_gib"),
        (lambda: PlannerConfig(batch_size=0), "batch_size: 0"),
        (lambda: PlannerConfig(timeout_seconds=0), "timeout_seconds: 0"),
        (lambda: PlannerConfig(proposers=()), "Name at least one of"),
        (lambda: PlannerConfig(proposers=("x",)), ", ".join(PROPOSERS)),
        (lambda: PlannerConfig(partitioner="x"), ", ".join(PARTITIONERS)),
    ],
)
def test_impossible_values_are_refused_with_the_choices(build, message):
    with pytest.raises(SidError) as caught:
        build()
    assert message in str(caught.value)


def test_presets_are_whole_and_a_field_replaces_the_presets_value():
    for name, preset in PRESETS.items():
        assert preset.gpus == 8
        assert all(value > 0 for value in dataclasses.astuple(preset))
        assert node_preset(name) is preset
        assert preset.intra_node_gbps > preset.inter_node_gbps
        assert preset.hbm_gbps > preset.ddr_gbps
    assert TopologyConfig(node="b200_180gb").value("hbm_gib") == PRESETS["b200_180gb"].hbm_gib
    assert TopologyConfig(node="b200_180gb", hbm_gib=5).value("hbm_gib") == 5.0
