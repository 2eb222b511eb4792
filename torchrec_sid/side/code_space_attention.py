"""`CodeSpaceAttention`: target attention over histories of packed SIDs that never decodes an event.

With events ``x_i = mean + D q_i + (event terms)``, keys ``W_k x_i`` and values ``W_v x_i``, the score of an
event is linear in its digits, and so is what it adds to the output:

    score_i = (D^T W_k^T W_q t) . q_i / sqrt(d_k)      z = sum_i softmax(score)_i q_i      out = W_o W_v D z

So the query is brought into digit space once per candidate, the history is read once as packed bytes, and
one vector per candidate and head is decoded. Exact up to rounding; event terms are further columns.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from math import sqrt
from typing import Literal

import torch
from torch import Tensor, nn

from torchrec_sid.devices import buffer_device
from torchrec_sid.errors import SidError
from torchrec_sid.side.basis import FrozenBasis
from torchrec_sid.side.event_layout import event_columns
from torchrec_sid.side.kernels.arguments import check_lengths
from torchrec_sid.side.kernels.attention_operator import BACKENDS, Backend, code_attention
from torchrec_sid.side.terms import EventTerms, EventTermsConfig

# Below this many features W_k D is formed first, above it each query is brought to d dimensions first.
_FEW_FEATURES = 512


@dataclass(frozen=True)
class CodeSpaceAttentionConfig:
    """Shape of a :class:`CodeSpaceAttention`."""

    query_dim: int
    """Dimension of a candidate vector."""
    num_heads: int = 4
    head_dim: int | None = None
    """Dimension of keys and values per head; None: basis dim / num_heads."""
    output_dim: int | None = None
    """None: query_dim."""
    bias: bool = True
    """Biases of query, value and output projections. (A key bias shifts all scores of a row alike, which
    a softmax ignores.)"""
    activation: Literal["softmax", "sigmoid", "sigmoid_mean"] = "softmax"
    """Weights over the history: softmax; sigmoid, not normalised, as in DIN (1706.06978); or sigmoid
    divided by the number of events, which keeps the scale over lengths 0 to 10^4. The sigmoids learn a
    score threshold per head."""
    scale: float | None = None
    """Of the scores; None: 1 / sqrt(head_dim)."""
    terms: EventTermsConfig = field(default_factory=EventTermsConfig)
    backend: Backend = "auto"
    """auto: the Triton kernel on a GPU, the compiled kernel on a CPU; torch where they cannot be had.
    triton_bf16 rounds queries and weights to bfloat16, which a GPU multiplies three times as fast."""
    validate: bool = False
    """On a GPU, check codes and lengths by value at every call (waits for the device); a CPU always does.
    Unchecked, corrupt input makes the output of the users concerned NaN."""

    def __post_init__(self) -> None:
        for name in ("query_dim", "num_heads"):
            if getattr(self, name) < 1:
                raise SidError(
                    f"CodeSpaceAttentionConfig.{name}", str(getattr(self, name)), "Choose 1 or more."
                )
        if self.activation not in ("softmax", "sigmoid", "sigmoid_mean"):
            raise SidError(
                "CodeSpaceAttentionConfig.activation",
                repr(self.activation),
                "Choose softmax, sigmoid or sigmoid_mean.",
            )
        if self.backend not in BACKENDS:
            raise SidError(
                "CodeSpaceAttentionConfig.backend",
                repr(self.backend),
                f"Choose one of {', '.join(BACKENDS)}.",
            )


class CodeSpaceAttention(nn.Module):
    """Multi-head attention of m candidates over a jagged history of packed SIDs.

    Equal, in output and in every gradient, to decoding the history with the frozen basis, adding the event
    terms, and multi-head scaled dot-product attention. An empty (or wholly masked) history gives the bias
    of the output projection.

    Args:
        basis: the frozen decoder of the SIDs.
        config: shape and event terms.
        device: of parameters; frozen buffers stay on a real device when this is meta.

    Raises:
        SidError: heads that do not divide the basis dim.

    Example:
        >>> from torchrec_sid import SidSpec
        >>> spec = SidSpec((3,) * 25)
        >>> basis = FrozenBasis.from_digits(spec, torch.randn(25, 64))
        >>> attention = CodeSpaceAttention(basis, CodeSpaceAttentionConfig(query_dim=32))
        >>> history = spec.pack_bytes(torch.randint(3, (7, 25)))  # 3 events of one user, 4 of another
        >>> attention(torch.randn(2, 5, 32), history, torch.tensor([3, 4])).shape
        torch.Size([2, 5, 32])
    """

    rows: Tensor
    mean: Tensor | None

    def __init__(
        self,
        basis: FrozenBasis,
        config: CodeSpaceAttentionConfig,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.spec, self.config, heads = basis.spec, config, config.num_heads
        if config.head_dim is None and basis.dim % heads:
            raise SidError(
                "CodeSpaceAttentionConfig.num_heads",
                f"{heads} heads for a basis of {basis.dim} dimensions",
                "Choose a divisor, or set head_dim.",
            )
        self.head_dim = config.head_dim or basis.dim // heads
        self.output_dim = config.output_dim or config.query_dim
        self.layout = basis.layout.with_terms(*config.terms.sizes)
        inner, place = heads * self.head_dim, buffer_device(device)
        self.register_buffer("rows", basis.rows().to(place))
        self.register_buffer("mean", None if basis.mean is None else basis.mean.to(place, copy=True))
        self.query = nn.Linear(config.query_dim, inner, bias=config.bias, device=device)
        self.key = nn.Linear(basis.dim, inner, bias=False, device=device)
        self.value = nn.Linear(basis.dim, inner, bias=config.bias, device=device)
        self.output = nn.Linear(inner, self.output_dim, bias=config.bias, device=device)
        self.threshold: nn.Parameter | None = None
        if config.activation != "softmax":
            self.threshold = nn.Parameter(torch.zeros(heads, device=device))
        self.terms = EventTerms(config.terms, basis.dim, heads, device=device)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform projections, zero biases, as in ``nn.MultiheadAttention``."""
        for projection in (self.query, self.key, self.value, self.output):
            nn.init.xavier_uniform_(projection.weight)
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)
        if self.threshold is not None:
            nn.init.zeros_(self.threshold)
        self.terms.reset_parameters()

    def forward(
        self,
        candidates: Tensor,
        history_bytes: Tensor,
        lengths: Tensor,
        actions: Tensor | None = None,
        ages: Tensor | None = None,
        bias: Tensor | None = None,
        mask: Tensor | None = None,
        counts: Tensor | None = None,
        limits: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            candidates: ``[B, m, query_dim]`` float; with ``counts`` ``[C, query_dim]``, user after user.
            history_bytes: ``[E, nbytes]`` uint8, ``spec.pack_bytes`` of the events, user after user, each
                user's oldest first.
            lengths: ``[B]`` integers that sum to E.
            actions: ``[E]`` integers, where ``terms.num_actions`` is set.
            ages: ``[E]`` numbers in the unit of ``terms.age_boundaries``, or bucket numbers, where
                ``terms.age_boundaries`` or ``terms.age_buckets`` is set.
            bias: ``[E]`` or ``[E, heads]`` float, added to the scores.
            mask: ``[E]`` bool, False where an event is to be ignored.
            counts: ``[B]`` integers, candidates of each user; they sum to C.
            limits: with ``counts``, ``[C]`` integers: a candidate sees that many events of its user, from
                the oldest. So impressions of different moments share one history.

        Returns:
            ``[B, m, output_dim]`` or ``[C, output_dim]``, in the type of ``candidates``. All arithmetic is
            in float32, autocast or not, so that half precision can neither overflow nor round a score.

        Raises:
            SidError: shapes, codes outside the alphabet, lengths that do not sum.
        """
        self._check(candidates, history_bytes, lengths, counts, limits)
        jagged = counts is not None
        if jagged:  # as if all were candidates of one user, but for the operator
            candidates = candidates.unsqueeze(0)
        kind = candidates.device.type
        with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext():
            events = self._events(history_bytes, lengths, actions, ages)
            per_event = self._bias(lengths, history_bytes.shape[0], bias, mask)
            rows = self.rows.float()
            if self.terms.embedding is not None:
                rows = torch.cat([rows, self.terms.embedding.float()])
            query, offset = self._absorb(candidates, rows)
            if jagged and offset is not None:
                offset = offset.squeeze(0)
            z, total, _ = code_attention(
                query.flatten(0, 2) if jagged else query.flatten(1, 2),
                events,
                lengths,
                offset,
                per_event,
                self.layout.text,
                self.config.num_heads,
                "softmax" if self.config.activation == "softmax" else "sigmoid",
                self.config.backend,
                self.config.validate,
                counts,
                limits,
            )
            # How much of the part that all events share (mean, value bias) the output gets.
            weight = (total > 0).to(z.dtype) if self.config.activation == "softmax" else total
            if self.config.activation == "sigmoid_mean":
                seen = lengths if counts is None else torch.repeat_interleave(lengths, counts)
                seen = seen if limits is None else limits
                if jagged:
                    seen = seen.repeat_interleave(self.config.num_heads)
                count = seen.clamp_min(1).to(z.dtype).view(-1, *((1,) * (weight.dim() - 1)))
                z, weight = z / count.unsqueeze(-1), weight / count
            out = self._decode(z.reshape(query.shape), weight.reshape(query.shape[:3]), rows)
            return (out.squeeze(0) if jagged else out).to(candidates.dtype)

    def _absorb(self, candidates: Tensor, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Queries in feature space ``[B, m, heads, F]``, and the part of the score all events share."""
        heads = self.config.num_heads
        scale = self.config.scale or 1 / sqrt(self.head_dim)
        query = _linear(candidates.float(), self.query).unflatten(-1, (heads, self.head_dim)) * scale
        key = self.key.weight.float().unflatten(0, (heads, self.head_dim))
        if rows.shape[0] <= _FEW_FEATURES:
            absorbed = torch.einsum("bmhk,hkf->bmhf", query, key @ rows.T)
        else:
            absorbed = torch.einsum("bmhk,hkd->bmhd", query, key) @ rows.T
        absorbed = self.terms.score_rows(absorbed, self.rows.shape[0])
        if self.threshold is None:
            return absorbed, None  # a softmax does not see what all events share
        shared = -self.threshold.float().expand(query.shape[:3])
        if self.mean is not None:
            shared = shared + torch.einsum("bmhk,hk->bmh", query, key @ self.mean.float())
        return absorbed, shared.flatten(1)

    def _decode(self, z: Tensor, weight: Tensor, rows: Tensor) -> Tensor:
        """``z: [B, m, heads, F]``, ``weight: [B, m, heads]`` -> ``[B, m, output_dim]``."""
        heads = self.config.num_heads
        value = self.value.weight.float().unflatten(0, (heads, self.head_dim))
        constant = None if self.mean is None else value @ self.mean.float()
        if self.value.bias is not None:
            bias = self.value.bias.float().unflatten(0, (heads, self.head_dim))
            constant = bias if constant is None else constant + bias
        if rows.shape[0] <= _FEW_FEATURES:
            collected = torch.einsum("bmhf,hkf->bmhk", z, value @ rows.T)
        else:
            collected = torch.einsum("bmhd,hkd->bmhk", z @ rows, value)
        if constant is not None:
            collected = collected + weight.unsqueeze(-1) * constant
        return _linear(collected.flatten(-2), self.output)

    def _events(
        self, history_bytes: Tensor, lengths: Tensor, actions: Tensor | None, ages: Tensor | None
    ) -> Tensor:
        columns = self.terms.columns(lengths, history_bytes.shape[0], actions, ages)
        events = event_columns(self.spec, history_bytes)
        if not columns:
            return events
        extra = torch.stack(columns, dim=1).to(events.dtype)
        return torch.cat([events, extra], dim=1)

    def _bias(
        self, lengths: Tensor, events: int, bias: Tensor | None, mask: Tensor | None
    ) -> Tensor | None:
        total = self.terms.bias(lengths, events)
        if bias is not None:
            if bias.shape[0] != events or bias.dim() > 2:
                raise SidError(
                    "bias", f"shape {tuple(bias.shape)}", f"Pass [{events}] or [{events}, heads]."
                )
            bias = bias.float().unsqueeze(1) if bias.dim() == 1 else bias.float()
            total = bias if total is None else total + bias
        if mask is not None:
            if mask.dtype != torch.bool or tuple(mask.shape) != (events,):
                raise SidError(
                    "mask", f"{mask.dtype} of shape {tuple(mask.shape)}", f"Pass [{events}] bool."
                )
            hidden = torch.zeros(events, 1, device=mask.device).masked_fill(~mask.unsqueeze(1), -torch.inf)
            total = hidden if total is None else total + hidden
        return total

    def _check(
        self,
        candidates: Tensor,
        history_bytes: Tensor,
        lengths: Tensor,
        counts: Tensor | None,
        limits: Tensor | None,
    ) -> None:
        wanted = ("B", "m") if counts is None else ("C",)
        if candidates.dim() != len(wanted) + 1 or candidates.shape[-1] != self.config.query_dim:
            raise SidError(
                "candidates",
                f"shape {tuple(candidates.shape)}",
                f"Pass [{', '.join(wanted)}, {self.config.query_dim}].",
            )
        if limits is not None and counts is None:
            raise SidError("limits", "given without counts", "Pass the number of candidates of each user.")
        if limits is not None and (self.config.terms.position_buckets or self.config.terms.alibi):
            raise SidError(
                "limits",
                "given to an attention whose terms count from the newest event of a history",
                "Leave out position_buckets and alibi, or give each candidate a history of its own.",
            )
        if (
            history_bytes.dtype != torch.uint8
            or history_bytes.dim() != 2
            or history_bytes.shape[1] != self.spec.nbytes
        ):
            raise SidError(
                "history_bytes",
                f"{history_bytes.dtype} of shape {tuple(history_bytes.shape)}",
                f"This SidSpec packs into [events, {self.spec.nbytes}] uint8 (spec.pack_bytes).",
            )
        users = candidates.shape[0] if counts is None else counts.shape[0]
        if lengths.dim() != 1 or lengths.shape[0] != users:
            raise SidError(
                "lengths",
                f"shape {tuple(lengths.shape)} for {users} users",
                "Pass one length per user.",
            )
        if not (torch.compiler.is_compiling() or lengths.is_cuda or lengths.is_meta):
            check_lengths(lengths.tolist(), history_bytes.shape[0])


def _linear(x: Tensor, layer: nn.Linear) -> Tensor:
    bias = None if layer.bias is None else layer.bias.float()
    return nn.functional.linear(x, layer.weight.float(), bias)
