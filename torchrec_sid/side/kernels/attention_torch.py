"""Code-space attention in plain PyTorch: any device, float32 or float64, tile by tile from packed bytes.

A tile of events is unpacked to its digit features once, scored and summed by two small matrix products,
and dropped; long histories go through several tiles with a running softmax, so that the floats held at any
time are bounded whatever the lengths. One-hot columns (event terms, codebook indices) are never unpacked:
their scores are gathered and their weights added up per value.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torchrec_sid.side.kernels.attention_problem import AttentionOutput, AttentionProblem, Gradients
from torchrec_sid.side.kernels.ragged import Group, Tile, group_users, tiles

# Floats that a tile may hold: near the size of a second-level cache, where a sweep over tile sizes at
# 16 x 4,096 and 64 x 10,000 events was flat and best.
_TILE_FLOATS = 1 << 19


class _Features(NamedTuple):
    phi: Tensor
    """``[g, n, digit_features]``."""
    indices: list[Tensor]
    """Per one-hot column ``[g, n]`` int64."""


def tile_events(problem: AttentionProblem) -> int:
    """Events per tile."""
    layout = problem.layout
    floats = layout.digit_features + 2 * len(layout.one_hot_columns) + 2 * problem.most_rows
    return max(64, _TILE_FLOATS // max(1, floats))


def forward(problem: AttentionProblem) -> AttentionOutput:
    """See :class:`AttentionProblem`."""
    query = problem.query
    z, total = torch.zeros_like(query), query.new_zeros(query.shape[0])
    peak = torch.full_like(total, -torch.inf if problem.softmax else 0.0)
    size = tile_events(problem)
    for group in _groups(problem, size):
        rows, state = group.take(query), None
        for tile in tiles(group, size):
            features = _read(problem, tile)
            state = _advance(state, problem, tile, features, _scores(problem, tile, features, rows))
        assert state is not None
        top, weight, summed = state
        group.put(total, weight)
        if problem.softmax:
            group.put(peak, top)
            summed = summed / weight.clamp_min(torch.finfo(z.dtype).tiny).unsqueeze(-1)
        group.put(z, summed)
    return AttentionOutput(z, total, peak)


def backward(
    grad_z: Tensor, grad_total: Tensor, delta: Tensor, problem: AttentionProblem, out: AttentionOutput
) -> Gradients:
    """Gradients of the forward pass; weights are recomputed, tile by tile.

    Args:
        grad_z: ``[N, F]``.
        grad_total: ``[N]``, read for a sigmoid.
        delta: ``[N]``, subtracted from ``grad_z . phi`` for a softmax.
        problem: the inputs.
        out: the outputs.
    """
    query, bias, heads = problem.query, problem.bias, problem.heads
    grad_query, grad_offset = torch.zeros_like(query), query.new_zeros(query.shape[0])
    grad_bias = None if bias is None else torch.zeros_like(bias)
    peak = torch.where(out.peak.isneginf(), 0.0, out.peak)
    total = out.total.clamp_min(torch.finfo(query.dtype).tiny)
    shift = -delta if problem.softmax else grad_total
    size = tile_events(problem)
    for group in _groups(problem, size):
        rows, upstream, moved = group.take(query), group.take(grad_z), group.take(shift).unsqueeze(-1)
        top, weight = group.take(peak).unsqueeze(-1), group.take(total).unsqueeze(-1)
        collected = torch.zeros_like(rows)
        summed = rows.new_zeros(rows.shape[:2])
        for tile in tiles(group, size):
            features = _read(problem, tile)
            p = _scores(problem, tile, features, rows)
            grad = _dot(problem, features, upstream).add_(moved)
            if problem.softmax:
                grad = grad.mul_(p.sub_(top).exp_().div_(weight))
            else:
                p = p.sigmoid_()
                grad = grad.mul_(p).mul_(1 - p)
            if problem.multiplicity is not None:
                grad = grad.mul_(tile.read(problem.multiplicity).unsqueeze(1))
            collected += _collect(problem, features, grad)
            summed += grad.sum(-1)
            if grad_bias is not None:
                per_head = grad.unflatten(1, (grad.shape[1] // heads, heads)).sum(1)
                if grad_bias.shape[1] == 1:
                    per_head = per_head.sum(1, keepdim=True)
                tile.write(grad_bias, per_head.transpose(1, 2))
        group.put(grad_query, collected)
        group.put(grad_offset, summed)
    return Gradients(grad_query, grad_offset, grad_bias)


def _groups(problem: AttentionProblem, size: int) -> list[Group]:
    return group_users(problem.lengths.tolist(), problem.rows.tolist(), size)


def _read(problem: AttentionProblem, tile: Tile) -> _Features:
    layout, events = problem.layout, tile.read(problem.events)
    return _Features(
        layout.expand_digits(events, problem.query.dtype),
        [events[..., i].to(torch.int64) for i in layout.one_hot_columns],
    )


def _dot(problem: AttentionProblem, features: _Features, query: Tensor) -> Tensor:
    """``query: [g, M, F]`` times the features of a tile -> ``[g, M, n]``."""
    layout = problem.layout
    scores = query[..., : layout.digit_features] @ features.phi.transpose(1, 2)
    for i, index in zip(layout.one_hot_columns, features.indices, strict=True):
        start = layout.starts[i]
        rows = query[..., start : start + layout.columns[i].values]
        scores += rows.gather(2, index.unsqueeze(1).expand(-1, query.shape[1], -1))
    return scores


def _collect(problem: AttentionProblem, features: _Features, weights: Tensor) -> Tensor:
    """``weights: [g, M, n]`` times the features of a tile -> ``[g, M, F]``."""
    layout = problem.layout
    parts = [weights @ features.phi]
    for i, index in zip(layout.one_hot_columns, features.indices, strict=True):
        counts = weights.new_zeros(*weights.shape[:2], layout.columns[i].values)
        parts.append(counts.scatter_add_(2, index.unsqueeze(1).expand_as(weights), weights))
    return torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]


def _scores(problem: AttentionProblem, tile: Tile, features: _Features, query: Tensor) -> Tensor:
    """``[g, M, n]``; -inf where a row sees no event."""
    scores, group, heads = _dot(problem, features, query), tile.group, problem.heads
    if problem.offset is not None:
        scores += group.take(problem.offset).unsqueeze(-1)
    if problem.bias is not None:
        per_head = tile.read(problem.bias).transpose(1, 2).unsqueeze(1)
        scores.unflatten(1, (scores.shape[1] // heads, heads)).add_(per_head)
    limits = None
    if problem.limits is not None:
        limits = group.take(problem.limits.repeat_interleave(heads))
    seen = tile.seen(limits, scores.device)
    return scores if seen is None else scores.masked_fill_(~seen, -torch.inf)


def _advance(
    state: tuple[Tensor, Tensor, Tensor] | None,
    problem: AttentionProblem,
    tile: Tile,
    features: _Features,
    scores: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of the sums: (largest score so far, sum of weights, weighted sum of features)."""
    if problem.softmax:
        peak = scores.amax(-1)
        if state is not None:
            peak = torch.maximum(peak, state[0])
        # Where every event so far is masked the peak is -inf; 0 then makes the weights exp(-inf) = 0.
        base = torch.where(peak.isneginf(), 0.0, peak)
        p = scores.sub_(base.unsqueeze(-1)).exp_()
    else:
        p = scores.sigmoid_()
        peak = base = p.new_zeros(p.shape[:2])
    if problem.multiplicity is not None:
        p = p.mul_(tile.read(problem.multiplicity).unsqueeze(1))
    total, summed = p.sum(-1), _collect(problem, features, p)
    if state is not None:
        shrink = (state[0] - base).exp()
        total = total + state[1] * shrink
        summed = summed + state[2] * shrink.unsqueeze(-1)
    return peak, total, summed
