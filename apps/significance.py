"""Intervals of a comparison: what users, drawn again, say of the NE and the gain of every row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from torchrec_sid.artifact import load_artifact
from torchrec_sid.bootstrap import Interval, UserBootstrap, cross_entropy, normalized_entropy
from torchrec_sid.data.prepared import SEGMENTS
from torchrec_sid.errors import SidError
from torchrec_sid.metrics import SLICES
from torchrec_sid.training.run import PREDICTIONS, PREDICTIONS_VERSION

from .rows import Comparison

Array = np.ndarray[Any, Any]
TESTED = ("all", "warm", "cold")
"""Slices that get intervals."""


class Predicted(NamedTuple):
    """What one training predicts for the evaluated split, all ranks."""

    logits: Array
    """``[rows]`` float64, of the first task."""
    labels: Array
    weights: Array
    segments: Array
    """``[rows]`` positions in SEGMENTS."""
    users: Array

    @classmethod
    def read(cls, run: Path) -> Predicted | None:
        """Of a run directory; None where the run kept none, or those of an earlier release."""
        parts: list[Mapping[str, Any]] = []
        while (file := run / f"predictions-rank-{len(parts)}.safetensors").is_file():
            tensors = load_artifact(file, kind=PREDICTIONS, version=PREDICTIONS_VERSION).tensors
            if "logits" not in tensors:
                return None
            parts.append(tensors)
        if not parts:
            return None

        def whole(name: str) -> Array:
            rows = np.concatenate([part[name].numpy() for part in parts])
            return rows if rows.ndim == 1 else rows[:, 0]

        return cls(
            whole("logits").astype(np.float64),
            *(whole(name) for name in ("labels", "weights", "segments", "users")),
        )


def intervals(
    comparison: Comparison, runs: Mapping[str, Sequence[Path]], draws: int = 2000
) -> dict[str, Any]:
    """Row name -> ``ne``, ``gain``, ``cold_over_none``, ``cold_over_features``: slice -> interval.

    Gains are in percent.

    An interval is ``{"estimate", "low", "high", "p"}`` or None. Gains are ``1 - NE / NE of the other row``,
    paired by example and by seed, the mean over seeds; users and seeds are resampled
    (:class:`~torchrec_sid.bootstrap.UserBootstrap`). Empty where a run of a row has no predictions.

    Raises:
        SidError: rows that were not evaluated on the same examples.
    """
    predicted: dict[str, list[Predicted]] = {}
    for name, mine in runs.items():
        read = [Predicted.read(run) for run in mine]
        predicted[name] = [each for each in read if each is not None]
        if len(predicted[name]) < len(mine):
            return {}
    first = next(iter(predicted.values()))[0]
    for name, trainings in predicted.items():
        for seed, each in enumerate(trainings):
            if not all(np.array_equal(a, b) for a, b in zip(each[1:], first[1:], strict=True)):
                raise SidError(
                    f"row {name!r}, seed {seed}",
                    "was evaluated on other examples than the first row",
                    "Compare rows of one log, split and number of processes.",
                )
    resampled = _Resampled(first, predicted, draws)
    found: dict[str, Any] = {}
    for row in comparison.rows:
        name = row.name
        of_row: dict[str, dict[str, Interval | None]] = {
            "ne": {piece: resampled.ne(name, piece) for piece in TESTED},
            "gain": {piece: resampled.gain(name, comparison.against(row), piece) for piece in TESTED},
        }
        for key, floor in (
            ("cold_over_none", comparison.none),
            ("cold_over_features", comparison.features),
        ):
            of_row[key] = {"cold": resampled.gain(name, floor, "cold") if floor else None}
        found[name] = {
            key: {piece: _plain(each) for piece, each in parts.items()} for key, parts in of_row.items()
        }
    return found


class _Resampled:
    """Sums of every row, seed and slice, over the same draws."""

    def __init__(self, first: Predicted, predicted: Mapping[str, Sequence[Predicted]], draws: int) -> None:
        self.bootstrap = UserBootstrap(first.users, draws)
        self.seeds = {name: len(mine) for name, mine in predicted.items()}
        values: dict[str, Array] = {}
        for piece in TESTED:
            inside = np.isin(first.segments, [SEGMENTS.index(name) for name in SLICES[piece]])
            weights = first.weights * inside
            values[f"{piece} weight"] = weights
            values[f"{piece} positives"] = weights * first.labels
            for name, mine in predicted.items():
                for seed, each in enumerate(mine):
                    loss = cross_entropy(each.logits, each.labels)
                    values[f"{piece} loss {seed} {name}"] = weights * loss
        self.sums = self.bootstrap.sums(values)

    def ne(self, name: str, piece: str) -> Interval | None:
        """NE of a row on a slice."""
        positives, weight = self.sums[f"{piece} positives"], self.sums[f"{piece} weight"]
        return self._over_seeds(
            [normalized_entropy(loss, positives, weight) for loss in self._losses(name, piece)]
        )

    def gain(self, name: str, against: str, piece: str) -> Interval | None:
        """Gain of a row over another: both have the same entropy, which cancels."""
        pairs = zip(self._losses(name, piece), self._losses(against, piece), strict=True)
        with np.errstate(divide="ignore", invalid="ignore"):
            return self._over_seeds([100 * (1 - mine / other) for mine, other in pairs])

    def _losses(self, name: str, piece: str) -> list[Array]:
        return [self.sums[f"{piece} loss {seed} {name}"] for seed in range(self.seeds[name])]

    def _over_seeds(self, values: Sequence[Array]) -> Interval | None:
        return self.bootstrap.interval(self.bootstrap.over_seeds(values))


def _plain(interval: Interval | None) -> dict[str, float] | None:
    return None if interval is None else interval._asdict()
