"""The registered operator ``torchrec_sid::code_attention`` and the choice of backend.

One operator, with shape (fake) kernels and autograd, so that a module using it goes through
``torch.compile`` and ``torch.export`` as one node whatever computes it.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from torchrec_sid.errors import SidError
from torchrec_sid.side.kernels import attention_cpu, attention_torch
from torchrec_sid.side.kernels.arguments import (
    check_columns,
    check_counts,
    check_lengths,
    check_limits,
    check_multiplicity,
    check_tensor,
)
from torchrec_sid.side.kernels.attention_problem import (
    AttentionOutput,
    AttentionProblem,
    Gradients,
    checked_problem,
)

Backend = Literal["auto", "torch", "cpu", "triton", "triton_bf16"]
BACKENDS = ("auto", "torch", "cpu", "triton", "triton_bf16")


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
    counts: Tensor | None = None,
    limits: Tensor | None = None,
    multiplicity: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of query rows over packed events: returns the fields of :class:`AttentionOutput`.

    Args:
        query: ``[U, M, F]`` float32 or float64, M = candidates x heads rows of each user; with ``counts``
            ``[N, F]``, the rows of all users.
        events: ``[E, S]`` uint8 (int32 where a column needs more).
        lengths: ``[U]`` integers that sum to E.
        offset: ``[U, M]`` (``[N]``) or None.
        bias: ``[E, heads]``, ``[E, 1]`` or None.
        layout: :attr:`FeatureLayout.text`.
        heads: rows per candidate.
        activation: ``softmax`` or ``sigmoid``.
        backend: ``auto``, ``torch``, ``cpu``, ``triton``, or ``triton_bf16`` (one bfloat16 product in place
            of three: faster, scores within 0.4%).
        validate: check lengths and events by value on a GPU too, which waits for the device. Without it a
            GPU gives NaN for the users concerned. On a CPU both are always checked, and on any device
            ``counts``, ``limits`` and ``multiplicity``.
        counts: ``[U]`` integers, candidates of each user; N = heads x their sum.
        limits: ``[C]`` integers, one per candidate: events of its user that it sees, from the first.
        multiplicity: ``[E]`` above 0: how many equal events each stands for.

    Returns:
        ``z`` like the query; ``total`` and ``peak`` without its last axis.

    Raises:
        SidError: wrong shapes or types, lengths that do not sum, events outside the layout.
    """
    problem = checked_problem(
        query, events, lengths, offset, bias, layout, heads, activation, counts, limits, multiplicity
    )
    name = choose_backend(problem, backend)
    on_host = not query.is_cuda
    _check_values(problem, name, counts is not None, validate)
    if validate and not on_host:
        _check_events(problem)
    if name == "torch":
        out = attention_torch.forward(problem)
    elif name == "cpu":
        out = attention_cpu.forward(problem)
    else:
        from torchrec_sid.side.kernels import triton_attention

        out = triton_attention.forward(problem, splits=1 if name == "triton_bf16" else 3)
    if on_host and bool(out.total.isnan().any()):
        _check_events(problem)
    rows = query.shape[:-1]
    return out.z.view(query.shape), out.total.view(rows), out.peak.view(rows)


