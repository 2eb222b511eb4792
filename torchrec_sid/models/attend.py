"""What a channel tells the interaction: the candidate, and summaries of the history for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchrec import JaggedTensor, KeyedJaggedTensor

from torchrec_sid.models.embedder import Embedder
from torchrec_sid.models.encoder import HistoryEncoder
from torchrec_sid.models.request_rows import RequestRows, restore
from torchrec_sid.models.target_attention import HistoryConfig, TargetAttention
from torchrec_sid.side.basis import FrozenBasis
from torchrec_sid.side.code_space_attention import CodeSpaceAttention, CodeSpaceAttentionConfig
from torchrec_sid.side.features import SideFeatures, SideFeaturesConfig
from torchrec_sid.side.pools import HistoryPools
from torchrec_sid.side.similarity import SimilarityFeatures
from torchrec_sid.side.terms import EventTermsConfig, events_from_newest


class ChannelOutput(NamedTuple):
    """What one channel contributes."""

    fields: Tensor
    """``[B, n, D]`` for the interaction."""
    numbers: Tensor | None = None
    """``[B, k]`` further dense features."""


class ItemChannel(nn.Module):
    """A channel as a module.

    Args:
        fields: number of ``[B, D]`` fields that it contributes.
        numbers: number of dense features that it contributes.
    """

    def __init__(self, fields: int, numbers: int = 0) -> None:
        super().__init__()
        self.fields, self.numbers = fields, numbers


class EventsOnly(ItemChannel):
    """The history without any item: what was done, and when.

    Args:
        attention: over actions and ages, without pools.
    """

    def __init__(self, attention: TargetAttention) -> None:
        super().__init__(attention.summaries)
        self.attention = attention
        device = attention.query.weight.device
        self.no_item = nn.Parameter(torch.zeros(attention.config.dim, device=device))

    def forward(self, features: KeyedJaggedTensor, rows: Mapping[str, Tensor]) -> ChannelOutput:
        """``[B, summaries, D]``."""
        lengths = features["history_action"].lengths()
        target = self.no_item.expand(lengths.shape[0], -1)
        return ChannelOutput(self.attention(target, None, features, rows))


class EmbeddedChannel(ItemChannel):
    """A vector for the candidate and one per event, target attention over them.

    Args:
        embedder: candidate and events -> vectors.
        attention: the summaries; None: the model reads no history.
        encoder: lets events see those before them first; None: they stand for themselves.
    """

    def __init__(
        self, embedder: Embedder, attention: TargetAttention | None, encoder: HistoryEncoder | None = None
    ) -> None:
        super().__init__(1 + (attention.summaries if attention is not None else 0))
        self.embedder = embedder
        self.attention = attention
        self.encoder = encoder

    def forward(self, features: KeyedJaggedTensor, rows: Mapping[str, Tensor]) -> ChannelOutput:
        """``[B, 1 + summaries, D]``: the candidate first."""
        target = self.embedder.target(features, rows)
        if self.attention is None:
            return ChannelOutput(target.unsqueeze(1))
        events = self.embedder.events(features, rows)
        if self.encoder is not None:
            events = self.encoder(events, features, rows)
        content = JaggedTensor(events, lengths=features["history_action"].lengths())
        summaries = self.attention(target, content, features, rows)
        return ChannelOutput(torch.cat([target.unsqueeze(1), summaries], dim=1))


class PackedHistory(NamedTuple):
    """Events of packed SIDs, user after user, each user's oldest first."""

    sids: Tensor
    """``[E, nbytes]`` uint8."""
    lengths: Tensor
    """``[B]`` integers that sum to E."""
    actions: Tensor
    """``[E]`` int64."""
    ages: Tensor
    """``[E]`` int64."""

    def newest(self, count: int) -> PackedHistory:
        """The last ``count`` events of each user."""
        distance = events_from_newest(self.lengths, self.actions.shape[0])
        kept = (distance < count).nonzero().squeeze(1)  # its size is data: a GPU is waited for once
        lengths = self.lengths.clamp_max(count)
        return PackedHistory(self.sids[kept], lengths, self.actions[kept], self.ages[kept])


