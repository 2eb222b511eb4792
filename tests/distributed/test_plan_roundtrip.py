"""A plan made without a process group, saved, loaded and trained with."""

import pytest
import torch
import torch.distributed as dist

from tests.distributed.launch import run_ranks
from tests.parallel.toy import Toy, toy_batch, unsharded_losses
from torchrec_sid.errors import SidError
from torchrec_sid.parallel.optimizer import TableOptimizer
from torchrec_sid.parallel.plan_file import load_plan, save_plan
from torchrec_sid.parallel.planner_config import PlannerConfig, TableConstraint, TopologyConfig
from torchrec_sid.parallel.planning import make_plan
from torchrec_sid.parallel.sharding import shard_model

TABLES = {
    "bag_a": TableConstraint(sharding_types=("table_wise",), ranks=(1,), bounds_check="fatal"),
    "bag_b": TableConstraint(sharding_types=("data_parallel",)),
    "sequence": TableConstraint(sharding_types=("row_wise",)),
}
SGD = TableOptimizer("sgd", lr=0.5)


@pytest.fixture
def plan_path(tmp_path):
    topology = TopologyConfig(device="cpu", world_size=2, local_world_size=2)
    plan = make_plan(Toy(device="meta"), PlannerConfig(topology, tables=TABLES)).plan
    save_plan(tmp_path / "plan.json", plan)
    assert load_plan(tmp_path / "plan.json").plan == plan.plan
    return tmp_path / "plan.json"


def train(plan_path, device="cpu"):
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = Toy()
    if device == "meta":  # tables that no process could hold whole
        meta = Toy(device="meta")
        model.ebc, model.ec = meta.ebc, meta.ec
    sharded = shard_model(
        model, load_plan(plan_path), device=torch.device("cpu"), table_optimizer=SGD, seed=3
    )
    assert sharded.summary is None
    combined = sharded.make_optimizer(lambda p: torch.optim.Adam(p, lr=0.01))
    losses = []
    for step in range(6):
        combined.zero_grad()
        loss, _ = sharded.model(*toy_batch(step, rank * 4, 4))
        loss.backward()
        combined.step()
        mean = loss.detach() / world
        dist.all_reduce(mean)
        losses.append(mean.item())
    return losses, str(sharded.plan)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_loaded_plan_trains(plan_path, device):
    expected = unsharded_losses(SGD, 8, 6)
    for losses, plan in run_ranks(train, 2, plan_path, device):
        assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) < 1e-6
        assert plan == str(load_plan(plan_path))


def refuse(plan_path):
    try:
        train(plan_path)
    except SidError as error:
        return str(error)


def test_a_plan_for_another_world_is_refused(plan_path):
    [message] = run_ranks(refuse, 1, plan_path)
    assert "is planned on rank 1, 1 processes run. Plan for --world-size 1." in message


def out_of_range(plan_path):
    """An id beyond the table: bounds_check=fatal must stop it."""
    model = Toy()
    sharded = shard_model(
        model, load_plan(plan_path), device=torch.device("cpu"), table_optimizer=SGD, seed=3
    )
    dense, features, labels = toy_batch(0, 0, 4)
    features.values()[:] = 10_000
    try:
        sharded.model(dense, features, labels)
    except RuntimeError as error:
        return str(error)


def test_bounds_check_of_the_plan_reaches_the_kernel(tmp_path):
    topology = TopologyConfig(device="cpu", world_size=1)
    for mode, stops in (("fatal", True), ("warning", False)):
        tables = {"*": TableConstraint(bounds_check=mode)}
        plan = make_plan(Toy(device="meta"), PlannerConfig(topology, tables=tables)).plan
        save_plan(tmp_path / mode, plan)
        [message] = run_ranks(out_of_range, 1, tmp_path / mode)
        assert (message is not None) == stops, mode
        assert not stops or "idx" in message
