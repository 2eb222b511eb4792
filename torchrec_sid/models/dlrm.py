"""A DLRM over channels: one backbone for every way in which an item reaches it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torchrec import KeyedJaggedTensor
from torchrec.models.dlrm import DenseArch, OverArch
from torchrec.modules.crossnet import LowRankCrossNet

from torchrec_sid.devices import buffer_device
from torchrec_sid.errors import SidError
from torchrec_sid.models.attend import ItemChannel


class ExampleBatch(Protocol):
    """What a model is trained on; :class:`torchrec_sid.data.batch.RankingBatch` is one."""

    dense: Tensor
    """``[B, F]`` float32."""
    features: KeyedJaggedTensor
    """Sparse features."""
    rows: dict[str, Tensor]
    """Further inputs by name: a row per example, or per event of the history."""
    labels: Tensor
    """``[B]`` float32, 0 or 1; ``[B, T]`` for T > 1 tasks."""
    weights: Tensor
    """``[B]`` float32, 0 for padding."""
    segment: Tensor
    """``[B]`` int64, what metrics are sliced by."""


class RankingOutput(NamedTuple):
    """What the training wrapper returns beside the loss."""

    loss: Tensor
    """Scalar, detached."""
    logits: Tensor
    """``[B]``, detached; ``[B, T]`` for T > 1 tasks."""
    labels: Tensor
    """As the logits."""
    weights: Tensor
    """``[B]``, 0 for padding."""
    segment: Tensor
    """``[B]`` int64."""
    groups: tuple[Tensor, ...] = ()
    """``[B]`` int64 each: rows of the categorical features that metrics are sliced by."""


def by_task(values: Tensor) -> tuple[Tensor, ...]:
    """Logits or labels, ``[B]`` or ``[B, T]`` -> ``[B]`` of each task, the log's label first."""
    return (values,) if values.dim() == 1 else values.unbind(1)


