"""A run that changes its number of processes and its plan at checkpoints goes on as if it had not."""

import pytest
import torch
import torch.distributed as dist

from tests.distributed.launch import run_ranks
from tests.parallel.toy import SEQUENCE, Toy, toy_batch
from torchrec_sid.parallel.checkpoint import CheckpointManager
from torchrec_sid.parallel.optimizer import TableOptimizer
from torchrec_sid.parallel.planner_config import PlannerConfig, TableConstraint, TopologyConfig
from torchrec_sid.parallel.sharding import shard_model
from torchrec_sid.parallel.state import apply_training_state, prepare_to_load, training_state

GLOBAL_BATCH = 8


def make(bags, sequence, optimizer, momentum=0.9, replicas=1):
    torch.manual_seed(0)
    config = PlannerConfig(
        TopologyConfig(device="cpu"),
        tables={
            "bag_*": TableConstraint(sharding_types=(bags,), min_partition=4),
            SEQUENCE: TableConstraint(sharding_types=(sequence,), min_partition=4),
        },
    )
    cpu = torch.device("cpu")
    sharded = shard_model(
        Toy(),
        config,
        device=cpu,
        table_optimizer=TableOptimizer(optimizer, lr=0.1),
        seed=3,
        replicas=replicas,
    )
    # Weight decay, so that an optimizer state made after loading instead of before would show.
    return sharded.model, sharded.make_optimizer(
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=momentum, weight_decay=0.01)
    )


def leg(folder, first, last, bags, sequence, optimizer, asynchronous=False, replicas=1):
    """Resume if there is a checkpoint, train steps ``first .. last``, save; the global losses."""
    model, combined = make(bags, sequence, optimizer, replicas=replicas)
    rank, world = dist.get_rank(), dist.get_world_size()
    share, losses = GLOBAL_BATCH // world, []
    with CheckpointManager(folder, asynchronous=asynchronous) as manager:
        info = manager.latest()
        assert (info is None) == (first == 0)
        if info is not None:
            prepare_to_load(combined)
            state = training_state(model, combined)
            metadata = manager.load(info, state)
            apply_training_state(model, combined, state)
            assert info.step == metadata["position"] == first
        for step in range(first, last):
            combined.zero_grad()
            loss, _ = model(*toy_batch(step, rank * share, share))
            loss.backward()
            combined.step()
            if replicas > 1:
                model.sync()
            mean = loss.detach() / world
            dist.all_reduce(mean)
            losses.append(mean.item())
        # Metric windows and the like: each rank its own.
        local = {"seen": torch.tensor([float(rank)])}
        manager.save(last, training_state(model, combined), {"position": last}, local=local)
        if asynchronous:  # the copy was taken at save: later steps must not reach it
            for parameter in model.parameters():
                parameter.data.add_(1)
    return losses


def uninterrupted(optimizer, steps):
    model_losses = []
    [losses] = run_ranks(_one_process, 1, optimizer, steps)
    model_losses.extend(losses)
    return model_losses


def _one_process(optimizer, steps):
    model, combined = make("row_wise", "row_wise", optimizer)
    losses = []
    for step in range(steps):
        combined.zero_grad()
        loss, _ = model(*toy_batch(step, 0, GLOBAL_BATCH))
        loss.backward()
        combined.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("optimizer", "plans", "asynchronous"),
    [
        ("rowwise_adagrad", [("table_wise", "row_wise"), ("row_wise", "row_wise")], False),
        (
            "adagrad",
            [("column_wise", "row_wise"), ("row_wise", "column_wise"), ("table_wise", "table_wise")],
            True,
        ),
        ("sgd", [("data_parallel", "row_wise"), ("row_wise", "column_wise")], False),
    ],
)
def test_2_to_1_to_4_to_2_processes(tmp_path, optimizer, plans, asynchronous):
    expected = uninterrupted(optimizer, 12)
    losses = []
    for index, world in enumerate((2, 1, 4, 2)):
        first, last = 3 * index, 3 * index + 3
        bags, sequence = plans[index % len(plans)]
        losses += run_ranks(leg, world, tmp_path, first, last, bags, sequence, optimizer, asynchronous)[0]
    worst = max(abs(a - b) for a, b in zip(losses, expected, strict=True))
    assert worst < 1e-6, (losses, expected)


def test_a_2d_run_goes_on_as_one_process(tmp_path):
    expected = uninterrupted("sgd", 6)
    losses = run_ranks(leg, 4, tmp_path, 0, 3, "row_wise", "row_wise", "sgd", False, 2)[0]
    losses += run_ranks(leg, 1, tmp_path, 3, 6, "table_wise", "row_wise", "sgd")[0]
    assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) < 1e-6
