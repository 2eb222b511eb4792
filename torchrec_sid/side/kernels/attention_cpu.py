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
            "query offsets offset bias order scratch",
            "users rows heads bias_heads softmax threads scratch_floats",
        ),
    ]


class _ForwardOut(ctypes.Structure):
    _fields_ = c_fields("z total peak")


class _BackwardArgs(ctypes.Structure):
    _fields_ = c_fields("grad_z grad_total z total peak grad_query grad_offset grad_bias")


def unavailable(problem: AttentionProblem) -> str:
    """Why the compiled kernel cannot compute this problem; empty if it can."""
    if problem.query.device.type != "cpu":
        return "the tensors are not on the CPU"
    if problem.query.dtype != torch.float32:
        return f"it computes in float32, not {problem.query.dtype}"
    if not problem.layout.is_bytes:
        return "a column of the history needs more than a byte"
    return load_library().reason


def forward(problem: AttentionProblem) -> AttentionOutput:
    """See :class:`AttentionProblem`; its lengths have been checked against the events."""
    query = problem.query
    # The kernel leaves alone what has no events, and the padding of digit columns.
    z = torch.zeros_like(query, memory_format=torch.contiguous_format)
    total = query.new_zeros(query.shape[:2])
    peak = query.new_full(query.shape[:2], -torch.inf if problem.softmax else 0.0)
    call = _Call(problem, tables=1)
    out = _ForwardOut(z.data_ptr(), total.data_ptr(), peak.data_ptr())
    call.library.sid_attention_forward(ctypes.byref(call.struct), ctypes.byref(out))
    return AttentionOutput(z, total, peak)


def backward(
    grad_z: Tensor, grad_total: Tensor, problem: AttentionProblem, out: AttentionOutput
) -> Gradients:
    """Gradients of the forward pass."""
    query, bias = problem.query, problem.bias
    grad_query = torch.zeros_like(query, memory_format=torch.contiguous_format)
    grad_offset = query.new_zeros(query.shape[:2])
    grad_bias = None if bias is None else torch.zeros_like(bias, memory_format=torch.contiguous_format)
    call = _Call(problem, tables=2)
    inputs = [t.contiguous() for t in (grad_z, grad_total, out.z, out.total, out.peak)]
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

    def __init__(self, problem: AttentionProblem, tables: int) -> None:
        library = load_library().library
        assert library is not None  # `unavailable` was asked first
        self.library = library
        users, rows, features = problem.query.shape
        layout, events = problem.layout, problem.events.contiguous()
        columns = _columns(layout)
        digits = layout.digit_table(torch.float32, torch.device("cpu"))
        lengths = problem.lengths.to(torch.int64)
        offsets = torch.zeros(users + 1, dtype=torch.int64)
        torch.cumsum(lengths, 0, out=offsets[1:])
        threads = torch.get_num_threads()
        library.sid_attention_scratch.restype = ctypes.c_int64
        scratch_floats = library.sid_attention_scratch(
            *(ctypes.c_int64(n) for n in (events.shape[1], features, rows, tables))
        )
        bias = None if problem.bias is None else problem.bias.to(torch.float32).contiguous()
        tensors = (
            problem.query.contiguous(),
            offsets,
            None if problem.offset is None else problem.offset.contiguous(),
            bias,
            lengths.argsort(descending=True),
            torch.empty(threads * scratch_floats),
        )
        self._alive = (*tensors, events, columns, digits)
        self.struct = _Problem(
            _Layout(
                *(t.data_ptr() for t in (events, columns, digits)),
                events.shape[1],
                features,
                layout.digit_width,
                int(layout.shares_digit_table),
            ),
            *(None if t is None else t.data_ptr() for t in tensors),
            users,
            rows,
            problem.heads,
            0 if bias is None else bias.shape[1],
            int(problem.softmax),
            threads,
            scratch_floats,
        )


@lru_cache(maxsize=256)
def _columns(layout: FeatureLayout) -> Tensor:
    """``[S, 3 + 8]`` int32, the C array of columns."""
    rows = []
    for column, start in zip(layout.columns, layout.starts, strict=True):
        radices = column.radices + (0,) * (_MAX_DIGITS - len(column.radices))
        rows.append((start, column.values, len(column.radices), *radices))
    return torch.tensor(rows, dtype=torch.int32)
