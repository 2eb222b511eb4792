"""A DLRM with target attention over a history: one backbone for every way to embed an item."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchrec import KeyedJaggedTensor
from torchrec.models.dlrm import DenseArch, OverArch

from torchrec_sid.data.batch import RankingBatch
from torchrec_sid.devices import buffer_device
from torchrec_sid.models.history import HistoryConfig, TargetAttention


class RankingOutput(NamedTuple):
    """What the training wrapper returns beside the loss."""

    loss: Tensor
    """Scalar, detached."""
    logits: Tensor
    """``[B]``, detached."""
    labels: Tensor
    """``[B]``."""
    weights: Tensor
    """``[B]``, 0 for padding."""
    segment: Tensor
    """``[B]`` int64."""


class HistoryDLRM(nn.Module):
    """Dense features, a candidate item and a history of items -> one logit.

    The item collections are anything with the interface of TorchRec's: a stock
    ``EmbeddingBagCollection`` / ``EmbeddingCollection`` over raw ids, their SID counterparts, or content
    towers. ``forward`` is straight-line, so that TorchRec's pipelines can trace it.

    Args:
        candidate: KeyedJaggedTensor -> KeyedTensor ``[B, D]`` of the feature ``item``; None for a model
            without any item feature.
        history: KeyedJaggedTensor -> ``{history_feature: JaggedTensor}``, values ``[events, D]``, or None.
        dense_in_features: F, columns of the dense input.
        config: sizes of the history encoder; its ``dim`` is D. Without ``history`` there are no pools.
        dense_layers, over_layers: hidden widths of the two MLPs.
        history_feature: key of the history in what ``history`` returns.
        dense_statistics: ``[2, F]`` mean and standard deviation of the dense input, which standardise it;
            None leaves it as it is.
        device: where the parameters live.
    """

    def __init__(
        self,
        candidate: nn.Module | None,
        history: nn.Module | None,
        dense_in_features: int,
        config: HistoryConfig,
        dense_layers: tuple[int, ...] = (64,),
        over_layers: tuple[int, ...] = (128, 64),
        history_feature: str = "history",
        dense_statistics: Tensor | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        dim = config.dim
        if history is None:
            config = replace(config, pools=0)
        self.candidate = candidate
        self.history = history
        self.history_feature = history_feature
        self.no_item = nn.Parameter(torch.zeros(dim, device=device)) if candidate is None else None
        self.standardise = (
            None if dense_statistics is None else Standardise(dense_statistics.to(buffer_device(device)))
        )
        self.dense = DenseArch(dense_in_features, [*dense_layers, dim], device=device)
        self.attention = TargetAttention(config, device=device)
        fields = 1 + (candidate is not None) + self.attention.summaries
        self.interaction = DotInteraction(fields)
        self.over = OverArch(self.interaction.out_features(dim), [*over_layers, 1], device=device)

    def forward(self, dense: Tensor, features: KeyedJaggedTensor) -> Tensor:
        """``dense [B, F]`` and the sparse features -> logits ``[B]``."""
        dense_vector = self.dense(dense if self.standardise is None else self.standardise(dense))
        if self.candidate is None:
            assert self.no_item is not None
            target = self.no_item.expand_as(dense_vector)
        else:
            target = self.candidate(features).values()
        content = None if self.history is None else self.history(features)[self.history_feature]
        summaries = self.attention(target, content, features)
        fields = [dense_vector] if self.candidate is None else [dense_vector, target]
        return self.over(self.interaction(fields, summaries)).squeeze(1)


class Standardise(nn.Module):
    """Subtract the mean and divide by the standard deviation of each column, then cut at ``limit``.

    The cut keeps a later period whose values training never saw (a user back after a year) within what the
    model knows.

    Args:
        statistics: ``[2, F]`` mean and standard deviation, kept as a buffer; a column that does not vary is
            only centred.
        limit: largest absolute value that passes, in standard deviations.
    """

    def __init__(self, statistics: Tensor, limit: float = 3.0) -> None:
        super().__init__()
        self.limit = limit
        mean, deviation = statistics.float()
        scale = torch.where(deviation > 0, deviation, 1.0)
        self.register_buffer("statistics", torch.stack([mean, scale]))
        self.statistics: Tensor

    def forward(self, dense: Tensor) -> Tensor:
        """``[B, F]`` -> ``[B, F]``."""
        return ((dense - self.statistics[0]) / self.statistics[1]).clamp(-self.limit, self.limit)


class DotInteraction(nn.Module):
    """The DLRM interaction: every field, and the dot product of every pair of fields.

    Args:
        fields: number n of ``[B, D]`` fields.
    """

    def __init__(self, fields: int) -> None:
        super().__init__()
        self.fields = fields

    def out_features(self, dim: int) -> int:
        """Width of the output for fields of width ``dim``."""
        return self.fields * dim + self.fields * (self.fields - 1) // 2

    def forward(self, single: list[Tensor], stacked: Tensor) -> Tensor:
        """``[B, D]`` fields and ``[B, m, D]`` further ones -> ``[B, n * D + n * (n - 1) / 2]``."""
        fields = torch.cat([torch.stack(single, dim=1), stacked], dim=1)
        products = fields @ fields.transpose(1, 2)
        rows, columns = torch.triu_indices(self.fields, self.fields, 1, device=fields.device)
        return torch.cat([fields.flatten(1), products[:, rows, columns]], dim=1)


class HistoryDLRMTrain(nn.Module):
    """Adds the loss: RankingBatch -> (mean cross-entropy over rows of weight 1, RankingOutput)."""

    def __init__(self, model: HistoryDLRM) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: RankingBatch) -> tuple[Tensor, RankingOutput]:
        """Loss (scalar) and what metrics need, as TorchRec's pipelines expect them."""
        logits = self.model(batch.dense, batch.features)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(
            logits, batch.labels, weight=batch.weights, reduction="sum"
        ) / batch.weights.sum().clamp(min=1)
        return loss, RankingOutput(
            loss.detach(), logits.detach(), batch.labels, batch.weights, batch.segment
        )
