"""`AttentionProblem`: the inputs of one code-space attention call, checked once, read by every backend."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torchrec_sid.errors import SidError
from torchrec_sid.side.event_layout import FeatureLayout


class AttentionProblem(NamedTuple):
    """Inputs of the forward pass; U users, M = candidates x heads rows, E events, F features.

    With ``phi_i`` the features of event i (see ``FeatureLayout``), every row of a user's query scores
    ``s_i = query . phi_i + offset + bias_i`` and collects ``z = sum_i w(s)_i phi_i``, where ``w`` is the
    softmax over the user's events, or the sigmoid.
    """

    query: Tensor
    """``[U, M, F]`` float32 or float64; row ``c * heads + h`` is head h of candidate c."""
    events: Tensor
    """``[E, S]`` uint8 (int32 where a column needs more), user after user."""
    lengths: Tensor
    """``[U]`` integers that sum to E."""
    offset: Tensor | None
    """``[U, M]``, added to every score of the row."""
    bias: Tensor | None
    """``[E, heads]`` or ``[E, 1]``, added per event; -inf masks an event."""
    layout: FeatureLayout
    heads: int
    softmax: bool
    """False: sigmoid weights, not normalised."""


class AttentionOutput(NamedTuple):
    """Result of the forward pass."""

    z: Tensor
    """``[U, M, F]``: weighted sum of features."""
    total: Tensor
    """``[U, M]``: sum of weights; for a softmax ``sum_i exp(s_i - peak)``, 0 where there is nothing."""
    peak: Tensor
    """``[U, M]``: the largest score, -inf where there is none; zeros for a sigmoid. Kept apart from the
    total, because in ``peak + log(total)`` the ties of a large score would be rounded away."""


class Gradients(NamedTuple):
    """Result of the backward pass."""

    query: Tensor
    """``[U, M, F]``."""
    offset: Tensor
    """``[U, M]``."""
    bias: Tensor | None
    """Like :attr:`AttentionProblem.bias`, where that was given."""


def check_shapes(problem: AttentionProblem) -> None:
    """Refuse shapes and types that no backend could read; looks at no value.

    Raises:
        SidError: naming the argument.
    """
    query, events, lengths, offset, bias, layout, heads, _ = problem
    if query.dtype not in (torch.float32, torch.float64):
        raise SidError(
            "query",
            f"dtype {query.dtype}",
            "Code-space attention computes in float32: cast the query to it.",
        )
    if query.dim() != 3 or query.shape[2] != layout.num_features or query.shape[1] % heads:
        raise SidError(
            "query",
            f"shape {tuple(query.shape)}",
            f"Pass [users, candidates x {heads}, {layout.num_features}].",
        )
    if events.dim() != 2 or events.shape[1] != len(layout.columns) or events.dtype != layout.event_dtype:
        raise SidError(
            "history_bytes",
            f"{events.dtype} of shape {tuple(events.shape)}",
            f"Pass [events, {len(layout.columns)}] {layout.event_dtype}, as the spec packs it.",
        )
    if lengths.dim() != 1 or lengths.shape[0] != query.shape[0] or lengths.dtype.is_floating_point:
        raise SidError(
            "lengths",
            f"{lengths.dtype} of shape {tuple(lengths.shape)} for {query.shape[0]} users",
            "Pass one integer per user.",
        )
    if offset is not None and offset.shape != query.shape[:2]:
        raise SidError("offset", f"shape {tuple(offset.shape)}", f"Pass {tuple(query.shape[:2])}.")
    if bias is not None and tuple(bias.shape) not in ((len(events), heads), (len(events), 1)):
        raise SidError(
            "bias", f"shape {tuple(bias.shape)}", f"Pass one number per event, or [{len(events)}, {heads}]."
        )


def check_lengths(lengths: list[int], events: int) -> None:
    """Refuse lengths that do not describe the events.

    Raises:
        SidError: a negative length, or a sum that is not the number of events.
    """
    if any(length < 0 for length in lengths):
        raise SidError("lengths", f"length {min(lengths)}", "A history has 0 events or more.")
    if sum(lengths) != events:
        raise SidError(
            "lengths", f"sum {sum(lengths)} for {events} events", "Pass the number of events of each user."
        )
