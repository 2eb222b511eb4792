"""`SimilarityProblem`: the inputs of the similarity features, and what their sums mean."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torchrec_sid.errors import SidError


class SimilarityProblem(NamedTuple):
    """Inputs; U users, m candidates each, E events, S columns, r coordinates."""

    candidates: Tensor
    """``[U, m, S]`` columns, like events."""
    events: Tensor
    """``[E, S]`` uint8, or int32 where a column needs more than a byte."""
    lengths: Tensor
    """``[U]``."""
    labels: Tensor | None
    """``[E]`` float32."""
    table: Tensor
    """``[S * 256, r]`` float32 (or all values of all columns, where events are int32)."""
    match: Tensor
    """``[S or 1, 256, 256]`` uint8: levels at which two bytes of a column agree; empty for int32 events."""
    levels: tuple[int, ...]
    """Levels per column."""
    values: tuple[int, ...]
    """Values of each column."""
    temperatures: tuple[float, ...]
    bins: int
    prefix: bool

    @property
    def num_sums(self) -> int:
        """Sums per candidate: events, cosine, weights; labelled weights and cosine; bins."""
        hot = len(self.temperatures)
        return 2 + hot + (0 if self.labels is None else hot + 1) + self.bins

    @property
    def num_maxima(self) -> int:
        """Maxima per candidate: all, liked, disliked."""
        return 1 if self.labels is None else 3

    @property
    def num_features(self) -> int:
        """n, features per candidate."""
        return self.num_sums - 1 + self.num_maxima

    def starts(self) -> Tensor:
        """``[S]`` int32: first table row of each column."""
        sizes = [256] * len(self.values) if self.match.shape[0] else list(self.values)
        starts = [sum(sizes[:column]) for column in range(len(sizes))]
        return torch.tensor(starts, dtype=torch.int32, device=self.table.device)

    def check_codes(self) -> None:
        """Raise SidError naming the first candidate or event outside the alphabet."""
        for where, data in (("candidate_bytes", self.candidates), ("history_bytes", self.events)):
            columns = data.flatten(0, -2)
            bad = columns.to(torch.int32) >= torch.tensor(self.values, device=data.device)
            if bool(bad.any()):
                row, column = (int(i) for i in bad.nonzero()[0])
                raise SidError(
                    where,
                    f"value {int(columns[row, column])} in column {column} of row {row}, "
                    f"outside 0..{self.values[column] - 1}",
                    "Encode with the quantizer of this spec.",
                )

    def bin_of(self, agreement: Tensor) -> Tensor:
        """Bin of a number of agreeing levels: ``min(bins - 1, floor(bins * agreement / levels))``."""
        return (agreement * self.bins // sum(self.levels)).clamp_max(self.bins - 1)

    def finish(self, sums: Tensor, maxima: Tensor) -> Tensor:
        """Sums ``[U, m, num_sums]`` and maxima ``[U, m, num_maxima]`` -> features ``[U, m, n]``."""
        hot = len(self.temperatures)
        count = sums[..., :1].clamp_min(1)
        weights = sums[..., 2 : 2 + hot]
        temperatures = torch.tensor(self.temperatures, device=sums.device)
        tiny = torch.finfo(sums.dtype).tiny
        soft = 1 + (weights / count).clamp_min(tiny).log() / temperatures
        soft = torch.where(sums[..., :1] == 0, -1.0, soft)
        parts = [maxima[..., :1], sums[..., 1:2] / count, soft]
        at = 2 + hot
        if self.labels is not None:
            parts += [
                sums[..., at : at + hot] / weights.clamp_min(tiny),
                sums[..., at + hot : at + hot + 1] / count,
                maxima[..., 1:],
            ]
            at += hot + 1
        return torch.cat([*parts, sums[..., at:] / count], dim=-1)
