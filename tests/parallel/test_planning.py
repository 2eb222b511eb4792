"""Every field of the planner's configuration changes the plan or what it costs."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torchrec import KeyedJaggedTensor

from tests.parallel.models import Planned
from torchrec_sid.collections import SidEmbeddingBagCollection, SidEmbeddingCollection
from torchrec_sid.errors import SidError
from torchrec_sid.parallel.constraints import model_pooling_factors, table_features
from torchrec_sid.parallel.optimizer import TableOptimizer
from torchrec_sid.parallel.plan_summary import format_summary
from torchrec_sid.parallel.planner_config import (
    PlannerConfig,
    ReservationConfig,
    TableConstraint,
    TopologyConfig,
)
from torchrec_sid.parallel.planning import make_plan, measure_feature_lengths, resolve_topology
from torchrec_sid.spec import SidSpec
from torchrec_sid.tables import HashedPrefix, SidEmbeddingBagConfig, SidEmbeddingConfig

BASE = PlannerConfig(
    TopologyConfig(world_size=4, local_world_size=2, node="a100_80gb"),
    batch_size=1024,
    proposers=("greedy",),
)
ON_GPU = ("fused", "dense")
LENGTHS = {"l1": 20.0, "l2": 3.0, "s": 1.0, "h": 100.0}


def planned(config=BASE, model=None, lengths=LENGTHS):
    return make_plan(model or Planned(), config, feature_lengths=lengths)


def constrained(table="large", config=BASE, **fields):
    return planned(replace(config, tables={table: TableConstraint(**fields)}))


def table(result, name="large"):
    return next(t for t in result.summary.tables if t.name == name)


def parameter(result, name="large"):
    return {k: v for tables in result.plan.plan.values() for k, v in tables.items()}[name]


@pytest.fixture(scope="module")
def base():
    return planned()


def test_a_plan_covers_every_table_and_fits(base):
    assert {t.name for t in base.summary.tables} == {"large", "small", "events"}
    assert set(base.plan.plan) == {"ebc", "ec"}
    summary = base.summary
    assert len(summary.ranks) == summary.world_size == 4
    for load in summary.ranks:
        assert 0 < load.hbm_bytes <= summary.hbm_capacity - summary.reserved_bytes
    assert sum(load.hbm_bytes for load in summary.ranks) == sum(t.hbm_bytes for t in summary.tables)
    weights = sum(t.rows * t.dim * 4 for t in summary.tables)
    assert sum(t.hbm_bytes for t in summary.tables) > weights
    assert 1 / 4 <= summary.balance <= 1
    assert summary.step_time.total == max(load.time.total for load in summary.ranks) > 0
    assert "large" in base.report
    text = format_summary(summary)
    assert all(t.name in text and t.sharding_type in text for t in summary.tables)
    json = summary.to_json()
    assert json["step_time_ms"]["total"] == summary.step_time.total


def test_pooling_factors_come_from_the_data(base):
    assert table(base).pooling_factors == (20.0, 3.0)
    assert table(base, "events").pooling_factors == (100.0,)
    assert table(planned(lengths=None)).pooling_factors == (1.0, 1.0)
    assert base.summary.step_time.total > planned(lengths=None).summary.step_time.total


def test_measured_feature_lengths():
    kjt = KeyedJaggedTensor(
        keys=["a", "b"], values=torch.arange(9), lengths=torch.tensor([1, 1, 1, 1, 2, 0, 3, 0])
    )
    assert measure_feature_lengths([kjt, kjt]) == {"a": 1.0, "b": 1.25}
    with pytest.raises(SidError, match="no batch"):
        measure_feature_lengths([])


def test_sid_collections_state_their_own_pooling_factors():
    config = SidEmbeddingBagConfig(
        name="sid",
        embedding_dim=16,
        feature_names=["item", "history"],
        scheme=HashedPrefix(depth=3, num_embeddings=1000),
        spec=SidSpec((8, 8, 8)),
    )
    model = nn.Sequential(SidEmbeddingBagCollection(tables=[config], device=torch.device("meta")))
    assert model_pooling_factors(model, {"history": 50.0}) == {"sid": (3.0, 150.0)}
    result = make_plan(model, BASE, feature_lengths={"history": 50.0})
    assert table(result, "sid").pooling_factors == (3.0, 150.0)


def test_a_configured_pooling_factor_wins_and_one_counts_for_all():
    assert table(constrained(pooling_factors=(7.0,))).pooling_factors == (7.0, 7.0)
    assert table(constrained(pooling_factors=(7.0, 9.0))).pooling_factors == (7.0, 9.0)
    with pytest.raises(SidError, match="3 pooling_factors, the table has 2 features"):
        constrained(pooling_factors=(1.0, 2.0, 3.0))


@pytest.mark.parametrize(
    "kind", ["table_wise", "row_wise", "table_row_wise", "column_wise", "data_parallel"]
)
def test_sharding_types(kind):
    assert table(constrained("small", sharding_types=(kind,)), "small").sharding_type == kind


def test_compute_kernels_and_cache():
    uvm = constrained(compute_kernels=("fused_uvm",))
    assert table(uvm).compute_kernel == "fused_uvm"
    assert table(uvm).ddr_bytes > 0
    some = constrained(compute_kernels=("fused_uvm_caching",), cache_load_factor=0.1)
    more = constrained(compute_kernels=("fused_uvm_caching",), cache_load_factor=0.5, cache_policy="lfu")
    assert table(some).hbm_bytes < table(more).hbm_bytes
    assert parameter(some).cache_params.load_factor == 0.1
    assert parameter(more).cache_params.algorithm.name == "LFU"


def test_ranks():
    result = constrained(ranks=(1, 3), sharding_types=("column_wise",), min_partition=32)
    assert table(result).column_shards == 4
    assert table(result).ranks == (1, 3)
    for name in ("small", "events"):
        assert table(result, name).hbm_bytes > 0
    assert table(constrained(ranks=(2,))).ranks == (2,)
    balanced = constrained(ranks=(2,), config=replace(BASE, partitioner="memory_balanced"))
    assert table(balanced).ranks == (2,)
    with pytest.raises(SidError, match="Ranks are 0 to 3"):
        constrained(ranks=(4,))
    with pytest.raises(SidError, match="row_wise spreads over all ranks"):
        constrained(ranks=(0,), sharding_types=("row_wise",))
    tight = replace(BASE, topology=replace(BASE.topology, hbm_gib=7.0))
    with pytest.raises(SidError, match="do not fit 4 ranks"):
        constrained("*", config=tight, ranks=(0,), compute_kernels=("fused",))


def test_min_partition():
    narrow = constrained(sharding_types=("column_wise",), min_partition=32)
    assert table(narrow).column_shards == 4
    assert table(constrained(sharding_types=("column_wise",))).column_shards == 1


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("enforce_hbm", True, True),
        ("stochastic_rounding", True, True),
        ("bounds_check", "fatal", "FATAL"),
        ("output_dtype", "fp16", "FP16"),
    ],
)
def test_fields_that_reach_the_kernel(field, value, expected):
    name = {"bounds_check": "bounds_check_mode"}.get(field, field)
    found = getattr(parameter(constrained(**{field: value})), name)
    assert getattr(found, "name", found) == expected
    assert getattr(parameter(planned()), name) is None


def test_num_poolings():
    some = constrained("events", num_poolings=(1.0,)).summary.step_time.total
    assert constrained("events", num_poolings=(4.0,)).summary.step_time.total > some


def test_names_beat_patterns_and_the_first_pattern_counts():
    result = planned(
        replace(
            BASE,
            tables={
                "[ls]*": TableConstraint(sharding_types=("row_wise",)),
                "*": TableConstraint(sharding_types=("column_wise",)),
                "small": TableConstraint(sharding_types=("table_wise",)),
            },
        )
    )
    kinds = {t.name: t.sharding_type for t in result.summary.tables}
    assert kinds == {"large": "row_wise", "small": "table_wise", "events": "column_wise"}


def test_an_unknown_table_lists_the_tables():
    with pytest.raises(
        SidError, match="'larje': matches no table of the model. Tables are events, large, small"
    ):
        constrained("larje", sharding_types=("row_wise",))


def test_a_combination_the_device_lacks_lists_what_it_has():
    with pytest.raises(SidError, match="an EmbeddingCollection on cuda cannot be grid_shard") as caught:
        constrained("events", sharding_types=("grid_shard",))
    assert "row_wise: fused, fused_uvm" in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"hbm_gbps": 100.0},
        {"intra_node_gbps": 26.0},
        {"inter_node_gbps": 1.0},
        {"local_world_size": 4},
        {"world_size": 8},
        {"node": "v100_32gb"},
    ],
)
def test_topology_changes_the_predicted_time(base, change):
    config = replace(BASE, topology=replace(BASE.topology, **change))
    assert planned(config).summary.step_time != base.summary.step_time


def test_memory_of_the_topology():
    small = replace(BASE, topology=replace(BASE.topology, world_size=1, local_world_size=1, hbm_gib=4.0))
    with pytest.raises(SidError, match="tables of 7.4 GiB, .* do not fit 1 ranks of 4.0 GiB") as caught:
        constrained("*", config=small, compute_kernels=ON_GPU)
    assert "Use more ranks" in str(caught.value)
    # Unless told otherwise TorchRec turns to host memory, and the summary says so.
    spilled = planned(small)
    assert {t.compute_kernel for t in spilled.summary.tables} & {"fused_uvm", "fused_uvm_caching"}
    assert "2 tables live in host memory" in format_summary(spilled.summary)
    without = replace(BASE.topology, ddr_gib=0.01)
    with pytest.raises(SidError, match="do not fit"):
        constrained(config=replace(BASE, topology=without), compute_kernels=("fused_uvm",))
    slow = replace(BASE, topology=replace(BASE.topology, host_to_device_gbps=1.0))
    fast = constrained(compute_kernels=("fused_uvm",)).summary.step_time.total
    assert constrained(config=slow, compute_kernels=("fused_uvm",)).summary.step_time.total > fast


def test_cpu_topology():
    cpu = TopologyConfig(device="cpu", world_size=2, ddr_gib=64)
    result = planned(replace(BASE, topology=cpu))
    assert {t.sharding_type for t in result.summary.tables} <= {"table_wise", "row_wise"}
    assert all(load.ddr_bytes > 0 and load.hbm_bytes == 0 for load in result.summary.ranks)
    slow = replace(BASE, topology=replace(cpu, ddr_gbps=1.0))
    assert planned(slow).summary.step_time.total > result.summary.step_time.total
    machine = resolve_topology(TopologyConfig(device="cpu", world_size=2), None)
    assert 0 < machine.ddr_gib < 2**20


@pytest.mark.parametrize(
    "reservation",
    [
        ReservationConfig("percentage", 0.4),
        ReservationConfig("fixed", gib=20),
        ReservationConfig("heuristic", 0.3),
        ReservationConfig("heuristic", dense_gib=30),
    ],
)
def test_reservation(base, reservation):
    assert (
        planned(replace(BASE, reservation=reservation)).summary.reserved_bytes
        != base.summary.reserved_bytes
    )


def test_reserved_bytes_are_those_asked_for():
    cpu = replace(BASE, topology=TopologyConfig(device="cpu", world_size=2, ddr_gib=64))
    for kept in (ReservationConfig("percentage", 0.25), ReservationConfig("fixed", gib=16)):
        on_cpu = planned(replace(cpu, reservation=kept)).summary
        assert on_cpu.reserved_bytes / 2**30 == pytest.approx(16, abs=0.01)
    fixed = planned(replace(BASE, reservation=ReservationConfig("fixed", gib=20)))
    assert fixed.summary.reserved_bytes / 2**30 == pytest.approx(20, abs=0.01)
    dense = planned(replace(BASE, reservation=ReservationConfig("heuristic", share=0.0)))
    # Six times the dense layer, and 20 copies of the ids of a batch.
    weights, ids = 6 * 1_001_000 * 4, 20 * 8 * 1024 * (20 + 3 + 1 + 100)
    assert dense.summary.reserved_bytes == pytest.approx(weights + ids, rel=0.01)


def test_batch_size(base):
    assert planned(replace(BASE, batch_size=8192)).summary.step_time.total > base.summary.step_time.total


@pytest.mark.parametrize("name", ["grid", "greedy", "greedy_flat", "uniform", "dynamic_programming"])
def test_each_proposer_finds_a_plan(name):
    assert len(planned(replace(BASE, proposers=(name,))).summary.tables) == 3


def test_proposers_matter(base):
    uniform = planned(replace(BASE, proposers=("uniform",))).summary
    assert len({t.sharding_type for t in uniform.tables if t.pooled}) == 1
    both = planned(replace(BASE, proposers=("greedy", "uniform"))).summary
    assert both.step_time.total <= min(base.summary.step_time.total, uniform.step_time.total) * 1.001


def test_partitioner():
    tables = {"*": TableConstraint(sharding_types=("table_wise",))}
    greedy = planned(replace(BASE, tables=tables, proposers=("greedy",)))
    balanced = planned(replace(BASE, tables=tables, proposers=("greedy",), partitioner="memory_balanced"))
    fullest = [max(load.hbm_bytes for load in r.summary.ranks) for r in (greedy, balanced)]
    assert fullest[1] <= fullest[0]


def test_timeout_stops_the_search():
    # The clock is read between proposals, so that one is always made.
    assert planned(replace(BASE, timeout_seconds=1)).summary.tables


def test_the_optimizers_memory_is_counted():
    model = {name: Planned(optimizer=TableOptimizer(name)) for name in ("sgd", "rowwise_adagrad", "adam")}
    used = {name: sum(t.hbm_bytes for t in planned(model=m).summary.tables) for name, m in model.items()}
    assert used["sgd"] < used["rowwise_adagrad"] < used["adam"]


def test_a_model_without_tables():
    result = make_plan(nn.Linear(2, 2), BASE)
    assert result.plan.plan == {}
    assert result.summary.tables == ()
    assert result.summary.balance == 1.0
    assert format_summary(result.summary)


def test_the_world_must_be_known():
    with pytest.raises(SidError, match="world_size: is not set"):
        planned(PlannerConfig())
    with pytest.raises(SidError, match="3 over 4 processes"):
        make_plan(Planned(), BASE, replicas=3)


def test_replicas_plan_for_one_group():
    assert make_plan(Planned(), BASE, replicas=2).summary.world_size == 2


@pytest.mark.parametrize("world", [1, 8, 1024])
def test_worlds_from_1_to_1024(world):
    topology = replace(BASE.topology, world_size=world, local_world_size=min(8, world))
    rows = {"*": TableConstraint(sharding_types=("row_wise",), compute_kernels=("fused",))}
    config = replace(BASE, topology=topology, tables=rows)
    assert len(planned(config).summary.ranks) == world


def test_two_collections_with_a_table_of_one_name():
    model = nn.ModuleDict({"a": Planned(), "b": Planned()})
    with pytest.raises(SidError, match="table 'large': occurs in 'a.ebc' and in 'b.ebc'"):
        make_plan(model, BASE)


def test_what_is_large_is_named_with_torchrecs_own_words():
    lengths = dict.fromkeys(table_features(Planned()), 200.0)
    says = "4,000,000 samples a rank reads .* ids of table.*TorchRec: .*Make the batch smaller"
    with pytest.raises(SidError, match=says):
        make_plan(Planned(), replace(BASE, batch_size=4_000_000), feature_lengths=lengths)


def test_a_misspelt_feature_is_refused():
    with pytest.raises(SidError, match=r"feature_lengths\['histroy'\].*no table reads it.*Features are"):
        make_plan(Planned(), BASE, feature_lengths={"histroy": 3.0})


@pytest.mark.parametrize(("device", "works"), [("cpu", False), ("cuda", True)])
def test_bags_of_events_are_not_cut_by_row_on_a_cpu(device, works):
    """Every rank has another number of events, and gloo reduces equal parts only."""
    table = SidEmbeddingConfig(
        name="t",
        embedding_dim=64,
        feature_names=["history"],
        scheme=HashedPrefix(3),
        spec=SidSpec((8, 8, 8)),
    )
    model = SidEmbeddingCollection([table], device=torch.device("meta"))
    config = replace(BASE, topology=replace(BASE.topology, device=device))
    assert make_plan(model, config).summary.tables[0].sharding_type in ("table_wise", "column_wise")
    config = replace(config, tables={"t": TableConstraint(sharding_types=("row_wise",))})
    if works:
        assert make_plan(model, config).summary.tables[0].sharding_type == "row_wise"
    else:
        with pytest.raises(SidError, match="row_wise on a CPU.*events='rows'"):
            make_plan(model, config)
