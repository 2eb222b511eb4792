"""What a channel tells the interaction: the candidate, and summaries of the history for it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchrec import JaggedTensor, KeyedJaggedTensor

from torchrec_sid.data.batch import HISTORY_AGES
from torchrec_sid.models.embedder import Embedder
from torchrec_sid.models.encoder import HistoryEncoder
from torchrec_sid.models.history import TargetAttention
from torchrec_sid.side.attention import CodeSpaceAttention, CodeSpaceAttentionConfig
from torchrec_sid.side.basis import FrozenBasis
from torchrec_sid.side.features import SideFeatures, SideFeaturesConfig
from torchrec_sid.side.similarity import SimilarityFeatures
from torchrec_sid.side.terms import EventTermsConfig


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
    """SIDE: the candidate as a linear map of its digits, its history attended in code space.

    No table and no event vector: a :class:`~torchrec_sid.side.attention.CodeSpaceAttention` reads the
    packed SIDs, and parameter-free similarity features compare the candidate with what the user liked.

    Args:
        basis: the frozen decoder of the SIDs.
        dim: D, width of each field.
        heads: of the attention; divides ``dim``.
        action_values: ``[actions]`` how much an action speaks for an item, within -1 .. 1.
        history: read the history; without it only the candidate is embedded.
        calibration: ``[n, nbytes]`` uint8 SIDs that occur, by which features are centred and scaled.
        device: of the parameters.
    """

    action_values: Tensor

    def __init__(
        self,
        basis: FrozenBasis,
        dim: int,
        heads: int,
        action_values: Tensor,
        *,
        history: bool = True,
        calibration: Tensor | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(fields=1)
        self.features = side_features(basis, calibration, device)
        self.projection = nn.Linear(self.features.dim, dim, device=device)
        self.attention: CodeSpaceAttention | None = None
        self.similarity: SimilarityFeatures | None = None
        self.register_buffer("action_values", action_values.float().to(self.features.table.device))
        if not history:
            return
        self.attention = CodeSpaceAttention(
            basis,
            CodeSpaceAttentionConfig(
                query_dim=dim,
                num_heads=heads,
                head_dim=dim // heads,
                terms=EventTermsConfig(num_actions=len(action_values), age_buckets=HISTORY_AGES),
            ),
            device=device,
        )
        self.similarity = SimilarityFeatures(basis, device=device)
        self.fields, self.numbers = 2, len(self.similarity.names)

    def forward(
        self, features: KeyedJaggedTensor, item_bytes: Tensor, history_bytes: Tensor
    ) -> ChannelOutput:
        """``[B, 2, D]``: candidate and attended history; ``[B, k]`` similarity features."""
        target = self.projection(self.features(item_bytes)).unsqueeze(1)
        if self.attention is None or self.similarity is None:
            return ChannelOutput(target)
        action = features["history_action"]
        actions, lengths = action.values(), action.lengths()
        ages = features["history_age"].values()
        attended = self.attention(target, history_bytes, lengths, actions=actions, ages=ages)
        numbers = self.similarity(item_bytes, history_bytes, lengths, self.action_values[actions])
        return ChannelOutput(torch.cat([target, attended], dim=1), numbers)


def side_features(
    basis: FrozenBasis, calibration: Tensor | None, device: torch.device | None
) -> SideFeatures:
    """One-hot features of SIDs: as expressive as a learned table per digit."""
    features = SideFeatures(basis.spec, SideFeaturesConfig(kind="one_hot"), device=device)
    return features if calibration is None else features.calibrate(calibration)
