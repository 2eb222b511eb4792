"""What is measured of a prepared log before a model is built, of the first rows of training alone."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torchrec_sid.data.batch import BatchConfig, RankingBatch
from torchrec_sid.data.prepared import PreparedLog
from torchrec_sid.data.reader import BatchReader

_ROWS, _EVENTS = 16_384, 64


class LogStatistics(NamedTuple):
    """Of the first training rows."""

    action_values: Tensor
    """``[actions]`` float32, see :func:`action_values`."""
    dense: Tensor
    """``[2, F]`` mean and standard deviation of the dense features."""


def measure_log(log: PreparedLog) -> LogStatistics:
    """Measure the first training rows of a log and the last events of their histories."""
    first = _first_rows(log, _ROWS, _EVENTS)
    actions = first.features["history_action"].values()
    dense = torch.stack([first.dense.mean(0), first.dense.std(0, correction=0)])
    return LogStatistics(action_values(actions, log.actions), dense)


def mean_history(log: PreparedLog, history_length: int) -> float:
    """Mean events per example, cut to ``history_length``, in the first training rows: for the planner."""
    if not history_length:
        return 0.0
    return float(_first_rows(log, 4096, history_length).history_lengths.double().mean())


def action_values(actions: Tensor, count: int) -> Tensor:
    """Deviation of each action from the mean action that occurs, scaled to -1 .. 1.

    Actions are numbers on a scale (a rating, 0 and 1 for a view and a click). Where all events have the
    same one, each speaks for its item.

    Args:
        actions: ``[n]`` int64, those that occurred.
        count: number of distinct actions.

    Returns:
        ``[count]`` float32.
    """
    scale = torch.arange(count, dtype=torch.float32)
    if not len(actions) or bool((actions == actions[0]).all()):
        return torch.ones(count)
    deviation = scale - actions.float().mean()
    seen = torch.bincount(actions, minlength=count) > 0
    return (deviation / deviation[seen].abs().max()).clamp(-1, 1)


def _first_rows(log: PreparedLog, rows: int, history_length: int) -> RankingBatch:
    batch = BatchConfig(min(rows, log.rows("train")), history_length, ("history_action",))
    return next(iter(BatchReader(log, "train", batch)))
