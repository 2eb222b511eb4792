"""Attention of every candidate over the events of its user: vectors, jagged on both sides.

No history is padded or repeated. As a registered operator it is one node of an exported program, whose
sizes are data; it needs torch alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from torchrec_sid.errors import SidError
from torchrec_sid.side.kernels.arguments import check_counts, check_lengths
from torchrec_sid.side.kernels.ragged import Group, Tile, group_users

# Users of similar length with equally many rows are handled together, up to so many events (of which a user
# counts for 1,024 at most).
_GROUP_EVENTS = 1 << 14


def attend_by_user(
    query: Tensor, events: Tensor, lengths: Tensor, counts: Tensor, windows: Sequence[int], scale: float
) -> Tensor:
    """Weighted sums of events: ``softmax(scale query . events)`` over the last events of a user.

    Args:
        query: ``[C, H, D]`` floating point, candidates user after user, H queries of each.
        events: ``[E, D]``, user after user, oldest first; keys and values alike.
        lengths: ``[U]`` int64 that sum to E.
        counts: ``[U]`` int64 that sum to C.
        windows: most recent events that count, ascending.
        scale: of the scores.

    Returns:
        ``[C, len(windows), H, D]``; zeros for a user without events.

    Raises:
        SidError: shapes that do not fit, lengths or counts that do not sum.
    """
    if not torch.compiler.is_exporting():
        # Not through the operator, which has no gradient.
        return _attend(query, events, lengths, counts, windows, scale)
    return user_attention(query, events, lengths, counts, list(windows), scale)


@torch.library.custom_op("torchrec_sid::user_attention", mutates_args=())
def user_attention(
    query: Tensor, events: Tensor, lengths: Tensor, counts: Tensor, windows: list[int], scale: float
) -> Tensor:
    """:func:`attend_by_user` as an operator, without a gradient."""
    return _attend(query, events, lengths, counts, windows, scale)


@user_attention.register_fake
def _(
    query: Tensor, events: Tensor, lengths: Tensor, counts: Tensor, windows: list[int], scale: float
) -> Tensor:
    return query.new_empty((query.shape[0], len(windows), *query.shape[1:]))


def _attend(
    query: Tensor, events: Tensor, lengths: Tensor, counts: Tensor, windows: Sequence[int], scale: float
) -> Tensor:
    if query.dim() != 3 or events.dim() != 2 or query.shape[2] != events.shape[1]:
        found = f"{tuple(query.shape)} and {tuple(events.shape)}"
        raise SidError("user_attention", f"queries and events of shape {found}", "Pass [C, H, D], [E, D].")
    if lengths.dim() != 1 or lengths.shape != counts.shape or not windows or min(windows) < 1:
        raise SidError(
            "user_attention",
            f"{tuple(lengths.shape)} lengths, {tuple(counts.shape)} counts, windows {list(windows)}",
            "Pass a length and a count for each user, and windows above 0.",
        )
    events_of, rows_of = lengths.tolist(), counts.tolist()
    check_lengths(events_of, len(events))
    check_counts(rows_of, len(query))
    events = events.to(query.dtype)
    out = query.new_zeros((len(query), len(windows), *query.shape[1:]))
    for group in group_users(events_of, rows_of, _GROUP_EVENTS):
        rows = group.take(query).flatten(1, 2).unsqueeze(1)
        for number, window in enumerate(windows):
            seen = _newest(group, window)
            past, real = seen.read(events).unsqueeze(1), seen.valid(events.device)
            mask = None if real is None else real[:, None, None]
            sums = scaled_dot_product_attention(rows, past, past, attn_mask=mask, scale=scale)
            group.put(out[:, number], sums.squeeze(1).unflatten(1, (group.rows, -1)))
    return out


def _newest(group: Group, window: int) -> Tile:
    """The last ``window`` events of each user of a group."""
    lengths = tuple(min(length, window) for length in group.lengths)
    ends = zip(group.starts, group.lengths, lengths, strict=True)
    starts = tuple(start + length - kept for start, length, kept in ends)
    return Tile(replace(group, starts=starts, lengths=lengths), 0, lengths[0])
