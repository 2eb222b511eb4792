"""Target attention over a jagged history: what in this user's past speaks for this candidate?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchrec import JaggedTensor, KeyedJaggedTensor

from torchrec_sid.ages import HISTORY_AGES
from torchrec_sid.errors import SidError
from torchrec_sid.models.request_rows import RequestRows, restore
from torchrec_sid.models.user_attention import attend_by_user
from torchrec_sid.side.terms import events_from_newest


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
    """Summaries of a history for a candidate; the rows of a request may share one.

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

    def forward(
        self,
        target: Tensor,
        content: JaggedTensor | None,
        features: KeyedJaggedTensor,
        rows: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Summarise each candidate's history.

        Args:
            target: ``[B, D]`` the candidate.
            content: one ``[D]`` vector per event, or None where events carry no item feature (and there
                are no pools).
            features: holds ``history_action`` and ``history_age``, int64, one value per event.
            rows: the batch's; they may hold a :class:`~torchrec_sid.models.request_rows.RequestRows`.

        Returns:
            ``[B, windows (2 + pools), D]``: attended, mean of events, gated pools, each for every window.

        Raises:
            SidError: pools without content.
        """
        if self.gate is not None and content is None:
            raise SidError("pools", f"{self.config.pools} without content", "Set pools=0.")
        requests = RequestRows.of(rows)
        if requests is not None:
            return self._by_request(target, content, features, requests)
        actions = features["history_action"]
        lengths, offsets = actions.lengths(), actions.offsets()
        whole = lengths.is_cuda or torch.compiler.is_compiling()
        bound = self.config.max_length if whole else max(1, int(lengths.max()))

        def padded(values: Tensor) -> Tensor:
            return torch.ops.fbgemm.jagged_to_padded_dense(values, [offsets], [bound], 0.0)

        events = padded(self._terms(features))
        seen = self._seen(lengths, bound)
        count = seen.sum(dim=2, keepdim=True).clamp(min=1).to(events.dtype)
        pools = []
        if content is not None:
            vectors = padded(content.values())
            events = events + vectors
            if self.gate is not None:
                gates = padded(self.gate(actions.values())).transpose(1, 2)
                gated = (gates.unsqueeze(1) * seen.unsqueeze(2)).flatten(1, 2) @ vectors
                pools = [gated / count.sqrt().repeat_interleave(self.config.pools, dim=1)]
        weights = self._weights(target, events, seen)
        sizes = [weights.shape[1], seen.shape[1]]
        attended, mean = (torch.cat([weights, seen / count], dim=1) @ events).split(sizes, dim=1)
        return torch.cat([self._values(attended, lengths), mean, *pools], dim=1)

    def _by_request(
        self,
        target: Tensor,
        content: JaggedTensor | None,
        features: KeyedJaggedTensor,
        requests: RequestRows,
    ) -> Tensor:
        """:meth:`forward`, with every event read once for all candidates of its request."""
        lengths, windows = requests.lengths(features), self.config.windows
        vectors = None if content is None else content.values()
        events = self._terms(features)
        events = events if vectors is None else events + vectors
        order, (batch, dim) = requests.order(), target.shape
        scale = (dim // self.config.heads) ** -0.5
        absorbed = self._absorbed(target[order])
        attended = attend_by_user(absorbed, events, lengths, requests.counts(), windows, scale)
        attended = restore(attended, order).view(batch, -1, dim)
        parts = [self._values(attended, lengths[requests.request])]
        count = torch.stack([lengths.clamp(1, window) for window in windows], dim=1).to(events.dtype)
        mean = self._sums(events, lengths) / count.unsqueeze(2)
        parts.append(mean[requests.request])
        if vectors is not None and self.gate is not None:
            gates = self.gate(features["history_action"].values())
            gated = self._sums((gates.unsqueeze(2) * vectors.unsqueeze(1)).flatten(1), lengths)
            gated = gated / count.sqrt().unsqueeze(2)
            parts.append(gated.unflatten(2, (-1, dim)).flatten(1, 2)[requests.request])
        return torch.cat(parts, dim=1)

    def _terms(self, features: KeyedJaggedTensor) -> Tensor:
        """``[events, D]``: what action and age add to each event."""
        # One row per pair of action and age: half the gathering of two tables, forward and backward.
        pairs = (self.action.weight.unsqueeze(1) + self.age.weight).flatten(0, 1)
        action, age = features["history_action"].values(), features["history_age"].values()
        return torch.nn.functional.embedding(action * self.config.ages + age, pairs)

    def _sums(self, values: Tensor, lengths: Tensor) -> Tensor:
        """``[events, n]`` -> ``[U, windows, n]``: sums over the events that each window sees."""
        events, users = values.shape[0], lengths.shape[0]
        rows = torch.arange(users, device=lengths.device)
        user = torch.repeat_interleave(rows, lengths, output_size=events)
        distance = events_from_newest(lengths, events).unsqueeze(1)
        empty = values.new_zeros(users, values.shape[1])
        sums = [empty.index_add(0, user, values * (distance < window)) for window in self.config.windows]
        return torch.stack(sums, dim=1)

    def _absorbed(self, target: Tensor) -> Tensor:
        """``[B, D]`` -> ``[B, heads, D]``: queries that score events themselves, in place of their keys."""
        dim, heads = target.shape[1], self.config.heads
        query = self.query(target).view(-1, heads, dim // heads)
        return torch.einsum("bhw,hwd->bhd", query, self.key.weight.view(heads, dim // heads, dim))

    def _seen(self, lengths: Tensor, bound: int) -> Tensor:
        """``[B, windows, bound]`` bool: whether a window of a user holds the event."""
        # 1 for a user's newest event, 0 and less for padding.
        rank = lengths.unsqueeze(1) - torch.arange(bound, device=lengths.device)
        return torch.stack([(rank > 0) & (rank <= window) for window in self.config.windows], dim=1)

    def _weights(self, target: Tensor, events: Tensor, seen: Tensor) -> Tensor:
        """``[B, windows heads, n]``: softmax over the events of each user that a window sees."""
        width = self.config.dim // self.config.heads
        scores = self._absorbed(target) @ events.transpose(1, 2) / math.sqrt(width)
        seen = seen.unsqueeze(2)
        return (scores.unsqueeze(1).masked_fill(~seen, -1e9).softmax(dim=-1) * seen).flatten(1, 2)

    def _values(self, pooled: Tensor, lengths: Tensor) -> Tensor:
        """``[B, windows heads, D]`` weighted sums of events -> ``[B, windows, D]``."""
        dim, heads = pooled.shape[2], self.config.heads
        weight = self.value.weight.view(heads, dim // heads, dim)
        value = torch.einsum("bnhd,hwd->bnhw", pooled.unflatten(1, (-1, heads)), weight).flatten(2)
        # The bias is weighted like the values: an empty history attends to nothing, bias included.
        return value + self.value.bias * (lengths > 0).view(-1, 1, 1)
