"""The registered operator ``torchrec_sid::code_attention`` and the choice of backend.

One operator, with shape (fake) kernels and autograd, so that a module using it goes through
``torch.compile`` and ``torch.export`` as one node whatever computes it.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from torchrec_sid.errors import SidError
from torchrec_sid.side.event_layout import FeatureLayout
from torchrec_sid.side.kernels import attention_cpu, attention_torch
from torchrec_sid.side.kernels.attention_problem import (
    AttentionOutput,
    AttentionProblem,
    Gradients,
    check_lengths,
    check_shapes,
)

Backend = Literal["auto", "torch", "cpu", "triton", "triton_bf16"]
BACKENDS = ("auto", "torch", "cpu", "triton", "triton_bf16")
ACTIVATIONS = ("softmax", "sigmoid")


def choose_backend(problem: AttentionProblem, backend: str) -> str:
    """Resolve ``auto``, and refuse a backend that cannot compute the problem.

    Raises:
        SidError: saying why.
    """
    # Asked for one by one: the Triton answer imports Triton, the CPU one may compile.
    reasons = {
        "torch": lambda problem: "",
        "cpu": attention_cpu.unavailable,
        "triton": _triton_unavailable,
        "triton_bf16": _triton_unavailable,
    }
    if backend == "auto":
        fast = "triton" if problem.query.is_cuda else "cpu"
        return "torch" if reasons[fast](problem) else fast
    if backend not in reasons:
        raise SidError("backend", repr(backend), f"Choose one of {', '.join(BACKENDS)}.")
    if reason := reasons[backend](problem):
        raise SidError("backend", f"{backend!r} cannot be used: {reason}", "Choose 'auto'.")
    return backend


def _triton_unavailable(problem: AttentionProblem) -> str:
    try:
        from torchrec_sid.side.kernels import triton_attention
    except ImportError as error:
        return f"Triton does not import ({error})"
    return triton_attention.unavailable(problem)


def _problem(
    query: Tensor,
    events: Tensor,
    lengths: Tensor,
    offset: Tensor | None,
    bias: Tensor | None,
    layout: str,
    heads: int,
    activation: str,
) -> AttentionProblem:
    if activation not in ACTIVATIONS:
        raise SidError("activation", repr(activation), f"Choose one of {', '.join(ACTIVATIONS)}.")
    problem = AttentionProblem(
        query, events, lengths, offset, bias, FeatureLayout.parse(layout), heads, activation == "softmax"
    )
    check_shapes(problem)
    return problem


@torch.library.custom_op("torchrec_sid::code_attention", mutates_args=())
def code_attention(
    query: Tensor,
    events: Tensor,
    lengths: Tensor,
    offset: Tensor | None,
    bias: Tensor | None,
    layout: str,
    heads: int,
    activation: str,
    backend: str,
    validate: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of query rows over packed events: returns the fields of :class:`AttentionOutput`.

    Args:
        query: ``[U, M, F]`` float32 or float64.
        events: ``[E, S]`` uint8 (int32 where a column needs more).
        lengths: ``[U]`` integers that sum to E.
        offset: ``[U, M]`` or None.
        bias: ``[E, heads]``, ``[E, 1]`` or None.
        layout: :attr:`FeatureLayout.text`.
        heads: rows per candidate.
        activation: ``softmax`` or ``sigmoid``.
        backend: ``auto``, ``torch``, ``cpu``, ``triton``, or ``triton_bf16`` (one bfloat16 product in place
            of three: faster, scores within 0.4%).
        validate: check lengths and events by value on a GPU too, which waits for the device. Without it a
            GPU gives NaN for the users concerned. On a CPU both are always checked.

    Raises:
        SidError: wrong shapes or types, lengths that do not sum, events outside the layout.
    """
    problem = _problem(query, events, lengths, offset, bias, layout, heads, activation)
    name = choose_backend(problem, backend)
    on_host = not query.is_cuda
    host_lengths = lengths.tolist() if on_host or validate or name == "torch" else []
    if host_lengths or on_host or validate:
        check_lengths(host_lengths, len(events))
    if (name == "torch" and problem.layout.one_hot_columns) or (validate and not on_host):
        # A gather outside the table would raise without naming the event (on a GPU: end the process).
        problem.layout.check(events, "history_bytes")
    out = _run_forward(problem, name, host_lengths)
    if on_host and bool(out.total.isnan().any()):
        problem.layout.check(events, "history_bytes")
    return out.z, out.total, out.peak


def _run_forward(problem: AttentionProblem, backend: str, lengths: list[int]) -> AttentionOutput:
    if backend == "torch":
        return attention_torch.forward(problem, lengths)
    if backend == "cpu":
        return attention_cpu.forward(problem)
    from torchrec_sid.side.kernels import triton_attention

    return triton_attention.forward(problem, splits=1 if backend == "triton_bf16" else 3)


@code_attention.register_fake
def _(
    query: Tensor,
    events: Tensor,
    lengths: Tensor,
    offset: Tensor | None,
    bias: Tensor | None,
    layout: str,
    heads: int,
    activation: str,
    backend: str,
    validate: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = query.shape[:2]
    return query.new_empty(query.shape), query.new_empty(rows), query.new_empty(rows)


@torch.library.custom_op("torchrec_sid::code_attention_backward", mutates_args=())
def code_attention_backward(
    grad_z: Tensor,
    grad_total: Tensor,
    z: Tensor,
    total: Tensor,
    peak: Tensor,
    query: Tensor,
    events: Tensor,
    lengths: Tensor,
    offset: Tensor | None,
    bias: Tensor | None,
    layout: str,
    heads: int,
    activation: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients with respect to query, offset and bias (empty where there is no bias)."""
    problem = _problem(query, events, lengths, offset, bias, layout, heads, activation)
    name, out = choose_backend(problem, backend), AttentionOutput(z, total, peak)
    if not query.is_cuda:
        check_lengths(lengths.tolist(), len(events))
    grads: Gradients
    if name == "torch":
        grads = attention_torch.backward(grad_z, grad_total, problem, out, lengths.tolist())
    elif name == "cpu":
        grads = attention_cpu.backward(grad_z, grad_total, problem, out)
    else:
        from torchrec_sid.side.kernels import triton_attention

        splits = 1 if name == "triton_bf16" else 3
        grads = triton_attention.backward(grad_z, grad_total, problem, out, splits)
    return grads.query, grads.offset, query.new_empty(0) if grads.bias is None else grads.bias


@code_attention_backward.register_fake
def _(
    grad_z: Tensor,
    grad_total: Tensor,
    z: Tensor,
    total: Tensor,
    peak: Tensor,
    query: Tensor,
    events: Tensor,
    lengths: Tensor,
    offset: Tensor | None,
    bias: Tensor | None,
    layout: str,
    heads: int,
    activation: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_bias = query.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return query.new_empty(query.shape), query.new_empty(query.shape[:2]), grad_bias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    query, events, lengths, offset, bias, *ctx.static, _ = inputs
    ctx.save_for_backward(*output, query, events, lengths, offset, bias)
    ctx.set_materialize_grads(True)


def _backward(ctx: Any, grad_z: Tensor, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    offset, bias = ctx.saved_tensors[-2:]
    grads = code_attention_backward(
        grad_z.contiguous(), grad_total.contiguous(), *ctx.saved_tensors, *ctx.static
    )
    grad_query, grad_offset, grad_bias = grads
    nothing = (None,) * 5
    return (
        grad_query,
        None,
        None,
        None if offset is None else grad_offset,
        None if bias is None else grad_bias,
        *nothing,
    )


code_attention.register_autograd(_backward, setup_context=_setup_context)
