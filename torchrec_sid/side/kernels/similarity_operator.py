"""The registered operator ``torchrec_sid::similarity_features``, and its plain PyTorch form."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchrec_sid.errors import SidError
from torchrec_sid.side.kernels import similarity_cpu
from torchrec_sid.side.kernels.arguments import (
    check_counts,
    check_lengths,
    check_limits,
    check_multiplicity,
)
from torchrec_sid.side.kernels.ragged import Tile, group_users, tiles
from torchrec_sid.side.kernels.similarity_problem import SimilarityProblem, checked_problem

# Floats that a tile may hold, as in attention_torch.py.
_TILE_FLOATS = 1 << 19


@torch.library.custom_op("torchrec_sid::similarity_features", mutates_args=())
def similarity_features(
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
    backend: str,
    counts: Tensor | None = None,
    limits: Tensor | None = None,
    multiplicity: Tensor | None = None,
) -> Tensor:
    """Pooled cosines ``[U, m, n]`` float32, or ``[C, n]`` with ``counts``.

    Args:
        candidates: ``[U, m, S]`` columns, like events; with ``counts`` ``[C, S]``.
        events, lengths, labels, table, match, levels, values, temperatures, bins, prefix: see
            :class:`SimilarityProblem`.
        backend: ``auto``, ``cpu`` or ``torch``.
        counts: ``[U]`` integers, candidates of each user; they sum to C.
        limits: one integer per candidate: events of its user that it sees, from the first.
        multiplicity: ``[E]`` float32 above 0: how many equal events each stands for.

    Raises:
        SidError: arguments of another type or shape, lengths that do not sum, codes outside the alphabet.
    """
    problem = checked_problem(
        candidates,
        events,
        lengths,
        labels,
        table,
        match,
        levels,
        values,
        temperatures,
        bins,
        prefix,
        counts,
        limits,
        multiplicity,
    )
    reason = similarity_cpu.unavailable(problem)
    if backend not in ("auto", "cpu", "torch"):
        raise SidError("backend", repr(backend), "Choose one of auto, cpu, torch.")
    if backend == "cpu" and reason:
        raise SidError("backend", f"'cpu' cannot be used: {reason}", "Choose 'auto'.")
    check_lengths(problem.lengths.tolist(), len(problem.events))
    check_counts(problem.counts.tolist(), len(problem.candidates))
    if problem.limits is not None:
        check_limits(problem.limits, problem.lengths, problem.counts)
    if problem.multiplicity is not None:
        check_multiplicity(problem.multiplicity)
    if not problem.table.is_cuda or problem.match.shape[0] == 0:
        problem.check_codes()
    if backend == "cpu" or (backend == "auto" and not reason):
        features = similarity_cpu.forward(problem)
    else:
        features = plain_similarity(problem)
    return features.view(*candidates.shape[:-1], features.shape[1])


@similarity_features.register_fake
def _(
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
    backend: str,
    counts: Tensor | None = None,
    limits: Tensor | None = None,
    multiplicity: Tensor | None = None,
) -> Tensor:
    count = 2 + len(temperatures) * (1 if labels is None else 2) + (0 if labels is None else 3) + bins
    return table.new_empty(*candidates.shape[:-1], count)


def plain_similarity(problem: SimilarityProblem) -> Tensor:
    """The features in plain PyTorch, tile by tile; cost follows the events."""
    counts = problem.counts.tolist()
    candidates = _unit(_decode(problem, problem.candidates))
    sums = problem.table.new_zeros(len(candidates), problem.num_sums)
    maxima = problem.table.new_full((len(candidates), problem.num_maxima), -1.0)
    size = max(64, _TILE_FLOATS // (2 * problem.table.shape[1] + 4 * max(counts, default=0)))
    for group in group_users(problem.lengths.tolist(), counts, size):
        wanted, columns = group.take(candidates), group.take(problem.candidates)
        limits = None if problem.limits is None else group.take(problem.limits)
        total, largest = group.take(sums), group.take(maxima)
        for tile in tiles(group, size):
            tile_sums, tile_maxima = _pool(problem, tile, wanted, columns, limits)
            total, largest = total + tile_sums, torch.maximum(largest, tile_maxima)
        group.put(sums, total)
        group.put(maxima, largest)
    return problem.finish(sums, maxima)


def _decode(problem: SimilarityProblem, columns: Tensor) -> Tensor:
    """Columns ``[..., S]`` -> coordinates ``[..., r]``."""
    index = columns.to(torch.int32) + problem.starts()
    shape = (*columns.shape[:-1], problem.table.shape[1])
    return torch.nn.functional.embedding_bag(index.flatten(0, -2), problem.table, mode="sum").view(shape)


def _unit(x: Tensor) -> Tensor:
    # A zero vector (all digits at the centre) has cosine 0 with everything.
    norm = x.norm(dim=-1, keepdim=True)
    return x / torch.where(norm > 0, norm, torch.where(norm.isnan(), norm, 1.0))


def _pool(
    problem: SimilarityProblem, tile: Tile, candidates: Tensor, columns: Tensor, limits: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Sums and maxima of a tile: ``[g, m, num_sums]`` and ``[g, m, num_maxima]``."""
    events = tile.read(problem.events)
    cosine = candidates @ _unit(_decode(problem, events)).transpose(1, 2)
    seen = tile.seen(limits, events.device)
    if seen is None:
        seen = torch.ones_like(cosine[:, :1], dtype=torch.bool)
    times = seen.to(cosine.dtype)
    if problem.multiplicity is not None:
        times = times * tile.read(problem.multiplicity).unsqueeze(1)
    weights = [(t * (cosine - 1)).exp() * times for t in problem.temperatures]
    sums = [times.expand_as(cosine), cosine * times, *weights]
    hidden = [seen]
    if problem.labels is not None:
        label = tile.read(problem.labels).unsqueeze(1)
        sums += [*(w * label for w in weights), cosine * times * label]
        hidden += [seen & (label > 0), seen & (label < 0)]
    maxima = [cosine.masked_fill(~mask, -1.0).amax(-1) for mask in hidden]
    if problem.bins:
        agreement = problem.bin_of(_agreement(problem, columns, events))
        sums += [(agreement == i) * times for i in range(problem.bins)]
    return torch.stack([s.sum(-1) for s in sums], -1), torch.stack(maxima, -1)


def _agreement(problem: SimilarityProblem, candidates: Tensor, events: Tensor) -> Tensor:
    """``[g, m, n]`` int64: levels at which candidates ``[g, m, S]`` and events ``[g, n, S]`` agree."""
    total = torch.zeros(candidates.shape[0], candidates.shape[1], events.shape[1], dtype=torch.int64)
    total = total.to(events.device)
    going = torch.ones_like(total, dtype=torch.bool)
    for column, count in enumerate(problem.levels):
        a, b = candidates[..., column].unsqueeze(2), events[..., column].unsqueeze(1)
        if problem.match.shape[0]:
            same = problem.match[column if problem.match.shape[0] > 1 else 0][a.long(), b.long()].long()
        else:
            same = (a == b).long()
        total += same * going
        if problem.prefix:
            going = going & (same == count)
    return total
