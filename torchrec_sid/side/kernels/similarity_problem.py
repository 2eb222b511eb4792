"""`SimilarityProblem`: the inputs of the similarity features, and what their sums mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from torchrec_sid.errors import SidError
from torchrec_sid.side.kernels.arguments import INTEGERS, check_columns, check_number, check_tensor

HOTTEST = 43.0
"""exp(-2 t) must stay a normal float32, which spares a search for the maximum."""


class SimilarityProblem(NamedTuple):
    """Inputs; U users, C candidates of all users, E events, S columns, r coordinates."""

    candidates: Tensor
    """``[C, S]`` columns, like events, user after user."""
    events: Tensor
    """``[E, S]`` uint8, or int32 where a column needs more than a byte."""
    lengths: Tensor
    """``[U]`` int64 that sum to E."""
    counts: Tensor
    """``[U]`` int64 that sum to C."""
    limits: Tensor | None
    """``[C]`` int64: a candidate sees that many events of its user, from the first; None: all."""
    multiplicity: Tensor | None
    """``[E]`` float32 above 0: how many equal events each stands for; None: 1."""
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
            check_columns(where, data, self.values, "Encode with the quantizer of this spec.")

    def bin_of(self, agreement: Tensor) -> Tensor:
        """Bin of a number of agreeing levels: ``min(bins - 1, floor(bins * agreement / levels))``."""
        return (agreement * self.bins // sum(self.levels)).clamp_max(self.bins - 1)

    def finish(self, sums: Tensor, maxima: Tensor) -> Tensor:
        """Sums ``[C, num_sums]`` and maxima ``[C, num_maxima]`` -> features ``[C, n]``."""
        return features_of_sums(sums, maxima, self.temperatures, self.labels is not None)


def features_of_sums(sums: Tensor, maxima: Tensor, temperatures: Sequence[float], labelled: bool) -> Tensor:
    """Sums and maxima over events -> features, in the order of ``SimilarityConfig.names``.

    Args:
        sums: ``[C, n]``: events, similarity, weights ``exp(t (similarity - 1))`` by temperature; where
            labelled, these weights times label, similarity times label; then events by bin.
        maxima: ``[C, 1]``, or ``[C, 3]`` where labelled: over all events, liked, disliked; -1 without any.
        temperatures: t.
        labelled: whether events have labels.
    """
    hot = len(temperatures)
    count = torch.where(sums[..., :1] > 0, sums[..., :1], 1.0)
    weights = sums[..., 2 : 2 + hot]
    tiny = torch.finfo(sums.dtype).tiny
    soft = 1 + (weights / count).clamp_min(tiny).log() / torch.tensor(temperatures, device=sums.device)
    soft = torch.where(sums[..., :1] == 0, -1.0, soft)
    parts = [maxima[..., :1], sums[..., 1:2] / count, soft]
    at = 2 + hot
    if labelled:
        parts += [
            sums[..., at : at + hot] / weights.clamp_min(tiny),
            sums[..., at + hot : at + hot + 1] / count,
            maxima[..., 1:],
        ]
        at += hot + 1
    return torch.cat([*parts, sums[..., at:] / count], dim=-1)


def checked_problem(
    candidates: Tensor,
    events: Tensor,
    lengths: Tensor,
    labels: Tensor | None,
    table: Tensor,
    match: Tensor,
    levels: Sequence[int],
    values: Sequence[int],
    temperatures: Sequence[float],
    bins: int,
    prefix: bool,
    counts: Tensor | None,
    limits: Tensor | None,
    multiplicity: Tensor | None,
) -> SimilarityProblem:
    """The arguments of the operator as a problem.

    Raises:
        SidError: naming an argument that no backend could read. Codes, lengths, counts and limits are not
            looked at by value.
    """
    device, columns, float32 = table.device, len(values), (torch.float32,)
    in_bytes = match.dim() == 3 and match.shape[0] > 0
    check_number("columns", columns, 1)
    for value in values:
        check_number("values", value, 1, 256 if in_bytes else 2**31)
    if len(levels) != columns:
        raise SidError("levels", f"{len(levels)} for {columns} columns", "Pass one number per column.")
    for level in levels:
        check_number("levels", level, 1, 255 if in_bytes else 1)
    for temperature in temperatures:
        if not 0 < temperature <= HOTTEST:
            raise SidError("temperatures", f"{temperature:g}", f"Choose above 0, at most {HOTTEST:g}.")
    check_number("bins", bins, 0, 64)
    rows = 256 * columns if in_bytes else sum(values)
    table = check_tensor("table", table, float32, (rows, "rank"), device)
    check_number("rank of the table", table.shape[1], 1)
    kind = (torch.uint8,) if in_bytes else (torch.uint8, torch.int32)
    tables = 1 if in_bytes and match.shape[0] == 1 else columns if in_bytes else 0
    match = check_tensor("match", match, (torch.uint8,), (tables, 256, 256), device)
    if in_bytes:
        most = torch.tensor(levels if tables > 1 else [min(levels)], device=device)
        bad = match.flatten(1).amax(1) > most
        if bool(bad.any()):
            column = int(bad.nonzero()[0])
            raise SidError(
                "match",
                f"{int(match[column].max())} in column {column} of {int(most[column])} levels",
                "Two bytes agree at no more levels than their column has.",
            )
    users = lengths.shape[0] if lengths.dim() else 0
    axes = (users, "candidates", columns) if counts is None else ("candidates", columns)
    candidates = check_tensor("candidate_bytes", candidates, kind, axes, device)
    if counts is None:
        per_user = lengths.new_full((users,), candidates.shape[1], dtype=torch.int64)
    else:
        per_user = check_tensor("counts", counts, INTEGERS, (users,), device).to(torch.int64)
    candidates = candidates.flatten(0, -2)
    events = check_tensor("history_bytes", events, (candidates.dtype,), ("events", columns), device)
    lengths = check_tensor("lengths", lengths, INTEGERS, (users,), device).to(torch.int64)
    if labels is not None:
        labels = check_tensor("labels", labels, float32, (len(events),), device)
    if multiplicity is not None:
        multiplicity = check_tensor("multiplicity", multiplicity, float32, (len(events),), device)
    if limits is not None:
        limits = check_tensor("limits", limits, INTEGERS, (len(candidates),), device).to(torch.int64)
    return SimilarityProblem(
        candidates,
        events,
        lengths,
        per_user,
        limits,
        multiplicity,
        labels,
        table,
        match,
        tuple(levels),
        tuple(values),
        tuple(temperatures),
        bins,
        prefix,
    )
