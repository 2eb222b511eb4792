"""Code-space attention on the CPU by the compiled kernel (``code_attention.cpp``)."""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch
from torch import Tensor

from torchrec_sid.side.event_layout import FeatureLayout
from torchrec_sid.side.kernels.attention_problem import AttentionOutput, AttentionProblem, Gradients
from torchrec_sid.side.kernels.compiler import c_fields, load_library

_MAX_DIGITS = 8


class _Layout(ctypes.Structure):
    _fields_ = c_fields("events columns digits", "count features digit_width digits_shared")


class _Problem(ctypes.Structure):
    _fields_ = [
        ("layout", _Layout),
        *c_fields(
            "query event_starts row_starts limits multiplicity offset bias",
            "users heads bias_heads softmax threads running",
        ),
    ]


class _ForwardOut(ctypes.Structure):
    _fields_ = c_fields("z total peak")


class _BackwardArgs(ctypes.Structure):
    _fields_ = c_fields("grad_z grad_total delta total peak grad_query grad_offset grad_bias")


def unavailable(problem: AttentionProblem) -> str:
    """Why the compiled kernel cannot compute this problem; empty if it can."""
    if problem.query.device.type != "cpu":
        return "the tensors are not on the CPU"
    if problem.query.dtype != torch.float32:
        return f"it computes in float32, not {problem.query.dtype}"
    if not problem.layout.is_bytes:
        return "a column of the history needs more than a byte"
    return load_library().reason


def forward(problem: AttentionProblem, *, running: bool = False) -> AttentionOutput:
    """See :class:`AttentionProblem`; everything in it has been checked.

    Args:
        problem: the inputs.
        running: never by products of exponentials, always by a running softmax (for comparison).
    """
    # The kernel leaves alone what has no events, and the padding of digit columns.
    z = torch.zeros_like(problem.query)
    total = problem.query.new_zeros(len(z))
    peak = torch.full_like(total, -torch.inf if problem.softmax else 0.0)
    call = _Call(problem, running)
    out = _ForwardOut(z.data_ptr(), total.data_ptr(), peak.data_ptr())
    call.library.sid_attention_forward(ctypes.byref(call.struct), ctypes.byref(out))
    return AttentionOutput(z, total, peak)


def backward(
    grad_z: Tensor,
    grad_total: Tensor,
    delta: Tensor,
    problem: AttentionProblem,
    out: AttentionOutput,
    *,
    running: bool = False,
) -> Gradients:
    """Gradients of the forward pass; arguments as in ``attention_torch.backward``."""
    grad_query = torch.zeros_like(problem.query)
    grad_offset = torch.zeros_like(out.total)
    grad_bias = None if problem.bias is None else torch.zeros_like(problem.bias)
    call = _Call(problem, running)
    inputs = [t.contiguous() for t in (grad_z, grad_total, delta, out.total, out.peak)]
    args = _BackwardArgs(
        *(t.data_ptr() for t in inputs),
        grad_query.data_ptr(),
        grad_offset.data_ptr(),
        None if grad_bias is None else grad_bias.data_ptr(),
    )
    call.library.sid_attention_backward(ctypes.byref(call.struct), ctypes.byref(args))
    return Gradients(grad_query, grad_offset, grad_bias)


class _Call:
    """The C structure of a problem, and the tensors it points into."""

    def __init__(self, problem: AttentionProblem, running: bool) -> None:
        library = load_library().library
        assert library is not None  # `unavailable` was asked first
        self.library = library
        layout, events, bias = problem.layout, problem.events, problem.bias
        columns = _columns(layout)
        digits = layout.digit_table(torch.float32, torch.device("cpu"))
        tensors = (
            problem.query,
            starts(problem.lengths),
            starts(problem.rows),
            problem.limits,
            problem.multiplicity,
            problem.offset,
            bias,
        )
        self._alive = (*tensors, events, columns, digits)
        self.struct = _Problem(
            _Layout(
                *(t.data_ptr() for t in (events, columns, digits)),
                events.shape[1],
                layout.num_features,
                layout.digit_width,
                int(layout.shares_digit_table),
            ),
            *(None if t is None else t.data_ptr() for t in tensors),
            len(problem.lengths),
            problem.heads,
            0 if bias is None else bias.shape[1],
            int(problem.softmax),
            torch.get_num_threads(),
            int(running),
        )


def starts(sizes: Tensor) -> Tensor:
    """``[U]`` int64 -> ``[U + 1]``: where each begins, and their sum."""
    out = torch.zeros(len(sizes) + 1, dtype=torch.int64)
    torch.cumsum(sizes, 0, out=out[1:])
    return out


@lru_cache(maxsize=256)
def _columns(layout: FeatureLayout) -> Tensor:
    """``[S, 3 + 8]`` int32, the C array of columns."""
    rows = []
    for column, start in zip(layout.columns, layout.starts, strict=True):
        radices = column.radices + (0,) * (_MAX_DIGITS - len(column.radices))
        rows.append((start, column.values, len(column.radices), *radices))
    return torch.tensor(rows, dtype=torch.int32)