class HistoryDLRM(nn.Module):
    """Dense features, a candidate item and a history of items, through any channels -> logits.

    A channel is a module ``(features, rows) -> ChannelOutput``, see
    :mod:`torchrec_sid.models.attend`. ``forward`` is straight-line, so that TorchRec's pipelines can
    trace it.

    Args:
        channels: name -> channel.
        dense_in_features: F, columns of the dense input.
        dim: D, width of all fields.
        dense_layers, over_layers: hidden widths of the two MLPs.
        interaction: ``dot``: every field and all pairwise products, as in DLRM; ``dcn``: low-rank cross
            layers over the concatenated fields, as in DCN-v2 (arXiv 2008.13535).
        cross_layers, cross_rank: of ``dcn``.
        tasks: T, number of labels; each has its own MLP on top.
        dense_statistics: ``[2, F]`` mean and standard deviation of the dense input, which standardise it;
            None leaves it as it is.
        device: where the parameters live.
    """

    def __init__(
        self,
        channels: Mapping[str, ItemChannel],
        dense_in_features: int,
        dim: int,
        dense_layers: tuple[int, ...] = (64,),
        over_layers: tuple[int, ...] = (128, 64),
        interaction: Literal["dot", "dcn"] = "dot",
        cross_layers: int = 3,
        cross_rank: int = 32,
        tasks: int = 1,
        dense_statistics: Tensor | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.channels = nn.ModuleDict(channels)
        self.standardise = (
            None if dense_statistics is None else Standardise(dense_statistics.to(buffer_device(device)))
        )
        numbers = dense_in_features + sum(channel.numbers for channel in channels.values())
        self.dense = DenseArch(numbers, [*dense_layers, dim], device=device)
        fields = 1 + sum(channel.fields for channel in channels.values())
        self.interaction: DotInteraction | CrossInteraction
        if interaction == "dot":
            self.interaction = DotInteraction(fields)
        else:
            self.interaction = CrossInteraction(fields * dim, cross_layers, cross_rank, device)
        width = self.interaction.out_features(dim)
        self.tasks = nn.ModuleList(OverArch(width, [*over_layers, 1], device=device) for _ in range(tasks))

    @property
    def dense_device(self) -> torch.device:
        """Where the dense parameters live."""
        return next(self.dense.parameters()).device

    def forward(
        self,
        dense: Tensor,
        features: KeyedJaggedTensor,
        rows: Mapping[str, Tensor] | None = None,
        **named: Tensor,
    ) -> Tensor:
        """Rank.

        Args:
            dense: ``[B, F]`` float32.
            features: the sparse features that the channels read, and ``history_action``, ``history_age``.
            rows: what channels read beside them, by field: ``item_NAME`` has a row per example,
                ``history_NAME`` one per event.
            named: the same, each as an argument, as programs for serving call it.

        Returns:
            Logits, ``[B]`` for one task and ``[B, T]`` for more.
        """
        rows = named if rows is None else rows
        outputs = [channel(features, rows) for channel in self.channels.values()]
        dense = dense if self.standardise is None else self.standardise(dense)
        numbers = [output.numbers for output in outputs if output.numbers is not None]
        dense_vector = self.dense(torch.cat([dense, *numbers], dim=1))
        fields = torch.cat([dense_vector.unsqueeze(1), *(output.fields for output in outputs)], dim=1)
        crossed = self.interaction(fields)
        logits = torch.cat([task(crossed) for task in self.tasks], dim=1)
        return logits.squeeze(1) if len(self.tasks) == 1 else logits


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

    def forward(self, fields: Tensor) -> Tensor:
        """``[B, n, D]`` -> ``[B, n * D + n * (n - 1) / 2]``."""
        products = fields @ fields.transpose(1, 2)
        rows, columns = torch.triu_indices(self.fields, self.fields, 1, device=fields.device)
        return torch.cat([fields.flatten(1), products[:, rows, columns]], dim=1)


class CrossInteraction(nn.Module):
    """The DCN-v2 interaction (arXiv 2008.13535): ``x_{l+1} = x_0 * (U_l V_l x_l + b_l) + x_l``.

    Args:
        width: of the concatenated fields, n * D.
        layers: number of cross layers.
        rank: of each layer's matrix.
        device: where the parameters live.
    """

    def __init__(self, width: int, layers: int, rank: int, device: torch.device | None = None) -> None:
        super().__init__()
        self.width = width
        with torch.device("cpu") if device is None else device:
            self.cross = LowRankCrossNet(width, layers, rank)

    def out_features(self, dim: int) -> int:
        """Width of the output."""
        return self.width

    def forward(self, fields: Tensor) -> Tensor:
        """``[B, n, D]`` -> ``[B, n * D]``."""
        return self.cross(fields.flatten(1))


class HistoryDLRMTrain(nn.Module):
    """Adds the loss: :class:`ExampleBatch` -> (weighted mean cross-entropy, RankingOutput).

    Args:
        model: what is trained.
        positive_weight: weight of label 1 in the loss.
        task_weights: of the losses of the tasks; none: 1 each.
        groups: keys of categorical features, of one value each, that metrics are sliced by.
        autocast: dtype of the dense part's products; None: float32.

    Raises:
        SidError: a weight that is not positive.
    """

    def __init__(
        self,
        model: HistoryDLRM,
        positive_weight: float = 1.0,
        task_weights: tuple[float, ...] = (),
        groups: tuple[str, ...] = (),
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not positive_weight > 0:
            raise SidError("positive_weight", str(positive_weight), "Give a positive weight.")
        self.model = model
        self.positive_weight = positive_weight
        self.task_weights = task_weights
        self.groups = groups
        self.autocast = autocast

    def forward(self, batch: ExampleBatch) -> tuple[Tensor, RankingOutput]:
        """Loss (scalar) and what metrics need, as TorchRec's pipelines expect them."""
        kind = self.model.dense_device.type
        with torch.autocast(kind, self.autocast, enabled=self.autocast is not None):
            logits = self.model(batch.dense, batch.features, batch.rows).float()
        several = len(self.model.tasks) > 1
        weights = batch.weights.unsqueeze(1).expand_as(logits) if several else batch.weights
        if several and self.task_weights:
            weights = weights * weights.new_tensor(self.task_weights)
        if self.positive_weight != 1:
            weights = weights * (1 + (self.positive_weight - 1) * batch.labels)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(
            logits, batch.labels, weight=weights, reduction="sum"
        ) / weights.sum().clamp(min=1)
        return loss, RankingOutput(
            loss.detach(),
            logits.detach(),
            batch.labels,
            batch.weights,
            batch.segment,
            tuple(batch.features[key].values() for key in self.groups),
        )
