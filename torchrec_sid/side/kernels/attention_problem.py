"""`AttentionProblem`: the inputs of one code-space attention call, checked once, read by every backend."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torchrec_sid.errors import SidError
from torchrec_sid.side.event_layout import FeatureLayout
from torchrec_sid.side.kernels.arguments import INTEGERS, check_number, check_tensor

ACTIVATIONS = ("softmax", "sigmoid")


class AttentionProblem(NamedTuple):
    """Inputs of the forward pass; U users, N rows (candidates x heads) of all users, E events, F features.

    With ``phi_i`` the features of event i (see ``FeatureLayout``) and ``n_i`` how often it occurred, every
    row of a user's query scores ``s_i = query . phi_i + offset + bias_i`` and collects
    ``z = sum_i w(s)_i phi_i``, where ``w`` is the softmax over the events that the row sees,
    ``n_i exp(s_i) / sum_j n_j exp(s_j)``, or ``n_i sigmoid(s_i)``.
    """

    query: Tensor
    """``[N, F]`` float32 or float64, user after user; a candidate's heads stand together."""
    events: Tensor
    """``[E, S]`` uint8 (int32 where a column needs more), user after user."""
    lengths: Tensor
    """``[U]`` int64 that sum to E."""
    rows: Tensor
    """``[U]`` int64, multiples of ``heads`` that sum to N."""
    limits: Tensor | None
    """``[N / heads]`` int64: a candidate sees that many events of its user, from the first; None: all."""
    multiplicity: Tensor | None
    """``[E]`` above 0, in the type of the query: how many equal events each stands for; None: 1."""
    offset: Tensor | None
    """``[N]``, added to every score of the row."""
    bias: Tensor | None
    """``[E, heads]`` or ``[E, 1]``, added per event; -inf masks an event."""
    layout: FeatureLayout
    heads: int
    softmax: bool
    """False: sigmoid weights, not normalised."""
    most_rows: int
    """The largest of :attr:`rows`."""


class AttentionOutput(NamedTuple):
    """Result of the forward pass."""

    z: Tensor
    """``[N, F]``: weighted sum of features."""
    total: Tensor
    """``[N]``: sum of weights; for a softmax ``sum_i n_i exp(s_i - peak)``, 0 where there is nothing."""
    peak: Tensor
    """``[N]``: for a softmax the largest score, or an upper bound of the scores, -inf where there is none;
    zeros for a sigmoid. Kept apart from the total, because in ``peak + log(total)`` the ties of a large
    score would be rounded away."""


class Gradients(NamedTuple):
    """Result of the backward pass."""

    query: Tensor
    """``[N, F]``."""
    offset: Tensor
    """``[N]``."""
    bias: Tensor | None
    """Like :attr:`AttentionProblem.bias`, where that was given."""


def checked_problem(
    query: Tensor,
    events: Tensor,
    lengths: Tensor,
    offset: Tensor | None,
    bias: Tensor | None,
    layout: str,
    heads: int,
    activation: str,
    counts: Tensor | None,
    limits: Tensor | None,
    multiplicity: Tensor | None,
) -> AttentionProblem:
    """The arguments of the operator as a problem; looks at no value of a tensor but the largest count.

    Raises:
        SidError: naming the argument whose type, shape or device no backend could read.
    """
    if activation not in ACTIVATIONS:
        raise SidError("activation", repr(activation), f"Choose one of {', '.join(ACTIVATIONS)}.")
    check_number("heads", heads, 1)
    columns, device = FeatureLayout.parse(layout), query.device
    same, users, events_here = (query.dtype,), _size(lengths), _size(events)
    features = columns.num_features
    axes = ("users", f"candidates x {heads}", features) if counts is None else ("rows", features)
    query = check_tensor("query", query, (torch.float32, torch.float64), axes, device)
    rows_shape = query.shape[:-1]
    if rows_shape[-1] % heads:
        raise SidError("query", f"{rows_shape[-1]} rows", f"Pass whole candidates of {heads} heads.")
    if counts is None and rows_shape[0] != users:
        raise SidError("lengths", f"{users} for {rows_shape[0]} users", "Pass one integer per user.")
    events = check_tensor(
        "history_bytes", events, (columns.event_dtype,), ("events", len(columns.columns)), device
    )
    lengths = check_tensor("lengths", lengths, INTEGERS, (users,), device).to(torch.int64)
    if counts is None:
        rows, most = lengths.new_full((users,), rows_shape[1]), rows_shape[1]
    else:
        rows = check_tensor("counts", counts, INTEGERS, (users,), device).to(torch.int64) * heads
        most = int(rows.max()) if users else 0
    if offset is not None:
        offset = check_tensor("offset", offset, same, rows_shape, device).flatten()
    if bias is not None:
        width = 1 if bias.dim() == 2 and bias.shape[1] == 1 else heads
        bias = check_tensor("bias", bias, same, (events_here, width), device)
    query = query.flatten(0, -2)
    if limits is not None:
        limits = check_tensor("limits", limits, INTEGERS, (len(query) // heads,), device).to(torch.int64)
    if multiplicity is not None:
        multiplicity = check_tensor("multiplicity", multiplicity, same, (events_here,), device)
    return AttentionProblem(
        query,
        events,
        lengths,
        rows,
        limits,
        multiplicity,
        offset,
        bias,
        columns,
        heads,
        activation == "softmax",
        most,
    )


def _size(tensor: Tensor) -> int:
    return tensor.shape[0] if tensor.dim() else 0
