"""NE, AUC, calibration and logloss by slice, computed by `torchrec.metrics`.

A slice is one TorchRec task whose weights are zero outside it, so that all of them share one code
path and one synchronisation, and their state goes through `state_dict` like any metric's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torchrec.metrics.auc import AUCMetric
from torchrec.metrics.calibration import CalibrationMetric
from torchrec.metrics.metrics_config import RecTaskInfo
from torchrec.metrics.ne import NEMetric
from torchrec.metrics.rec_metric import RecMetric

from torchrec_sid.data.prepared import SEGMENTS
from torchrec_sid.parallel.ranks import Ranks

SLICES: dict[str, tuple[str, ...]] = {
    "all": SEGMENTS,
    "warm": ("head", "torso", "tail"),
    "cold": ("cold",),
    "head": ("head",),
    "torso": ("torso",),
    "tail": ("tail",),
}
"""Slice name -> the popularity segments that it covers."""


@dataclass(frozen=True)
class SliceMetrics:
    """The metrics of one slice; None where the slice has no row or a single label."""

    rows: int
    """Rows counted, padding excluded."""
    ne: float | None
    """Normalized entropy: cross-entropy / entropy of the slice's own base rate."""
    auc: float | None
    """Area under the ROC curve."""
    calibration: float | None
    """Mean prediction / mean label."""
    logloss: float | None
    """Cross-entropy in nats."""


class SlicedMetrics(nn.Module):
    """Accumulates predictions over an evaluation and computes every metric by slice.

    AUC is exact: it keeps every prediction of each slice, 16 bytes a row and slice, on the device.

    Args:
        rows: upper bound of the rows over all ranks, padding included.
        batch_size: rows per rank and update.
        ranks: the processes that share the evaluation; None: this one alone.
        slices: slice name -> segments; :data:`SLICES` by default.
        segments: names of the values of ``segment``.
        device: where the state lives.

    Example:
        >>> metrics = SlicedMetrics(rows=4, batch_size=4)
        >>> metrics.update(
        ...     predictions=torch.tensor([0.9, 0.2, 0.7, 0.4]),
        ...     labels=torch.tensor([1.0, 0.0, 1.0, 0.0]),
        ...     weights=torch.ones(4),
        ...     segment=torch.zeros(4, dtype=torch.int64),
        ... )
        >>> metrics.compute()["all"].auc
        1.0
    """

    def __init__(
        self,
        rows: int,
        batch_size: int,
        ranks: Ranks | None = None,
        slices: Mapping[str, tuple[str, ...]] = SLICES,
        segments: Sequence[str] = SEGMENTS,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.slices = dict(slices)
        self.ranks = ranks or Ranks(None, 0, 1)
        tasks = [
            RecTaskInfo(name=name, label_name=name, prediction_name=name, weight_name=name)
            for name in self.slices
        ]
        # The window must hold the whole evaluation: AUC is computed over it.
        window = max(rows, batch_size * self.ranks.size)
        common = {
            "world_size": self.ranks.size,
            "my_rank": self.ranks.rank,
            "batch_size": batch_size,
            "tasks": tasks,
            "window_size": window,
            "compute_on_all_ranks": True,
        }
        self.metrics = nn.ModuleDict(
            {
                "ne": NEMetric(**common, include_logloss=True),
                "auc": AUCMetric(**common),
                "calibration": CalibrationMetric(**common),
            }
        ).to(device)
        members = torch.zeros(len(self.slices), len(segments), device=device)
        for row, names in enumerate(self.slices.values()):
            members[row, [segments.index(name) for name in names]] = 1.0
        self.register_buffer("members", members, persistent=False)
        self.members: Tensor
        # Weight of negatives and positives per slice.
        self.register_buffer("counts", torch.zeros(len(self.slices), 2, dtype=torch.float64, device=device))
        self.counts: Tensor

    def update(self, *, predictions: Tensor, labels: Tensor, weights: Tensor, segment: Tensor) -> None:
        """Add one batch.

        Args:
            predictions: ``[B]`` float probabilities.
            labels: ``[B]`` float, 0 or 1.
            weights: ``[B]`` float, 0 for padding.
            segment: ``[B]`` int64, a position in ``segments`` each; of padding any.
        """
        inside = self.members[:, segment] * weights
        by_label = torch.stack([1 - labels, labels], dim=1)
        self.counts += (inside @ by_label).double()
        names = list(self.slices)
        batch = {
            "predictions": dict.fromkeys(names, predictions.detach().double()),
            "labels": dict.fromkeys(names, labels.double()),
            "weights": {name: inside[i].double() for i, name in enumerate(names)},
        }
        for metric in self.metrics.values():
            cast(RecMetric, metric).update(**batch)

    def compute(self) -> dict[str, SliceMetrics]:
        """Synchronise over the ranks and return slice name -> metrics, the same on every rank."""
        values: dict[str, float] = {}
        for metric in self.metrics.values():
            values.update({key: float(value) for key, value in cast(RecMetric, metric).compute().items()})
        counts = self.ranks.sum(self.counts)
        return {
            name: _slice_metrics(values, name, *map(float, counts[row]))
            for row, name in enumerate(self.slices)
        }


def _slice_metrics(
    values: Mapping[str, float], name: str, negatives: float, positives: float
) -> SliceMetrics:
    def value(kind: str, metric: str, window: str) -> float | None:
        if not positives or not negatives:
            return None
        found = values[f"{kind}-{name}|{window}_{metric}"]
        return found if math.isfinite(found) else None

    logloss = value("ne", "logloss", "lifetime")
    return SliceMetrics(
        rows=round(positives + negatives),
        ne=value("ne", "ne", "lifetime"),
        auc=value("auc", "auc", "window"),
        calibration=value("calibration", "calibration", "lifetime"),
        # TorchRec's logloss is in bits.
        logloss=None if logloss is None else logloss * math.log(2),
    )
