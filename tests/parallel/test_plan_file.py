import copy
import json
from dataclasses import replace

import pytest
import torch

from tests.parallel.models import Planned
from tests.parallel.test_planning import BASE
from tests.parallel.toy import Toy
from torchrec_sid.errors import ArtifactError, SidError
from torchrec_sid.parallel.checkpoint import CheckpointManager
from torchrec_sid.parallel.plan_file import check_plan, load_plan, plan_from_json, plan_to_json, save_plan
from torchrec_sid.parallel.planner_config import PlannerConfig, TableConstraint, TopologyConfig
from torchrec_sid.parallel.planning import make_plan

EVERYTHING = {
    "large": TableConstraint(
        sharding_types=("column_wise",),
        compute_kernels=("fused_uvm_caching",),
        min_partition=32,
        cache_load_factor=0.25,
        cache_policy="lru",
        enforce_hbm=True,
        stochastic_rounding=False,
        bounds_check="warning",
        output_dtype="bf16",
    ),
    "small": TableConstraint(sharding_types=("data_parallel",)),
    "events": TableConstraint(sharding_types=("row_wise",)),
}


def plan_for(model, world=2, device="cpu", tables=None):
    topology = TopologyConfig(device=device, world_size=world, local_world_size=world)
    return make_plan(model, PlannerConfig(topology, proposers=("greedy",), tables=tables or {})).plan


def test_a_saved_plan_reloads_to_the_identical_plan(tmp_path):
    plan = make_plan(Planned(), replace(BASE, tables=EVERYTHING)).plan
    save_plan(tmp_path / "plan.json", plan)
    loaded = load_plan(tmp_path / "plan.json")
    assert loaded.plan == plan.plan
    assert str(loaded) == str(plan)
    assert loaded._serialize() == plan._serialize()
    large = loaded.plan["ebc"]["large"]
    assert large.cache_params.load_factor == 0.25
    assert (large.enforce_hbm, large.stochastic_rounding) == (True, False)
    assert (large.bounds_check_mode.name, large.output_dtype.name) == ("WARNING", "BF16")
    assert loaded.plan["ebc"]["small"].sharding_spec is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not JSON"),
        ("[]", "is not a sharding plan"),
        ('{"kind": "sharding_plan", "version": 2}', "Upgrade torchrec-sid"),
        ('{"kind": "sharding_plan", "version": 1}', "cannot be read"),
        ('{"kind": "sharding_plan", "version": 1, "modules": {"a": {"t": {"x": 1}}}}', "cannot be read"),
    ],
)
def test_bad_plan_files(tmp_path, text, message):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(ArtifactError) as caught:
        load_plan(tmp_path / "plan.json")
    assert message in str(caught.value)
    assert str(tmp_path / "plan.json") in str(caught.value)


def test_a_missing_plan_file(tmp_path):
    with pytest.raises(ArtifactError, match="no such file. Make a plan with torchrec-sid plan"):
        load_plan(tmp_path / "plan.json")


def test_a_checkpoint_gives_its_plan(tmp_path):
    model = Toy()
    plan = plan_for(model)
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, {"model": model.state_dict()}, {"plan": plan_to_json(plan)})
        manager.save(2, {"model": model.state_dict()}, {})
    first, second = sorted(tmp_path.iterdir())
    assert load_plan(first).plan == plan.plan
    with pytest.raises(ArtifactError, match="000002-step-2: is not a sharding plan"):
        load_plan(second)


def test_what_has_no_json_form_is_refused():
    plan = plan_for(Toy())
    plan.plan["ebc"]["bag_a"].key_value_params = object()
    with pytest.raises(SidError, match="'bag_a': its plan has key_value_params"):
        plan_to_json(plan)


def test_a_plan_is_checked_against_model_world_and_device():
    model = Toy()
    plan = plan_for(model)
    check_plan(plan, model, 2, "cpu")
    with pytest.raises(SidError, match="is planned on rank 1, 1 processes run"):
        check_plan(plan, model, 1, "cpu")
    with pytest.raises(SidError, match="is planned for cpu, this run is on cuda"):
        check_plan(plan, model, 2, "cuda")
    rows = {"*": TableConstraint(sharding_types=("row_wise",))}
    on_gpus = plan_for(Toy(device="meta"), world=4, device="cuda", tables=rows)
    check_plan(on_gpus, model, 4, "cuda", 4)
    with pytest.raises(SidError, match="on GPU 2, the nodes have 2 each"):
        check_plan(on_gpus, model, 4, "cuda", 2)
    with pytest.raises(SidError, match=r"is planned as \[40, 8\], it is \[41, 8\]"):
        check_plan(plan, Toy(rows=41), 2, "cpu")
    with pytest.raises(SidError, match="is planned in 'e[bc]*', it is in '0.e[bc]*'"):
        check_plan(plan, torch.nn.Sequential(model), 2, "cpu")
    without = copy.deepcopy(plan)
    del without.plan["ebc"]["bag_b"]
    with pytest.raises(SidError, match="'bag_b': is not in the plan"):
        check_plan(without, model, 2, "cpu")
    del model.ebc
    with pytest.raises(SidError, match="'bag_a': is not in the model"):
        check_plan(plan, model, 2, "cpu")


def test_json_is_plain():
    value = plan_to_json(plan_for(Toy()))
    assert plan_from_json(json.loads(json.dumps(value))).plan == plan_for(Toy()).plan
