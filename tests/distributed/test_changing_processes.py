"""A ranking model whose number of processes changes at checkpoints, and one whose ranks are uneven."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.distributed.launch import run_ranks
from tests.distributed.test_training_parity import (
    EPOCHS,
    GLOBAL_BATCH,
    STEPS,
    _epoch,
    _loop,
    _losses,
    _read,
)
from tests.logs import small_log
from torchrec_sid.data.prepared import PreparedLog
from torchrec_sid.errors import SidError
from torchrec_sid.parallel.checkpoint import CheckpointManager

WORLDS = (2, 1, 4, 2)


def _leg(log: PreparedLog, folder: Path, steps: int) -> list[float]:
    """Train on to ``steps`` in all; the mean losses over the ranks."""
    with CheckpointManager(folder) as manager:
        loop, ranking = _loop("hashed_prefix", log, manager)
        loop.resume()
        losses = torch.tensor(_losses(loop, ranking, log, steps), dtype=torch.float64)
    dist.all_reduce(losses)
    return (losses / dist.get_world_size()).tolist()


def test_losses_continue_over_2_1_4_and_2_processes(tmp_path: Path) -> None:
    log = small_log(tmp_path)
    expected = run_ranks(_leg, 2, log, tmp_path / "whole", STEPS)[0]
    found: list[float] = []
    for leg, world in enumerate(WORLDS, 1):
        # In the middle of epochs: 3 of 15 steps in each.
        found += run_ranks(_leg, world, log, tmp_path / "changing", STEPS * leg // len(WORLDS))[0]
    assert len(found) == len(expected) == STEPS
    assert found == pytest.approx(expected, abs=1e-6)
    assert expected[-1] < expected[0] - 0.0003, "it learns nothing"


def _uneven(log: PreparedLog) -> tuple[list[float], int, str]:
    """Rank 1 has one batch less in every epoch."""
    loop, ranking = _loop("hashed_prefix", log)
    fewer = dist.get_rank()
    losses: list[float] = []
    result = loop.train(
        lambda epoch, start: _epoch(log, ranking, start)[fewer:],
        epochs=EPOCHS,
        on_step=lambda step, output: losses.append(float(output.loss)),
    )
    batches = list(_read(log, ranking, "test"))[fewer:]
    try:
        loop.evaluate(batches, GLOBAL_BATCH // 2, 2)
        said = "nothing"
    except SidError as error:
        said = str(error)
    return losses, result.position.step, said


def test_a_rank_with_fewer_batches_does_not_hang_the_others(tmp_path: Path) -> None:
    log = small_log(tmp_path)
    for losses, steps, said in run_ranks(_uneven, 2, log):
        assert steps == len(losses) == STEPS - EPOCHS
        assert "by rank" in said
        assert "Pad with rows of weight 0" in said