class SideChannel(ItemChannel):
    """SIDE: the candidate as a linear map of its digits, its history summarised in code space.

    No table and no event vector: for each window of recent events
    (:class:`~torchrec_sid.models.target_attention.HistoryConfig`) a
    :class:`~torchrec_sid.side.code_space_attention.CodeSpaceAttention` and parameter-free similarity
    features, which compare the candidate with what the user liked, read the packed SIDs. The first window,
    the most recent events, has :class:`~torchrec_sid.side.pools.HistoryPools` too.

    Args:
        basis: the frozen decoder of the SIDs.
        dim: D, width of each field.
        history: how the history is summarised; None: only the candidate is embedded.
        action_values: ``[actions]`` how much an action speaks for an item, within -1 .. 1.
        item_bytes: ``[N, nbytes]`` uint8 packed SIDs of the items; features are centred and scaled by them.
        device: of the parameters.
    """

    action_values: Tensor

    def __init__(
        self,
        basis: FrozenBasis,
        dim: int,
        history: HistoryConfig | None,
        action_values: Tensor,
        *,
        item_bytes: Tensor | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(fields=1)
        self.features = side_features(basis, item_bytes, device)
        self.projection = nn.Linear(self.features.dim, dim, device=device)
        self.windows: tuple[int, ...] = ()
        self.register_buffer("action_values", action_values.float().to(self.features.table.device))
        if history is None:
            return
        self.windows = history.windows
        attention = CodeSpaceAttentionConfig(
            query_dim=dim,
            num_heads=history.heads,
            head_dim=dim // history.heads,
            terms=EventTermsConfig(num_actions=history.actions, age_buckets=history.ages),
        )
        self.attentions = nn.ModuleList(
            CodeSpaceAttention(basis, attention, device=device) for _ in self.windows
        )
        self.pools = HistoryPools(
            self.features.dim, dim, history.actions, history.ages, history.pools, device
        )
        self.similarity = SimilarityFeatures(basis, device=device)
        self.fields = 1 + len(self.windows) + self.pools.summaries
        self.numbers = len(self.windows) * len(self.similarity.names)

    def forward(self, features: KeyedJaggedTensor, rows: Mapping[str, Tensor]) -> ChannelOutput:
        """``[B, 2 + pools + windows, D]``: the candidate first; ``[B, k]`` similarity features."""
        # Code-space operators compute in float32. In an exported graph a context would be in the way.
        kind = self.action_values.device.type
        if not torch.is_autocast_enabled(kind):
            return self._forward(features, rows)
        with torch.autocast(kind, enabled=False):
            return self._forward(features, rows)

    def _forward(self, features: KeyedJaggedTensor, rows: Mapping[str, Tensor]) -> ChannelOutput:
        item_bytes = rows["item_bytes"]
        target = self.projection(self.features(item_bytes)).unsqueeze(1)
        if not self.windows:
            return ChannelOutput(target)
        requests = RequestRows.of(rows)
        if requests is None:
            fields, numbers = self._summaries(target, item_bytes, _packed(features, rows), None)
            return ChannelOutput(torch.cat([target, *fields], dim=1), torch.cat(numbers, dim=1))
        order = requests.order()
        events = _packed(features, rows)._replace(lengths=requests.lengths(features))
        fields, numbers = self._summaries(target[order], item_bytes[order], events, requests)
        whole = [restore(torch.cat(parts, dim=1), order) for parts in (fields, numbers)]
        return ChannelOutput(torch.cat([target, whole[0]], dim=1), whole[1])

    def _summaries(
        self, target: Tensor, item_bytes: Tensor, events: PackedHistory, requests: RequestRows | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """``[B, n, D]`` fields and ``[B, k]`` numbers of the history, for candidates user after user.

        Args:
            target: ``[B, 1, D]``.
            item_bytes: ``[B, nbytes]``.
            events: of each candidate, or of each request.
            requests: those; None: each candidate has a history of its own.
        """
        fields, numbers = [], []
        counts = None if requests is None else requests.counts()
        for window, attention in zip(self.windows, self.attentions, strict=True):
            seen = events if window == self.windows[-1] else events.newest(window)
            terms = {"actions": seen.actions, "ages": seen.ages}
            labels = self.action_values[seen.actions]
            if counts is None:
                fields.append(attention(target, seen.sids, seen.lengths, **terms))
            else:
                found = attention(target.squeeze(1), seen.sids, seen.lengths, **terms, counts=counts)
                fields.append(found.unsqueeze(1))
            if window == self.windows[0]:
                pooled = self.pools(self.features, *seen)
                if counts is not None:
                    pooled = pooled.repeat_interleave(counts, dim=0, output_size=target.shape[0])
                fields.append(pooled)
            numbers.append(self.similarity(item_bytes, seen.sids, seen.lengths, labels, counts))
        return fields, numbers


def _packed(features: KeyedJaggedTensor, rows: Mapping[str, Tensor]) -> PackedHistory:
    action = features["history_action"]
    ages = features["history_age"].values()
    return PackedHistory(rows["history_bytes"], action.lengths(), action.values(), ages)


def side_features(
    basis: FrozenBasis, item_bytes: Tensor | None, device: torch.device | None
) -> SideFeatures:
    """One-hot features of SIDs, as expressive as a learned table per digit; centred and scaled by those of
    the items, ``[N, nbytes]`` uint8, where they are given."""
    features = SideFeatures(basis.spec, SideFeaturesConfig(kind="one_hot"), device=device)
    return features if item_bytes is None else features.calibrate(item_bytes)
