"""What a channel tells the interaction: the candidate, and summaries of the history for it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchrec import JaggedTensor, KeyedJaggedTensor

from torchrec_sid.models.embedder import Embedder
from torchrec_sid.models.encoder import HistoryEncoder
from torchrec_sid.models.history import HistoryConfig, TargetAttention
from torchrec_sid.side.attention import CodeSpaceAttention, CodeSpaceAttentionConfig
from torchrec_sid.side.basis import FrozenBasis
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

    def forward(
        self, features: KeyedJaggedTensor, item_bytes: Tensor | None, history_bytes: Tensor | None
    ) -> ChannelOutput:
        """``[B, summaries, D]``."""
        lengths = features["history_action"].lengths()
        target = self.no_item.expand(lengths.shape[0], -1)
        return ChannelOutput(self.attention(target, None, features))


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

    def forward(
        self, features: KeyedJaggedTensor, item_bytes: Tensor | None, history_bytes: Tensor | None
    ) -> ChannelOutput:
        """``[B, 1 + summaries, D]``: the candidate first."""
        target = self.embedder.target(features, item_bytes)
        if self.attention is None:
            return ChannelOutput(target.unsqueeze(1))
        events = self.embedder.events(features, history_bytes)
        if self.encoder is not None:
            events = self.encoder(events, features)
        content = JaggedTensor(events, lengths=features["history_action"].lengths())
        summaries = self.attention(target, content, features)
        return ChannelOutput(torch.cat([target.unsqueeze(1), summaries], dim=1))


class SideChannel(ItemChannel):
    """SIDE: the candidate as a linear map of its digits, its history summarised in code space.

    No table and no event vector: a :class:`~torchrec_sid.side.attention.CodeSpaceAttention` and
    :class:`~torchrec_sid.side.pools.HistoryPools` read the packed SIDs, and parameter-free similarity
    features compare the candidate with what the user liked. Each window of recent events
    (:class:`~torchrec_sid.models.history.HistoryConfig`) has summaries of its own.

    Args:
        basis: the frozen decoder of the SIDs.
        dim: D, width of each field.
        history: how the history is summarised; None: only the candidate is embedded.
        action_values: ``[actions]`` how much an action speaks for an item, within -1 .. 1.
        calibration: ``[n, nbytes]`` uint8 SIDs that occur, by which features are centred and scaled.
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
        calibration: Tensor | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(fields=1)
        self.features = side_features(basis, calibration, device)
        self.projection = nn.Linear(self.features.dim, dim, device=device)
        self.history = history
        self.register_buffer("action_values", action_values.float().to(self.features.table.device))
        if history is None:
            return
        windows = len(history.windows)
        self.attention = CodeSpaceAttention(
            basis,
            CodeSpaceAttentionConfig(
                query_dim=dim,
                num_heads=windows * history.heads,
                head_dim=dim // history.heads,
                output_dim=windows * dim,
                terms=EventTermsConfig(num_actions=history.actions, age_buckets=history.ages),
            ),
            device=device,
        )
        self.pools = HistoryPools(
            self.features.dim, dim, history.actions, history.ages, history.pools, history.windows, device
        )
        self.similarity = SimilarityFeatures(basis, device=device)
        self.fields = 1 + windows + self.pools.summaries
        self.numbers = windows * len(self.similarity.names)

    def forward(
        self, features: KeyedJaggedTensor, item_bytes: Tensor, history_bytes: Tensor
    ) -> ChannelOutput:
        """``[B, 1 + windows (2 + pools), D]``: the candidate first; ``[B, k]`` similarity features."""
        target = self.projection(self.features(item_bytes)).unsqueeze(1)
        history = self.history
        if history is None:
            return ChannelOutput(target)
        action = features["history_action"]
        actions, lengths = action.values(), action.lengths()
        ages = features["history_age"].values()
        labels = self.action_values[actions]
        numbers = [self.similarity(item_bytes, history_bytes, lengths, labels)]
        hidden = None
        if len(history.windows) > 1:
            old = events_from_newest(lengths, actions.shape[0]) >= history.recent
            # The first half of the heads sees recent events only.
            hidden = torch.zeros(actions.shape[0], 2 * history.heads, device=old.device)
            hidden[:, : history.heads].masked_fill_(old.unsqueeze(1), -torch.inf)
            recent = lengths.clamp_max(history.recent)
            kept = (~old).nonzero().squeeze(1)  # its size is data: a GPU waits for it once
            numbers.append(self.similarity(item_bytes, history_bytes[kept], recent, labels[kept]))
        attended = self.attention(target, history_bytes, lengths, actions=actions, ages=ages, bias=hidden)
        attended = attended.unflatten(2, (len(history.windows), -1)).flatten(1, 2)
        pooled = self.pools(self.features, history_bytes, lengths, actions, ages)
        return ChannelOutput(torch.cat([target, attended, pooled], dim=1), torch.cat(numbers, dim=1))


def side_features(
    basis: FrozenBasis, calibration: Tensor | None, device: torch.device | None
) -> SideFeatures:
    """One-hot features of SIDs: as expressive as a learned table per digit."""
    features = SideFeatures(basis.spec, SideFeaturesConfig(kind="one_hot"), device=device)
    return features if calibration is None else features.calibrate(calibration)
