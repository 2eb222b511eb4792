"""The slow, obvious meaning of code-space attention: decode every event, then attend; differentiable."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchrec_sid.side.basis import FrozenBasis
from torchrec_sid.side.code_space_attention import CodeSpaceAttention


def decode_then_attend(
    attention: CodeSpaceAttention,
    basis: FrozenBasis,
    candidates: Tensor,
    codes: Tensor,
    lengths: Tensor,
    actions: Tensor | None = None,
    ages: Tensor | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """What ``attention(candidates, spec.pack_bytes(codes), lengths, ...)`` must equal.

    Args:
        attention: the module, in the precision to compute in (``attention.double()`` for float64).
        basis: the decoder it was built from.
        candidates: ``[B, m, query_dim]``.
        codes: ``[E, L]`` int64.
        lengths: ``[B]``.
        actions: ``[E]``.
        ages: ``[E]``.
        bias: ``[E]`` or ``[E, heads]``.
        mask: ``[E]`` bool.

    Returns:
        ``[B, m, output_dim]``.
    """
    config, heads = attention.config, attention.config.num_heads
    dtype = candidates.dtype
    x = basis.decode(codes).to(dtype)
    start = 0
    for column, size in zip(
        attention.terms.columns(lengths, len(codes), actions, ages), config.terms.sizes, strict=True
    ):
        assert attention.terms.embedding is not None
        x = x + attention.terms.embedding[start : start + size][column.long()]
        start += size
    shift = _score_shift(attention, lengths, actions, ages, bias, mask, dtype)
    query = attention.query(candidates).unflatten(-1, (heads, -1))
    key = attention.key(x).unflatten(-1, (heads, -1))
    value = attention.value(x).unflatten(-1, (heads, -1))
    scale = config.scale or attention.head_dim**-0.5
    outputs, at = [], 0
    for user, length in enumerate(lengths.tolist()):
        events = slice(at, at + length)
        at += length
        k, v = key[events].transpose(0, 1), value[events].transpose(0, 1)
        q, b = query[user].transpose(0, 1), shift[events].T.unsqueeze(1)
        if length == 0 or bool(b.isneginf().all()):
            z = q.new_zeros(q.shape)
        elif config.activation == "softmax":
            z = nn.functional.scaled_dot_product_attention(
                q, k, v, b.expand(-1, q.shape[1], -1), scale=scale
            )
        else:
            assert attention.threshold is not None
            scores = q @ k.transpose(1, 2) * scale + b - attention.threshold.view(-1, 1, 1)
            z = scores.sigmoid() @ v / (length if config.activation == "sigmoid_mean" else 1)
        outputs.append(attention.output(z.transpose(0, 1).flatten(1)))
    return (
        torch.stack(outputs)
        if outputs
        else candidates.new_zeros(0, candidates.shape[1], attention.output_dim)
    )


def _score_shift(
    attention: CodeSpaceAttention,
    lengths: Tensor,
    actions: Tensor | None,
    ages: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """``[E, heads]``: everything that is added to the score of an event."""
    config, heads = attention.config, attention.config.num_heads
    counts = lengths.tolist()
    distance = torch.cat([torch.arange(n - 1, -1, -1) for n in counts]) if counts else torch.zeros(0)
    shift = torch.zeros(len(distance), heads, dtype=dtype)
    if config.terms.alibi:
        shift = shift - distance[:, None] * torch.tensor(
            [2.0 ** (-8 * (h + 1) / heads) for h in range(heads)]
        )
    if attention.terms.recency is not None:
        columns = attention.terms.columns(lengths, len(distance), actions, ages)
        column = columns[1 if config.terms.num_actions else 0]
        shift = shift + attention.terms.recency.T[column.long()]
    if bias is not None:
        shift = shift + (bias.unsqueeze(1) if bias.dim() == 1 else bias)
    if mask is not None:
        shift = shift.masked_fill(~mask.unsqueeze(1), -torch.inf)
    return shift
