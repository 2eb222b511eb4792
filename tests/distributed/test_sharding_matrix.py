"""Training on several processes equals training on one, for every way to shard that runs on a CPU."""

import torch
import torch.distributed as dist

from tests.distributed.launch import run_ranks
from tests.parallel.toy import BAGS, SEQUENCE, Toy, toy_batch, unsharded_losses
from torchrec_sid.errors import SidError
from torchrec_sid.parallel.optimizer import TableOptimizer
from torchrec_sid.parallel.planner_config import PlannerConfig, TableConstraint, TopologyConfig
from torchrec_sid.parallel.sharding import shard_model

GLOBAL_BATCH, STEPS = 8, 6
SGD, ADAGRAD = TableOptimizer("sgd", lr=0.5), TableOptimizer("adagrad", lr=0.1)
ROWWISE = TableOptimizer("rowwise_adagrad", lr=0.1)
# bags, sequence, optimizer; rowwise Adagrad keeps one state per row and column shard, so not with columns.
TWO_PROCESSES = [
    ("table_wise", "table_wise", SGD),
    ("table_wise", "table_wise", ADAGRAD),
    ("table_wise", "row_wise", ROWWISE),
    ("row_wise", "row_wise", SGD),
    ("row_wise", "row_wise", ADAGRAD),
    ("row_wise", "table_wise", ROWWISE),
    ("column_wise", "column_wise", SGD),
    ("column_wise", "column_wise", ADAGRAD),
    ("table_row_wise", "row_wise", ROWWISE),
    ("table_column_wise", "row_wise", ADAGRAD),
    ("grid_shard", "row_wise", ADAGRAD),
    ("data_parallel", "row_wise", SGD),
    ("data_parallel", "row_wise", ADAGRAD),
    ("data_parallel", "row_wise", ROWWISE),
]


def sharded_losses(bags, sequence, optimizer, dim, replicas=1):
    """Global losses of the steps, and how each table was sharded."""
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    narrow = 4 if dim < 128 else None
    config = PlannerConfig(
        TopologyConfig(device="cpu"),
        batch_size=GLOBAL_BATCH // world,
        tables={
            "bag_*": TableConstraint(sharding_types=(bags,), min_partition=narrow),
            SEQUENCE: TableConstraint(sharding_types=(sequence,), min_partition=narrow),
        },
    )
    sharded = shard_model(
        Toy(dim=dim),
        config,
        device=torch.device("cpu"),
        table_optimizer=optimizer,
        seed=3,
        replicas=replicas,
    )
    combined = sharded.make_optimizer(lambda p: torch.optim.Adam(p, lr=0.01))
    losses = []
    share = GLOBAL_BATCH // world
    for step in range(STEPS):
        combined.zero_grad()
        loss, _ = sharded.model(*toy_batch(step, rank * share, share))
        loss.backward()
        combined.step()
        if replicas > 1:
            sharded.model.sync()
        mean = loss.detach() / world
        dist.all_reduce(mean)
        losses.append(mean.item())
    shards = {t.name: (t.sharding_type, len(t.ranks)) for t in sharded.summary.tables}
    return losses, shards


def run_cases(cases, dim, replicas=1):
    return [sharded_losses(*case, dim, replicas) for case in cases]


def check(cases, outcomes, dim, world):
    for case, (losses, shards) in zip(cases, outcomes, strict=True):
        bags, sequence, optimizer = case
        assert {shards[name][0] for name in BAGS} == {bags}, case
        assert shards[SEQUENCE][0] == sequence, case
        if bags != "table_wise":
            assert all(shards[name][1] > 1 for name in BAGS), (case, shards)
        expected = unsharded_losses(optimizer, GLOBAL_BATCH, STEPS, dim)
        worst = max(abs(a - b) for a, b in zip(losses, expected, strict=True))
        assert worst < 1e-6, (case, world, worst)


def test_two_processes_equal_one():
    outcomes = run_ranks(run_cases, 2, TWO_PROCESSES, 8)[0]
    check(TWO_PROCESSES, outcomes, 8, 2)


def test_two_nodes_of_two_processes_equal_one():
    cases = [
        ("table_row_wise", "row_wise", SGD),
        ("grid_shard", "row_wise", SGD),
        ("column_wise", "column_wise", SGD),
        ("row_wise", "table_wise", SGD),
    ]
    outcomes = run_ranks(run_cases, 4, cases, 256, local_size=2)[0]
    check(cases, outcomes, 256, 4)


def test_two_replicas_of_two_processes_equal_one_under_sgd():
    """2D parallelism. Under Adagrad replicas differ from one process: they average accumulated squares."""
    cases = [
        ("table_wise", "table_wise", SGD),
        ("row_wise", "row_wise", SGD),
        ("column_wise", "row_wise", SGD),
    ]
    outcomes = run_ranks(run_cases, 4, cases, 8, 2)[0]
    check(cases, outcomes, 8, 4)
    losses, _ = run_ranks(run_cases, 4, [("row_wise", "row_wise", ADAGRAD)], 8, 2)[0][0]
    expected = unsharded_losses(ADAGRAD, GLOBAL_BATCH, STEPS)
    assert 1e-4 < max(abs(a - b) for a, b in zip(losses, expected, strict=True)) < 0.1


def what_is_refused():
    """The message of each combination that TorchRec does not run on a CPU."""
    found = {}
    for sequence in ("data_parallel", "table_row_wise", "grid_shard"):
        try:
            sharded_losses("row_wise", sequence, SGD, 8)
        except SidError as error:
            found[sequence] = str(error)
    try:
        sharded_losses("row_wise", "row_wise", TableOptimizer("adam"), 8)
    except SidError as error:
        found["adam"] = str(error)
    try:
        sharded_losses("row_wise", "row_wise", SGD, 8, replicas=3)
    except SidError as error:
        found["replicas"] = str(error)
    return found


def test_what_does_not_run_on_a_cpu_is_refused_with_the_choices():
    for found in run_ranks(what_is_refused, 2):
        for sequence in ("data_parallel", "table_row_wise", "grid_shard"):
            assert f"an EmbeddingCollection on cpu cannot be {sequence}" in found[sequence]
            assert "It can be table_wise: fused; row_wise: fused; column_wise: fused." in found[sequence]
        assert "adam has no CPU kernel. On a CPU use sgd, adagrad, rowwise_adagrad." in found["adam"]
        assert "3 over 2 processes" in found["replicas"]
