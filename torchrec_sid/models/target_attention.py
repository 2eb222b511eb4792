"""Target attention over a jagged history: what in this user's past speaks for this candidate?"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchrec import JaggedTensor, KeyedJaggedTensor

from torchrec_sid.ages import HISTORY_AGES
from torchrec_sid.errors import SidError


@dataclass(frozen=True)
class HistoryConfig:
    """How a history is summarised.

    Raises:
        SidError: ``heads`` does not divide ``dim``, or a size below 1.
    """

    dim: int = 32
    """Width D of event vectors and of each summary."""
    heads: int = 4
    """Attention heads."""
    actions: int = 8
    """Number of distinct actions (labels, ratings) an event may carry."""
    ages: int = HISTORY_AGES
    """Number of log2-seconds buckets of an event's age."""
    pools: int = 2
    """Query-free sums of event vectors, each weighted by a learned scalar per action."""
    max_length: int = 64
    """Events per user that the batch holds at most."""
    recent: int = 64
    """Where the batch holds more, there are summaries of these most recent events beside those of all."""

    def __post_init__(self) -> None:
        sizes = (self.dim, self.heads, self.actions, self.ages, self.max_length, self.recent)
        if min(sizes) < 1 or self.pools < 0:
            raise SidError("HistoryConfig", f"{self}", "Sizes must be positive.")
        if self.dim % self.heads:
            raise SidError("HistoryConfig", f"{self.heads} heads, dim {self.dim}", "Let heads divide dim.")

    @property
    def windows(self) -> tuple[int, ...]:
        """Most recent events that each group of summaries sees, ascending."""
        return (*((self.recent,) if self.recent < self.max_length else ()), self.max_length)


class TargetAttention(nn.Module):
    """Summaries of a history for one candidate per user.

    An event is ``e_i = content_i + action[a_i] + age[g_i]``. The key projection is absorbed into the
    query and the value projection into the output, so that no projection runs per event:

        score_i = (W_k,h^T W_q,h t) . e_i / sqrt(D / heads)      out_h = W_v,h sum_i softmax(score)_i e_i

    which equals multi-head attention with keys ``W_k e`` and values ``W_v e``. The pools add
    ``sum_i gate[a_i, p] content_i / sqrt(n)``: with a positive gate for liked and a negative one for
    disliked events their product with the candidate is an item-to-item model. Every window of recent events
    has these summaries, with the same parameters: in a long one recent events are few among many.

    Args:
        config: sizes.
        device: where the parameters live.
    """

    def __init__(self, config: HistoryConfig, device: torch.device | None = None) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.action = nn.Embedding(config.actions, dim, device=device)
        self.age = nn.Embedding(config.ages, dim, device=device)
        self.query = nn.Linear(dim, dim, device=device)
        self.key = nn.Linear(dim, dim, bias=False, device=device)
        self.value = nn.Linear(dim, dim, device=device)
        self.gate = nn.Embedding(config.actions, config.pools, device=device) if config.pools else None
        nn.init.normal_(self.action.weight, std=0.1)
        nn.init.normal_(self.age.weight, std=0.05)
        if self.gate is not None:
            nn.init.normal_(self.gate.weight, std=0.5)

    @property
    def summaries(self) -> int:
        """Number of ``[B, D]`` summaries that :meth:`forward` returns."""
        return len(self.config.windows) * (2 + self.config.pools)

    def forward(self, target: Tensor, content: JaggedTensor | None, features: KeyedJaggedTensor) -> Tensor:
        """Summarise each user's history.

        Args:
            target: ``[B, D]`` the candidate.
            content: one ``[D]`` vector per event, or None where events carry no item feature (and there
                are no pools).
            features: holds ``history_action`` and ``history_age``, int64, one value per event.

        Returns:
            ``[B, windows (2 + pools), D]``: attended, mean of events, gated pools, each for every window.

        Raises:
            SidError: pools without content.
        """
        if self.gate is not None and content is None:
            raise SidError("pools", f"{self.config.pools} without content", "Set pools=0.")
        actions = features["history_action"]
        lengths, offsets, action = actions.lengths(), actions.offsets(), actions.values()
        whole = lengths.is_cuda or torch.compiler.is_compiling()
        bound = self.config.max_length if whole else max(1, int(lengths.max()))

        def padded(values: Tensor) -> Tensor:
            return torch.ops.fbgemm.jagged_to_padded_dense(values, [offsets], [bound], 0.0)

        # One row per pair of action and age: half the gathering of two tables, forward and backward.
        pairs = (self.action.weight.unsqueeze(1) + self.age.weight).flatten(0, 1)
        pair = action * self.config.ages + features["history_age"].values()
        events = padded(torch.nn.functional.embedding(pair, pairs))
        seen = self._seen(lengths, bound)
        count = seen.sum(dim=2, keepdim=True).clamp(min=1).to(events.dtype)
        pools = []
        if content is not None:
            vectors = padded(content.values())
            events = events + vectors
            if self.gate is not None:
                gates = padded(self.gate(action)).transpose(1, 2)
                gated = (gates.unsqueeze(1) * seen.unsqueeze(2)).flatten(1, 2) @ vectors
                pools = [gated / count.sqrt().repeat_interleave(self.config.pools, dim=1)]
        weights = self._weights(target, events, seen)
        sizes = [weights.shape[1], seen.shape[1]]
        attended, mean = (torch.cat([weights, seen / count], dim=1) @ events).split(sizes, dim=1)
        return torch.cat([self._values(attended, lengths), mean, *pools], dim=1)

    def _seen(self, lengths: Tensor, bound: int) -> Tensor:
        """``[B, windows, bound]`` bool: whether a window of a user holds the event."""
        # 1 for a user's newest event, 0 and less for padding.
        rank = lengths.unsqueeze(1) - torch.arange(bound, device=lengths.device)
        return torch.stack([(rank > 0) & (rank <= window) for window in self.config.windows], dim=1)

    def _weights(self, target: Tensor, events: Tensor, seen: Tensor) -> Tensor:
        """``[B, windows heads, n]``: softmax over the events of each user that a window sees."""
        batch, _, dim = events.shape
        heads, width = self.config.heads, dim // self.config.heads
        query = self.query(target).view(batch, heads, width)
        absorbed = torch.einsum("bhw,hwd->bhd", query, self.key.weight.view(heads, width, dim))
        scores = absorbed @ events.transpose(1, 2) / math.sqrt(width)
        seen = seen.unsqueeze(2)
        return (scores.unsqueeze(1).masked_fill(~seen, -1e9).softmax(dim=-1) * seen).flatten(1, 2)

    def _values(self, pooled: Tensor, lengths: Tensor) -> Tensor:
        """``[B, windows heads, D]`` weighted sums of events -> ``[B, windows, D]``."""
        dim, heads = pooled.shape[2], self.config.heads
        weight = self.value.weight.view(heads, dim // heads, dim)
        value = torch.einsum("bnhd,hwd->bnhw", pooled.unflatten(1, (-1, heads)), weight).flatten(2)
        # The bias is weighted like the values: an empty history attends to nothing, bias included.
        return value + self.value.bias * (lengths > 0).view(-1, 1, 1)
