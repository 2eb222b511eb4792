"""Code-space attention on a GPU: fused Triton kernels, forward and backward, straight from packed bytes.

A history is cut into work items of at most ``chunk`` events, so that ragged batches fill the card; a
program takes one item and a block of query rows, unpacks tiles of events to digit features in registers,
and runs the softmax online. Digits are exact in bfloat16, so that float32 results need only the *other*
operand of each product cut into three bfloat16 parts: tensor cores without loss. A second kernel merges the
items of a user. Nothing is copied to the host, so calls can be captured in graphs.

Corrupt bytes, and lengths that do not sum, give NaN.
"""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from torchrec_sid.side.event_layout import FeatureLayout
from torchrec_sid.side.kernels import triton_kernels, triton_merge
from torchrec_sid.side.kernels.attention_problem import AttentionOutput, AttentionProblem, Gradients

_MAX_FEATURES = 256
# Work items per multiprocessor to aim for, so that the last ones to finish do not idle the rest.
_ITEMS_PER_PROCESSOR = 16


class Tiles(NamedTuple):
    """What one program holds: rows of the query, events, features; and its warps."""

    block_m: int
    block_n: int
    block_f: int
    warps: int


class _Plan(NamedTuple):
    """How a call is cut up."""

    offsets: Tensor
    item_starts: Tensor
    row_starts: Tensor
    items: int
    row_blocks: int
    chunk: int
    search_steps: int
    tiles: Tiles


def choose_tiles(rows: int, features: int) -> Tiles:
    """Tiles that the compiler keeps in registers (no spills for sm_90, but for 128 features of 64 rows)."""
    block_f = max(16, triton.next_power_of_2(features))
    few = rows <= 16
    if block_f <= 32:
        return Tiles(16, 64, block_f, 4) if few else Tiles(64, 64, block_f, 8)
    if block_f == 64:
        return Tiles(16, 64, block_f, 8) if few else Tiles(64, 32, block_f, 8)
    if block_f == 128:
        return Tiles(16 if few else 64, 32, block_f, 8)
    return Tiles(16, 16, block_f, 8)


def unavailable(problem: AttentionProblem) -> str:
    """Why the Triton kernels cannot compute this problem; empty if they can."""
    if not (problem.query.is_cuda or _interpreted()):
        return "the tensors are not on a GPU"
    if problem.query.dtype != torch.float32:
        return f"it computes in float32, not {problem.query.dtype}"
    if not problem.layout.is_bytes:
        return "a column of the history needs more than a byte"
    if problem.layout.num_features > _MAX_FEATURES:
        return f"{problem.layout.num_features} features exceed its {_MAX_FEATURES}"
    return ""


def forward(problem: AttentionProblem, splits: int = 3, tiles: Tiles | None = None) -> AttentionOutput:
    """See :class:`AttentionProblem`.

    Args:
        problem: the inputs.
        splits: bfloat16 parts per float32 operand: 3 for float32 results, 1 for bfloat16 ones, faster.
        tiles: for experiments; None: :func:`choose_tiles`.
    """
    query, most = problem.query, problem.most_rows
    users, features = len(problem.lengths), query.shape[1]
    plan = _plan(problem, tiles)
    part_z = query.new_empty(plan.items, most, features)
    part_total, part_peak = query.new_empty(2, plan.items, most).unbind()
    z, total, peak = torch.empty_like(query), query.new_empty(len(query)), query.new_empty(len(query))
    if not query.numel():
        return AttentionOutput(z, total, peak)
    triton_kernels.attention_forward[(plan.items, plan.row_blocks)](
        *_inputs(problem, plan),
        part_z,
        part_total,
        part_peak,
        users,
        most,
        features,
        **_constants(problem, plan, splits),
    )
    triton_merge.attention_combine[(users, plan.row_blocks)](
        part_z,
        part_total,
        part_peak,
        plan.offsets,
        plan.item_starts,
        plan.row_starts,
        z,
        total,
        peak,
        users,
        most,
        features,
        problem.events.shape[0],
        softmax=problem.softmax,
        block_m=plan.tiles.block_m,
        block_f=plan.tiles.block_f,
    )
    return AttentionOutput(z, total, peak)


def backward(
    grad_z: Tensor,
    grad_total: Tensor,
    delta: Tensor,
    problem: AttentionProblem,
    out: AttentionOutput,
    splits: int = 3,
    tiles: Tiles | None = None,
) -> Gradients:
    """Gradients of the forward pass; arguments as there and in ``attention_torch.backward``."""
    query, bias, most = problem.query, problem.bias, problem.most_rows
    users, features, events = len(problem.lengths), query.shape[1], problem.events.shape[0]
    plan = _plan(problem, tiles)
    part_query = query.new_empty(plan.items, most, features)
    part_shared = query.new_empty(plan.items, most)
    part_bias = query.new_zeros(plan.row_blocks, events, bias.shape[1]) if bias is not None else part_shared
    grad_query, grad_shared = torch.zeros_like(query), query.new_zeros(len(query))
    if query.numel() and events:
        triton_kernels.attention_backward[(plan.items, plan.row_blocks)](
            *_inputs(problem, plan),
            grad_z.contiguous(),
            grad_total.contiguous(),
            delta.contiguous(),
            out.total,
            out.peak,
            part_query,
            part_shared,
            part_bias,
            users,
            most,
            features,
            events,
            **_constants(problem, plan, splits),
        )
        triton_merge.attention_sum[(users, plan.row_blocks)](
            part_query,
            part_shared,
            plan.item_starts,
            plan.row_starts,
            grad_query,
            grad_shared,
            most,
            features,
            block_m=plan.tiles.block_m,
            block_f=plan.tiles.block_f,
        )
    return Gradients(grad_query, grad_shared, None if bias is None else part_bias.sum(0))


