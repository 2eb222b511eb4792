"""Two processes, sharded and pipelined, train exactly like one process without TorchRec's machinery."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.distributed.launch import run_ranks
from tests.logs import SPEC, random_sids, small_log
from torchrec_sid.data.batch import RankingBatch
from torchrec_sid.data.prepared import PreparedLog
from torchrec_sid.data.reader import BatchReader
from torchrec_sid.models.build import Ranking, RankingConfig, build_ranking
from torchrec_sid.models.stores import ContentStore, SideStore, SidStore
from torchrec_sid.parallel.checkpoint import CheckpointManager
from torchrec_sid.parallel.embedding_tables import find_tables
from torchrec_sid.parallel.initialise import initialise_tables
from torchrec_sid.parallel.optimizer import TableOptimizer
from torchrec_sid.parallel.planner_config import PlannerConfig
from torchrec_sid.parallel.sharding import shard_model
from torchrec_sid.side.basis import FrozenBasis
from torchrec_sid.spec import SidSpec
from torchrec_sid.training.log_features import log_sizes
from torchrec_sid.training.loop import TrainingLoop
from torchrec_sid.training.run import batch_config

BATCHES, EPOCHS, GLOBAL_BATCH, SEED = 3, 5, 128, 3
STEPS = BATCHES * EPOCHS
TABLES = TableOptimizer("adagrad", lr=0.05)
SIDE = SidSpec((3,) * 10)
TRANSFORMER = " in a transformer"
ARMS = (
    "none",
    "full_id",
    "dense+cosine",
    "hashed_prefix+overlap",
    "full_id+side",
    "hashed_prefix+side" + TRANSFORMER,
)

# After other tests of the fast part, in one process, the rows over prefixes have differed by more than the
# tolerance; alone they do not.
pytestmark = pytest.mark.slow


def _ranking(arm: str, log: PreparedLog) -> Ranking:
    torch.manual_seed(SEED)
    content = torch.randn(log.items, 12, generator=torch.Generator().manual_seed(1))
    config = RankingConfig(arm=arm, dim=16, history_length=20, table_rows=100)
    if arm.endswith(TRANSFORMER):
        config = replace(config, arm=arm.removesuffix(TRANSFORMER), encoder_layers=2, interaction="dcn")
    directions = torch.randn(10, 12, generator=torch.Generator().manual_seed(2))
    trits = torch.randint(0, 3, (log.items, 10), generator=torch.Generator().manual_seed(4))
    stores = (
        SidStore(SPEC, values={"sid": random_sids(log.items)}),
        SideStore(FrozenBasis.from_digits(SIDE, directions), values={"bytes": SIDE.pack_bytes(trits)}),
        ContentStore(content),
    )
    return build_ranking(config, log_sizes(log, config.dim), stores)


def _read(log: PreparedLog, ranking: Ranking, split: str = "train", start: int = 0) -> BatchReader:
    world = dist.get_world_size() if dist.is_initialized() else 1
    return BatchReader(
        log,
        split,
        batch_config(ranking, GLOBAL_BATCH // world, 20),
        rank=dist.get_rank() if dist.is_initialized() else 0,
        world_size=world,
        start_batch=start,
        item_values=ranking.item_values,
    )


def _epoch(log: PreparedLog, ranking: Ranking, start: int = 0) -> list[RankingBatch]:
    """The first few batches: what is seen often is soon known."""
    return list(itertools.islice(_read(log, ranking, start=start), BATCHES - start))


def _dense(parameters):
    # Not Adam: it turns rounding noise of a gradient near zero into a whole step.
    return torch.optim.SGD(parameters, lr=0.2)


def _train_plainly(arm: str, log: PreparedLog) -> list[float]:
    ranking = _ranking(arm, log)
    tables = find_tables(ranking.module)
    initialise_tables(ranking.module, tables, SEED)
    keys = {table.weight_key for table in tables.values()}
    named = dict(ranking.module.named_parameters())
    optimizers = [_dense([p for name, p in named.items() if name not in keys])]
    if keys:
        optimizers.append(torch.optim.Adagrad([named[key] for key in keys], lr=TABLES.lr, eps=TABLES.eps))
    losses = []
    for batch in _epoch(log, ranking) * EPOCHS:
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss, _ = ranking.module(batch)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def _loop(arm: str, log: PreparedLog, checkpoints: CheckpointManager | None = None) -> tuple:
    ranking = _ranking(arm, log)
    device = torch.device("cpu")
    sharded = shard_model(ranking.module, PlannerConfig(), device=device, table_optimizer=TABLES, seed=SEED)
    loop = TrainingLoop(
        sharded.model,
        sharded.make_optimizer(_dense),
        device,
        checkpoints=checkpoints,
        checkpoint_every=5,
    )
    return loop, ranking


def _losses(loop: TrainingLoop, ranking: Ranking, log: PreparedLog, steps: int) -> list[float]:
    losses: list[float] = []
    loop.train(
        lambda epoch, start: _epoch(log, ranking, start),
        epochs=EPOCHS,
        max_steps=steps,
        on_step=lambda step, output: losses.append(float(output.loss)),
    )
    return losses


def _train_sharded(arm: str, log: PreparedLog) -> tuple[list[float], int, dict]:
    loop, ranking = _loop(arm, log)
    losses = _losses(loop, ranking, log, STEPS)
    pipelined = len(loop.pipeline._pipelined_modules if loop.pipeline else [])
    evaluated = loop.evaluate(_read(log, ranking, "test"), GLOBAL_BATCH // 2)
    return losses, pipelined, evaluated


@pytest.mark.parametrize("arm", ARMS)
def test_two_processes_equal_one(arm: str, tmp_path: Path) -> None:
    log = small_log(tmp_path)
    expected = torch.tensor(_train_plainly(arm, log))
    results = run_ranks(_train_sharded, 2, arm, log)
    mean = torch.tensor([losses for losses, _, _ in results]).mean(0)
    assert (mean - expected).abs().max() <= 1e-6
    assert expected[-BATCHES:].mean() < expected[:BATCHES].mean() - 0.0003, "it learns nothing"
    tables = 0 if arm in ("none", "dense+cosine") else 2
    assert [pipelined for _, pipelined, _ in results] == [tables, tables]
    first, second = (evaluated for _, _, evaluated in results)
    assert first == second
    assert first["all"].rows == log.rows("test")


def _resume(arm: str, log: PreparedLog, folder: Path) -> tuple[list[float], list[float]]:
    whole, ranking = _loop(arm, log)
    expected = _losses(whole, ranking, log, STEPS)
    with CheckpointManager(folder / "checkpoints") as manager:
        loop, ranking = _loop(arm, log, manager)
        before = _losses(loop, ranking, log, 7)
        again, ranking = _loop(arm, log, manager)
        assert again.resume().step == 7
        return expected, before + _losses(again, ranking, log, STEPS)


def test_a_resumed_run_repeats_the_uninterrupted_one_exactly(tmp_path: Path) -> None:
    log = small_log(tmp_path)
    for expected, found in run_ranks(_resume, 2, "hashed_prefix", log, tmp_path):
        assert found == expected
