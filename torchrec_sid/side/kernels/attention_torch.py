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
from torchrec_sid.side.kernels.ragged import Tile, group_users, tiles

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
    floats = layout.digit_features + 2 * len(layout.one_hot_columns) + 2 * problem.query.shape[1]
    return max(64, _TILE_FLOATS // max(1, floats))


def forward(problem: AttentionProblem, lengths: list[int]) -> AttentionOutput:
    """See :class:`AttentionProblem`; ``lengths`` is ``problem.lengths`` on the host."""
    query = problem.query
    z = torch.zeros_like(query)
    total = query.new_zeros(query.shape[:2])
    peak = query.new_full(query.shape[:2], -torch.inf if problem.softmax else 0.0)
    size = tile_events(problem)
    for group in group_users(lengths, size):
        at = group.user_index
        state = None
        for tile in tiles(group, size):
            features = _read(problem, tile)
            scores = _scores(problem, tile, features, query[at])
            if not problem.softmax:
                p = scores.sigmoid_()
                z[at] += _collect(problem, features, p)
                total[at] += p.sum(-1)
                continue
            state = _advance(state, problem, features, scores)
        if state is not None:
            peak[at], total[at], summed = state
            z[at] = summed / state[1].clamp_min(torch.finfo(z.dtype).tiny).unsqueeze(-1)
    return AttentionOutput(z, total, peak)


def backward(
    grad_z: Tensor, grad_total: Tensor, problem: AttentionProblem, out: AttentionOutput, lengths: list[int]
) -> Gradients:
    """Gradients of the forward pass; weights are recomputed, tile by tile."""
    query, bias, heads = problem.query, problem.bias, problem.heads
    grad_query = torch.zeros_like(query)
    grad_offset = query.new_zeros(query.shape[:2])
    grad_bias = None if bias is None else torch.zeros_like(bias)
    delta = (grad_z * out.z).sum(-1)
    peak = torch.where(out.peak.isneginf(), 0.0, out.peak)
    total = out.total.clamp_min(torch.finfo(query.dtype).tiny)
    size = tile_events(problem)
    for group in group_users(lengths, size):
        at = group.user_index
        for tile in tiles(group, size):
            features = _read(problem, tile)
            p = _scores(problem, tile, features, query[at])
            grad = _dot(problem, features, grad_z[at])
            if problem.softmax:
                p = p.sub_(peak[at].unsqueeze(-1)).exp_().div_(total[at].unsqueeze(-1))
                # With the whole history at hand, the mean of these very products cancels exactly where
                # one event has all the weight.
                whole = tile.width == group.longest
                mean = (p * grad).sum(-1) if whole else delta[at]
                grad = grad.sub_(mean.unsqueeze(-1)).mul_(p)
            else:
                p = p.sigmoid_()
                grad = grad.add_(grad_total[at].unsqueeze(-1)).mul_(p).mul_(1 - p)
            grad_query[at] += _collect(problem, features, grad)
            grad_offset[at] += grad.sum(-1)
            if grad_bias is not None:
                per_head = grad.unflatten(1, (grad.shape[1] // heads, heads)).sum(1)
                if grad_bias.shape[1] == 1:
                    per_head = per_head.sum(1, keepdim=True)
                tile.write(grad_bias, per_head.transpose(1, 2))
    return Gradients(grad_query, grad_offset, grad_bias)


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
    scores = _dot(problem, features, query)
    if problem.offset is not None:
        scores += problem.offset[tile.group.user_index].unsqueeze(-1)
    if problem.bias is not None:
        per_head = tile.read(problem.bias).transpose(1, 2).unsqueeze(1)
        scores.unflatten(1, (scores.shape[1] // problem.heads, problem.heads)).add_(per_head)
    valid = tile.valid(scores.device)
    if valid is not None:
        scores.masked_fill_(~valid.unsqueeze(1), -torch.inf)
    return scores


def _advance(
    state: tuple[Tensor, Tensor, Tensor] | None,
    problem: AttentionProblem,
    features: _Features,
    scores: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of the running softmax: (largest score so far, sum of weights, weighted sum of features)."""
    peak = scores.amax(-1)
    if state is not None:
        peak = torch.maximum(peak, state[0])
    # Where every event so far is masked the peak is -inf; 0 then makes the weights exp(-inf) = 0.
    base = torch.where(peak.isneginf(), 0.0, peak)
    p = scores.sub_(base.unsqueeze(-1)).exp_()
    total, summed = p.sum(-1), _collect(problem, features, p)
    if state is not None:
        shrink = (state[0] - base).exp()
        total = total + state[1] * shrink
        summed = summed + state[2] * shrink.unsqueeze(-1)
    return peak, total, summed
