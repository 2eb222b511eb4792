"""The registered operator ``torchrec_sid::similarity_features``, and its plain PyTorch form."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchrec_sid.errors import SidError
from torchrec_sid.side.kernels import similarity_cpu
from torchrec_sid.side.kernels.attention_problem import check_lengths
from torchrec_sid.side.kernels.ragged import Tile, group_users, tiles
from torchrec_sid.side.kernels.similarity_problem import SimilarityProblem

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
) -> Tensor:
    """Pooled cosines ``[U, m, n]`` float32; see :class:`SimilarityProblem` for the arguments.

    Raises:
        SidError: lengths that do not sum, codes outside the alphabet.
    """
    problem = SimilarityProblem(
        candidates,
        events,
        lengths,
        labels,
        table,
        match,
        tuple(levels),
        tuple(values),
        tuple(temperatures),
        bins,
        prefix,
    )
    reason = similarity_cpu.unavailable(problem)
    if backend == "cpu" and reason:
        raise SidError("backend", f"'cpu' cannot be used: {reason}", "Choose 'auto'.")
    host_lengths = lengths.tolist()
    check_lengths(host_lengths, events.shape[0])
    if match.shape[0] == 0:
        problem.check_codes()
    if backend == "cpu" or (backend == "auto" and not reason):
        features = similarity_cpu.forward(problem)
    else:
        features = plain_similarity(problem, host_lengths)
    if not features.is_cuda and bool(features.isnan().any()):
        problem.check_codes()
    return features


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
) -> Tensor:
    count = 2 + len(temperatures) * (1 if labels is None else 2) + (0 if labels is None else 3) + bins
    return table.new_empty(candidates.shape[0], candidates.shape[1], count)


def plain_similarity(problem: SimilarityProblem, lengths: list[int]) -> Tensor:
    """The features in plain PyTorch, tile by tile; cost follows the events."""
    users, m = problem.candidates.shape[:2]
    candidates = _unit(_decode(problem, problem.candidates))
    sums = problem.table.new_zeros(users, m, problem.num_sums)
    maxima = problem.table.new_full((users, m, problem.num_maxima), -1.0)
    rank = problem.table.shape[1]
    size = max(64, _TILE_FLOATS // (2 * rank + 4 * m))
    for group in group_users(lengths, size):
        at = group.user_index
        for tile in tiles(group, size):
            tile_sums, tile_maxima = _pool(problem, tile, candidates[at], problem.candidates[at])
            sums[at] += tile_sums
            maxima[at] = torch.maximum(maxima[at], tile_maxima)
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
    problem: SimilarityProblem, tile: Tile, candidates: Tensor, columns: Tensor
) -> tuple[Tensor, Tensor]:
    """Sums and maxima of a tile: ``[g, m, num_sums]`` and ``[g, m, num_maxima]``."""
    events = tile.read(problem.events)
    valid = tile.valid(events.device)
    cosine = candidates @ _unit(_decode(problem, events)).transpose(1, 2)
    keep = torch.ones_like(cosine[:, :1]) if valid is None else valid.unsqueeze(1).to(cosine.dtype)
    cosine = cosine * keep
    weights = [(t * (cosine - 1)).exp() * keep for t in problem.temperatures]
    sums = [keep.expand_as(cosine), cosine, *weights]
    hidden = [keep > 0]
    if problem.labels is not None:
        label = tile.read(problem.labels).unsqueeze(1)
        sums += [*(w * label for w in weights), cosine * label]
        hidden += [hidden[0] & (label > 0), hidden[0] & (label < 0)]
    maxima = [cosine.masked_fill(~mask, -1.0).amax(-1) for mask in hidden]
    if problem.bins:
        agreement = problem.bin_of(_agreement(problem, columns, events))
        sums += [(agreement == i) * keep for i in range(problem.bins)]
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
