"""Triton kernels that merge the work items of a user; see triton_attention.py."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def attention_combine(
    part_z,
    part_total,
    part_peak,
    offsets,
    item_starts,
    row_starts,
    z_out,
    total_out,
    peak_out,
    users,
    most_rows,
    num_features,
    num_events,
    softmax: tl.constexpr,
    block_m: tl.constexpr,
    block_f: tl.constexpr,
):
    """Merge the work items of a user. NaN for everybody if lengths do not sum to the events."""
    user = tl.program_id(0).to(tl.int64)
    m = tl.program_id(1) * block_m + tl.arange(0, block_m)
    f = tl.arange(0, block_f)
    first_row = tl.load(row_starts + user)
    rows = tl.load(row_starts + user + 1) - first_row
    inside = (m < rows)[:, None] & (f < num_features)[None, :]
    peak = tl.full([block_m], float("-inf"), tl.float32)
    total = tl.zeros([block_m], tl.float32)
    z = tl.zeros([block_m, block_f], tl.float32)
    for item in range(tl.load(item_starts + user), tl.load(item_starts + user + 1)):
        at = item * most_rows + m
        more_z = tl.load(part_z + at[:, None] * num_features + f[None, :], mask=inside, other=0.0)
        more = tl.load(part_total + at, mask=m < rows, other=0.0)
        if softmax:
            other = tl.load(part_peak + at, mask=m < rows, other=0.0)
            higher = tl.maximum(peak, other)
            origin = tl.where(higher == float("-inf"), 0.0, higher)
            mine = tl.exp(peak - origin)
            theirs = tl.exp(other - origin)
            total = total * mine + more * theirs
            z = z * mine[:, None] + more_z * theirs[:, None]
            peak = higher
        else:
            total += more
            z += more_z
    if softmax:
        # Not total > 0: a NaN must stay.
        z = z / tl.where(total == 0, 1.0, total)[:, None]
    else:
        peak = tl.zeros([block_m], tl.float32)
    poison = tl.where(tl.load(offsets + users) == num_events, 0.0, float("nan"))
    out = first_row + m
    tl.store(z_out + out[:, None] * num_features + f[None, :], z + poison, mask=inside)
    tl.store(total_out + out, total + poison, mask=m < rows)
    tl.store(peak_out + out, peak, mask=m < rows)


@triton.jit
def attention_sum(
    part_query,
    part_shared,
    item_starts,
    row_starts,
    query_out,
    shared_out,
    most_rows,
    num_features,
    block_m: tl.constexpr,
    block_f: tl.constexpr,
):
    """Add up the gradients of a user's work items, in their order: the same bits at every run."""
    user = tl.program_id(0).to(tl.int64)
    m = tl.program_id(1) * block_m + tl.arange(0, block_m)
    f = tl.arange(0, block_f)
    first_row = tl.load(row_starts + user)
    rows = tl.load(row_starts + user + 1) - first_row
    inside = (m < rows)[:, None] & (f < num_features)[None, :]
    grad_q = tl.zeros([block_m, block_f], tl.float32)
    grad_s = tl.zeros([block_m], tl.float32)
    for item in range(tl.load(item_starts + user), tl.load(item_starts + user + 1)):
        at = item * most_rows + m
        grad_q += tl.load(part_query + at[:, None] * num_features + f[None, :], mask=inside, other=0.0)
        grad_s += tl.load(part_shared + at, mask=m < rows, other=0.0)
    out = first_row + m
    tl.store(query_out + out[:, None] * num_features + f[None, :], grad_q, mask=inside)
    tl.store(shared_out + out, grad_s, mask=m < rows)