def _radix(layout: FeatureLayout) -> int:
    """The radix of all digits, if every column holds the same number of them; otherwise 0."""
    radices = {column.radices for column in layout.columns}
    first = layout.columns[0].radices
    return first[0] if len(radices) == 1 and len(set(first)) == 1 else 0


def _interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on any device."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _plan(problem: AttentionProblem, tiles: Tiles | None) -> _Plan:
    users, features = len(problem.lengths), problem.query.shape[1]
    events, device = problem.events.shape[0], problem.query.device
    tiles = tiles or choose_tiles(problem.most_rows, features)
    row_blocks = triton.cdiv(problem.most_rows, tiles.block_m)
    wanted = _ITEMS_PER_PROCESSOR * _processors(device) / max(1, row_blocks)
    chunk = min(max(triton.next_power_of_2(int(events / wanted) + 1), 4 * tiles.block_n), 16384)
    offsets = torch.zeros(users + 1, dtype=torch.int64, device=device)
    # Lengths that do not sum (a negative one raises the sum) must not be read past the end; the merge
    # gives NaN then.
    torch.cumsum(problem.lengths.clamp_min(0), 0, out=offsets[1:])
    total = offsets[-1:].clone()
    offsets.clamp_(max=events)
    item_starts, row_starts = torch.zeros_like(offsets), torch.zeros_like(offsets)
    torch.cumsum((offsets.diff() + chunk - 1) // chunk, 0, out=item_starts[1:])
    torch.cumsum(problem.rows, 0, out=row_starts[1:])
    offsets = torch.cat([offsets[:-1], torch.where(total == events, offsets[-1:], -1)])
    # Each user wastes less than one item: a bound that needs no look at the lengths.
    items = events // chunk + users
    steps = max(1, users.bit_length())
    return _Plan(offsets, item_starts, row_starts, items, row_blocks, chunk, steps, tiles)


def _inputs(problem: AttentionProblem, plan: _Plan) -> tuple[Tensor, ...]:
    query, nothing = problem.query, problem.query
    optional = (problem.limits, problem.multiplicity, problem.offset, problem.bias)
    return (
        query,
        problem.events,
        plan.offsets,
        plan.item_starts,
        plan.row_starts,
        *(nothing if tensor is None else tensor for tensor in optional),
        _feature_table(problem.layout, plan.tiles.block_f, query.device),
    )


def _constants(problem: AttentionProblem, plan: _Plan, splits: int) -> dict[str, Any]:
    return {
        "columns": problem.events.shape[1],
        "radix": _radix(problem.layout),
        "values": problem.layout.columns[0].values,
        "heads": problem.heads,
        "has_shared": problem.offset is not None,
        "has_limits": problem.limits is not None,
        "has_multiplicity": problem.multiplicity is not None,
        "bias_heads": 0 if problem.bias is None else problem.bias.shape[1],
        "softmax": problem.softmax,
        "splits": splits,
        "widen": _interpreted(),
        "chunk": plan.chunk,
        "search_steps": plan.search_steps,
        "block_m": plan.tiles.block_m,
        "block_n": plan.tiles.block_n,
        "block_f": plan.tiles.block_f,
        "num_warps": plan.tiles.warps,
        "num_stages": 1,
    }


@lru_cache(maxsize=64)
def _feature_table(layout: FeatureLayout, block_f: int, device: torch.device) -> Tensor:
    """``[7, block_f]`` float32: see ``triton_kernels._features``."""
    # Features that do not exist are one-hot features of a value no byte has: always 0.
    table = torch.tensor([0.0, 1.0, 256.0, 1 / 256, 0.0, 512.0, 256.0]).unsqueeze(1).repeat(1, block_f)
    for i, (column, start) in enumerate(zip(layout.columns, layout.starts, strict=True)):
        if not column.is_digits:
            for value in range(column.values):
                table[:, start + value] = torch.tensor([i, 1.0, 256.0, 1 / 256, 0.0, value, column.values])
            continue
        divisor = 1
        for j, k in enumerate(column.radices):
            table[:, start + j] = torch.tensor([i, 1 / divisor, k, 1 / k, (k - 1) / 2, -1.0, column.values])
            divisor *= k
    return table.to(device)


@lru_cache(maxsize=8)
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