def _check_values(problem: AttentionProblem, backend: str, jagged: bool, validate: bool) -> None:
    """Refuse sizes that do not describe the tensors; only those of the dense form may wait."""
    if not problem.query.is_cuda or validate or backend == "torch" or problem.limits is not None or jagged:
        check_lengths(problem.lengths.tolist(), len(problem.events))
    if jagged:
        counts = problem.rows // problem.heads
        check_counts(counts.tolist(), len(problem.query) // problem.heads)
    if problem.limits is not None:
        check_limits(problem.limits, problem.lengths, problem.rows // problem.heads)
    if problem.multiplicity is not None:
        check_multiplicity(problem.multiplicity)
    # A byte outside its alphabet makes NaN of what sees it, which costs nothing to find; an event that no
    # row sees has to be looked at. In plain PyTorch a gather would raise without naming the event.
    unseen = jagged or not problem.query.numel()
    if (unseen and not problem.query.is_cuda) or (backend == "torch" and problem.layout.one_hot_columns):
        _check_events(problem)


def _check_events(problem: AttentionProblem) -> None:
    check_columns(
        "history_bytes",
        problem.events,
        tuple(column.values for column in problem.layout.columns),
        "The first columns are the packed SID (encode with the quantizer of this spec), the others event "
        "terms (raise their size in the configuration).",
    )


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
    counts: Tensor | None = None,
    limits: Tensor | None = None,
    multiplicity: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = query.shape[:-1]
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
    counts: Tensor | None = None,
    limits: Tensor | None = None,
    multiplicity: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients with respect to query, offset and bias (empty where there is no bias).

    Raises:
        SidError: as :func:`code_attention`.
    """
    problem = checked_problem(
        query, events, lengths, offset, bias, layout, heads, activation, counts, limits, multiplicity
    )
    same, rows = (query.dtype,), query.shape[:-1]
    grad_z, z = (
        check_tensor(where, tensor, same, query.shape, query.device).flatten(0, -2)
        for where, tensor in (("grad_z", grad_z), ("z", z))
    )
    grad_total, total, peak = (
        check_tensor(where, tensor, same, rows, query.device).flatten()
        for where, tensor in (("grad_total", grad_total), ("total", total), ("peak", peak))
    )
    name, out = choose_backend(problem, backend), AttentionOutput(z, total, peak)
    _check_values(problem, name, counts is not None, validate=False)
    grads = _exact_gradients(name, problem, out, grad_z, grad_total)
    if not query.is_cuda and bool(grads.offset.isnan().any()):
        _check_events(problem)
    grad_bias = query.new_empty(0) if grads.bias is None else grads.bias
    return grads.query.view(query.shape), grads.offset.view(rows), grad_bias


def _exact_gradients(
    backend: str, problem: AttentionProblem, out: AttentionOutput, grad_z: Tensor, grad_total: Tensor
) -> Gradients:
    """Gradients whose mean is that of the very products that were added up.

    The gradient of a score is ``p_i (g_i - delta)`` with ``g_i = grad_z . phi_i`` and
    ``delta = sum_i p_i g_i``. Where one event has all the weight the true difference is 0, and what is left
    of a delta that was summed in another order (``grad_z . z``) is noise times a large score. A backend is
    therefore given an approximate delta and returns the sums as they are; their total is what delta lacked,
    and its share of z is taken off them: exact, in one pass over the events whatever their number.
    """
    delta = (grad_z * out.z).sum(-1)
    grads = _run_backward(backend, problem, out, grad_z, grad_total, delta)
    if not problem.softmax:
        return grads
    if problem.bias is not None:
        # The gradient of a bias is one per event: it needs the exact delta beforehand.
        grads = _run_backward(backend, problem, out, grad_z, grad_total, delta + grads.offset)
    query = grads.query - grads.offset.unsqueeze(-1) * out.z
    # A softmax does not see what all scores share. NaN stays.
    return Gradients(query, grads.offset * 0, grads.bias)


def _run_backward(
    backend: str,
    problem: AttentionProblem,
    out: AttentionOutput,
    grad_z: Tensor,
    grad_total: Tensor,
    delta: Tensor,
) -> Gradients:
    if backend == "torch":
        return attention_torch.backward(grad_z, grad_total, delta, problem, out)
    if backend == "cpu":
        return attention_cpu.backward(grad_z, grad_total, delta, problem, out)
    from torchrec_sid.side.kernels import triton_attention

    splits = 1 if backend == "triton_bf16" else 3
    return triton_attention.backward(grad_z, grad_total, delta, problem, out, splits)


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
    counts: Tensor | None = None,
    limits: Tensor | None = None,
    multiplicity: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_bias = query.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return query.new_empty(query.shape), query.new_empty(query.shape[:-1]), grad_bias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    query, events, lengths, offset, bias, layout, heads, activation, backend, _, *request = inputs
    ctx.static = (layout, heads, activation, backend)
    ctx.save_for_backward(*output, query, events, lengths, offset, bias, *request)
    ctx.set_materialize_grads(True)


def _backward(ctx: Any, grad_z: Tensor, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    offset, bias, *request = saved[6:]
    grad_query, grad_offset, grad_bias = code_attention_backward(
        grad_z.contiguous(), grad_total.contiguous(), *saved[:8], *ctx.static, *request
    )
    return (
        grad_query,
        None,
        None,
        None if offset is None else grad_offset,
        None if bias is None else grad_bias,
        *((None,) * 8),
    )


code_attention.register_autograd(_backward, setup_context=_setup_context)
