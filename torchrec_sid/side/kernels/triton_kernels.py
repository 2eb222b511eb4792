"""Triton kernels of code-space attention; host side and explanation in triton_attention.py."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _find_item(item_starts, offsets, item, users, chunk: tl.constexpr, search_steps: tl.constexpr):
    """User of a work item, and its events ``begin .. end - 1`` (none past the last item)."""
    low = item * 0
    high = low + users
    for _ in range(search_steps):
        middle = (low + high) // 2
        at_or_before = tl.load(item_starts + middle) <= item
        low = tl.where(at_or_before, middle, low)
        high = tl.where(at_or_before, high, middle)
    first = tl.load(item_starts + low)
    begin = tl.load(offsets + low) + (item - first) * chunk
    end = tl.minimum(begin + chunk, tl.load(offsets + low + 1))
    return low, begin, tl.where(item < tl.load(item_starts + users), end, begin)


@triton.jit
def _features(
    events,
    first,
    keep,
    features,
    columns: tl.constexpr,
    radix: tl.constexpr,
    values: tl.constexpr,
    block_n: tl.constexpr,
    block_f: tl.constexpr,
):
    """Features ``[block_n, block_f]`` of events ``first ..``, bfloat16 (exact); NaN outside the alphabet.

    ``features`` is ``[7, block_f]`` float32: column, 1 / divisor, modulus, its inverse, centre, one-hot
    value (-1 for digits), limit. Numbers are small: floor((x + 0.5) * (1 / k)) is exact for integers x.
    Where all columns hold digits of one ``radix``, below ``values``, only the first two rows are read: each
    row costs registers for as many features as a thread holds.
    """
    f = tl.arange(0, block_f)
    column = tl.load(features + f).to(tl.int32)
    inverse = tl.load(features + block_f + f)
    # Offsets within the tile fit 32 bits, which halves the registers that addresses take.
    at = tl.arange(0, block_n)[:, None] * columns + column[None, :]
    byte = tl.load(events + first * columns + at, mask=keep[:, None], other=0).to(tl.float32)
    shifted = tl.floor((byte + 0.5) * inverse[None, :])
    if radix > 0:
        value = shifted - radix * tl.floor((shifted + 0.5) * (1.0 / radix)) - 0.5 * (radix - 1)
        return tl.where(byte < values, value, float("nan")).to(tl.bfloat16)
    modulus = tl.load(features + 2 * block_f + f)
    inverse_modulus = tl.load(features + 3 * block_f + f)
    centre = tl.load(features + 4 * block_f + f)
    wanted = tl.load(features + 5 * block_f + f)
    limit = tl.load(features + 6 * block_f + f)
    digit = shifted - modulus[None, :] * tl.floor((shifted + 0.5) * inverse_modulus[None, :])
    hit = tl.where(byte == wanted[None, :], 1.0, 0.0)
    value = tl.where(wanted[None, :] >= 0, hit, digit - centre[None, :])
    return tl.where(byte < limit[None, :], value, float("nan")).to(tl.bfloat16)


@triton.jit
def _product(x, y, widen: tl.constexpr):
    # Triton's interpreter multiplies the bit patterns of bfloat16 as integers.
    if widen:
        return tl.dot(x.to(tl.float32), y.to(tl.float32), input_precision="ieee")
    return tl.dot(x, y)


@triton.jit
def _parts(x):
    """Three bfloat16 tensors whose sum is the float32 x: together they carry its 24 bits."""
    high = x.to(tl.bfloat16)
    rest = x - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    return high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def _dot(high, middle, low, y, splits: tl.constexpr, widen: tl.constexpr):
    """Product on tensor cores of a float32 matrix in parts with y, exact in bfloat16."""
    out = _product(high, y, widen)
    if splits > 1:
        out += _product(middle, y, widen)
    if splits > 2:
        out += _product(low, y, widen)
    return out


@triton.jit
def _scores(
    high,
    middle,
    low,
    phi,
    shared,
    bias,
    n,
    m,
    keep,
    rows,
    limit,
    place,
    heads: tl.constexpr,
    bias_heads: tl.constexpr,
    splits: tl.constexpr,
    widen: tl.constexpr,
):
    """Scores ``[BLOCK_M, BLOCK_N]``, -inf past the end and past a row's limit.

    ``place``: of the events in their history; ``limit``: of each row.
    """
    s = _dot(high, middle, low, tl.trans(phi), splits, widen) + shared[:, None]
    if bias_heads == 1:
        s += tl.load(bias + n, mask=keep, other=0.0)[None, :]
    elif bias_heads > 1:
        at = n.to(tl.int64)[None, :] * bias_heads + (m % heads)[:, None]
        s += tl.load(bias + at, mask=keep[None, :] & (m < rows)[:, None], other=0.0)
    return tl.where(keep[None, :] & (place[None, :] < limit[:, None]), s, float("-inf"))


@triton.jit
def _limits(limits, offsets, user, at, rows_live, heads: tl.constexpr, has_limits: tl.constexpr):
    """``[BLOCK_M]`` int64: events that each row sees."""
    length = tl.load(offsets + user + 1) - tl.load(offsets + user)
    if has_limits:
        return tl.load(limits + at // heads, mask=rows_live, other=0)
    return at * 0 + length


@triton.jit
def attention_forward(
    query,
    events,
    offsets,
    item_starts,
    row_starts,
    limits,
    multiplicity,
    shared,
    bias,
    features,
    part_z,
    part_total,
    part_peak,
    users,
    most_rows,
    num_features,
    columns: tl.constexpr,
    radix: tl.constexpr,
    values: tl.constexpr,
    heads: tl.constexpr,
    has_shared: tl.constexpr,
    has_limits: tl.constexpr,
    has_multiplicity: tl.constexpr,
    bias_heads: tl.constexpr,
    softmax: tl.constexpr,
    splits: tl.constexpr,
    widen: tl.constexpr,
    chunk: tl.constexpr,
    search_steps: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_f: tl.constexpr,
):
    """One work item (up to ``chunk`` events of a user) and one block of rows: running softmax."""
    item = tl.program_id(0).to(tl.int64)
    user, begin, end = _find_item(item_starts, offsets, item, users, chunk, search_steps)
    if begin >= end:
        return
    m = tl.program_id(1) * block_m + tl.arange(0, block_m)
    f = tl.arange(0, block_f)
    first_row = tl.load(row_starts + user)
    rows = tl.load(row_starts + user + 1) - first_row
    if tl.program_id(1) * block_m >= rows:
        return
    inside = (m < rows)[:, None] & (f < num_features)[None, :]
    at = first_row + m
    limit = _limits(limits, offsets, user, at, m < rows, heads, has_limits)
    start = tl.load(offsets + user)
    q1, q2, q3 = _parts(tl.load(query + at[:, None] * num_features + f[None, :], mask=inside, other=0.0))
    base = tl.zeros([block_m], tl.float32)
    if has_shared:
        base = tl.load(shared + at, mask=m < rows, other=0.0)
    peak = tl.full([block_m], float("-inf"), tl.float32)
    total = tl.zeros([block_m], tl.float32)
    z = tl.zeros([block_m, block_f], tl.float32)
    for first in range(begin, end, block_n):
        n = first + tl.arange(0, block_n)
        keep = n < end
        phi = _features(events, first, keep, features, columns, radix, values, block_n, block_f)
        s = _scores(
            q1,
            q2,
            q3,
            phi,
            base,
            bias,
            n,
            m,
            keep,
            rows,
            limit,
            n - start,
            heads,
            bias_heads,
            splits,
            widen,
        )
        times = tl.full([block_n], 1.0, tl.float32)
        if has_multiplicity:
            times = tl.load(multiplicity + n, mask=keep, other=0.0)
        if softmax:
            higher = tl.maximum(peak, tl.max(s, 1))
            origin = tl.where(higher == float("-inf"), 0.0, higher)
            p = tl.exp(s - origin[:, None]) * times[None, :]
            shrink = tl.exp(peak - origin)
            total = total * shrink + tl.sum(p, 1)
            p1, p2, p3 = _parts(p)
            z = z * shrink[:, None] + _dot(p1, p2, p3, phi, splits, widen)
            peak = higher
        else:
            p = times[None, :] / (1.0 + tl.exp(-s))
            total += tl.sum(p, 1)
            p1, p2, p3 = _parts(p)
            z += _dot(p1, p2, p3, phi, splits, widen)
    out = item * most_rows + m
    tl.store(part_z + out[:, None] * num_features + f[None, :], z, mask=inside)
    tl.store(part_total + out, total, mask=m < rows)
    tl.store(part_peak + out, peak, mask=m < rows)


@triton.jit
def attention_backward(
    query,
    events,
    offsets,
    item_starts,
    row_starts,
    limits,
    multiplicity,
    shared,
    bias,
    features,
    grad_z,
    grad_total,
    delta,
    total,
    peak,
    part_query,
    part_shared,
    part_bias,
    users,
    most_rows,
    num_features,
    num_events,
    columns: tl.constexpr,
    radix: tl.constexpr,
    values: tl.constexpr,
    heads: tl.constexpr,
    has_shared: tl.constexpr,
    has_limits: tl.constexpr,
    has_multiplicity: tl.constexpr,
    bias_heads: tl.constexpr,
    softmax: tl.constexpr,
    splits: tl.constexpr,
    widen: tl.constexpr,
    chunk: tl.constexpr,
    search_steps: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_f: tl.constexpr,
):
    """Gradients of one work item and one block of rows; weights are recomputed."""
    item = tl.program_id(0).to(tl.int64)
    user, begin, end = _find_item(item_starts, offsets, item, users, chunk, search_steps)
    if begin >= end:
        return
    m = tl.program_id(1) * block_m + tl.arange(0, block_m)
    f = tl.arange(0, block_f)
    first_row = tl.load(row_starts + user)
    rows = tl.load(row_starts + user + 1) - first_row
    if tl.program_id(1) * block_m >= rows:
        return
    live = m < rows
    inside = live[:, None] & (f < num_features)[None, :]
    at = first_row + m
    limit = _limits(limits, offsets, user, at, live, heads, has_limits)
    start = tl.load(offsets + user)
    q1, q2, q3 = _parts(tl.load(query + at[:, None] * num_features + f[None, :], mask=inside, other=0.0))
    g1, g2, g3 = _parts(tl.load(grad_z + at[:, None] * num_features + f[None, :], mask=inside, other=0.0))
    base = tl.zeros([block_m], tl.float32)
    if has_shared:
        base = tl.load(shared + at, mask=live, other=0.0)
    if softmax:
        mean = tl.load(delta + at, mask=live, other=0.0)
        origin = tl.load(peak + at, mask=live, other=0.0)
        origin = tl.where(origin == float("-inf"), 0.0, origin)
        weight = tl.load(total + at, mask=live, other=1.0)
        weight = 1.0 / tl.where(weight == 0, 1.0, weight)
    else:
        mean = -tl.load(grad_total + at, mask=live, other=0.0)
        origin = base * 0
        weight = base * 0
    grad_q = tl.zeros([block_m, block_f], tl.float32)
    grad_s = tl.zeros([block_m], tl.float32)
    for first in range(begin, end, block_n):
        n = first + tl.arange(0, block_n)
        keep = n < end
        phi = _features(events, first, keep, features, columns, radix, values, block_n, block_f)
        s = _scores(
            q1,
            q2,
            q3,
            phi,
            base,
            bias,
            n,
            m,
            keep,
            rows,
            limit,
            n - start,
            heads,
            bias_heads,
            splits,
            widen,
        )
        times = tl.full([block_n], 1.0, tl.float32)
        if has_multiplicity:
            times = tl.load(multiplicity + n, mask=keep, other=0.0)
        d = _dot(g1, g2, g3, tl.trans(phi), splits, widen) - mean[:, None]
        if softmax:
            d = d * tl.exp(s - origin[:, None]) * weight[:, None]
        else:
            p = 1.0 / (1.0 + tl.exp(-s))
            d = d * p * (1.0 - p)
        d = d * times[None, :]
        d1, d2, d3 = _parts(d)
        grad_q += _dot(d1, d2, d3, phi, splits, widen)
        grad_s += tl.sum(d, 1)
        if bias_heads > 0:
            for head in tl.static_range(bias_heads):
                mine = live & (m % bias_heads == head)
                per_event = tl.sum(tl.where(mine[:, None], d, 0.0), 0)
                out = (tl.program_id(1).to(tl.int64) * num_events + n) * bias_heads + head
                tl.store(part_bias + out, per_event, mask=keep)
    out = item * most_rows + m
    tl.store(part_query + out[:, None] * num_features + f[None, :], grad_q, mask=inside)
    tl.store(part_shared + out, grad_s, mask=live)
