"""What the training loop itself costs: the time of a step in which nothing is trained."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchrec.optim.keyed import KeyedOptimizerWrapper

from torchrec_sid.models.dlrm import RankingOutput
from torchrec_sid.training.loop import TrainingLoop
from torchrec_sid.training.progress_line import TrainingProgress
from torchrec_sid.training.recorder import StepRecorder
from torchrec_sid.training.schedule import RateSchedule


class _Still:
    """A pipeline that takes a batch and returns what it always returns."""

    def __init__(self, rows: int) -> None:
        ones = torch.ones(rows)
        self.output = RankingOutput(torch.tensor(0.5), ones, ones, ones, ones.long())

    def progress(self, batches: Iterator[Any]) -> RankingOutput:
        next(batches)
        return self.output


def loop_cost_us(folder: Path, steps: int = 20_000, rows: int = 512) -> float:
    """Microseconds of CPU time per step of all that our loop does beside training.

    Args:
        folder: where TensorBoard may write.
        steps: of either loop.
        rows: of a batch.
    """
    model = nn.Linear(1, 1)
    optimizer = KeyedOptimizerWrapper(dict(model.named_parameters()), lambda p: torch.optim.Adam(p))
    loop = TrainingLoop(model, optimizer, torch.device("cpu"), pipelined=False)
    still: Any = _Still(rows)
    loop.pipeline = still
    batches: Any = range(steps)
    schedule = RateSchedule(optimizer.param_groups, steps)
    recorder, progress = StepRecorder(folder, 0), TrainingProgress(steps, every_seconds=3600)
    started = time.process_time()
    loop.train(lambda epoch, start: batches, 1, progress=progress, on_step=recorder, schedule=schedule.set)
    ours = time.process_time() - started
    iterator = iter(range(steps))
    started = time.process_time()
    for _ in range(steps):
        still.progress(iterator)
    return (ours - (time.process_time() - started)) / steps * 1e6
