"""`build_ranking`: a ranking model for a prepared log, from one configuration."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchrec_sid.data.batch import BatchConfig
from torchrec_sid.data.prepared import PreparedLog
from torchrec_sid.data.reader import BatchReader
from torchrec_sid.models.arms import Arm, ItemInputs, arm_named
from torchrec_sid.models.dlrm import HistoryDLRM, HistoryDLRMTrain
from torchrec_sid.models.history import HistoryConfig
from torchrec_sid.spec import SidSpec


@dataclass(frozen=True)
class RankingConfig:
    """The backbone and how it embeds items."""

    arm: str = "hashed_prefix"
    """Name of the arm, see :data:`torchrec_sid.models.arms.ARMS`."""
    dim: int = 32
    """D, width of every vector."""
    heads: int = 4
    """Attention heads over the history."""
    pools: int = 2
    """Action-gated sums of the history."""
    history_length: int = 64
    """Most recent events kept."""
    table_rows: int = 1000
    """Rows of each hashed table."""
    init_scale: float = 0.05
    """Table rows start uniform in +- this."""
    dense_layers: tuple[int, ...] = (64,)
    """Hidden widths of the dense MLP."""
    over_layers: tuple[int, ...] = (128, 64)
    """Hidden widths of the MLP on top."""


@dataclass(frozen=True)
class Ranking:
    """A model and what it reads."""

    module: HistoryDLRMTrain
    """RankingBatch -> (loss, RankingOutput), unsharded."""
    arm: Arm
    """How it embeds items."""
    inputs: ItemInputs
    """What the arm was built on."""
    fields: tuple[str, ...]
    """Batch fields that it reads."""

    def batch_config(self, batch_size: int, history_length: int) -> BatchConfig:
        """How to read batches of ``batch_size`` rows per rank for it."""
        return BatchConfig(batch_size=batch_size, history_length=history_length, fields=self.fields)


def build_ranking(
    config: RankingConfig,
    log: PreparedLog,
    *,
    spec: SidSpec | None = None,
    content: Tensor | None = None,
    device: torch.device | None = None,
) -> Ranking:
    """Build the model; random numbers come from torch's global generator.

    Args:
        config: sizes and arm.
        log: gives the number of items, actions and dense features.
        spec: of the catalog, for arms over SIDs.
        content: ``[N, d]`` embeddings in the order of the log's items, for arms over content.
        device: where it is built.

    Raises:
        SidError: an unknown arm, or one whose spec or content is missing.
    """
    arm = arm_named(config.arm)
    inputs = ItemInputs(
        items=log.items,
        dim=config.dim,
        table_rows=config.table_rows,
        spec=spec,
        content=content,
        init_scale=config.init_scale,
        device=device,
    )
    modules = arm.build(inputs)
    model = HistoryDLRM(
        modules.candidate,
        modules.history,
        len(log.dense_names),
        HistoryConfig(
            dim=config.dim,
            heads=config.heads,
            actions=log.actions,
            pools=config.pools,
            max_length=config.history_length,
        ),
        dense_layers=config.dense_layers,
        over_layers=config.over_layers,
        history_feature=arm.item_fields[1] if arm.item_fields else "history",
        dense_statistics=_dense_statistics(log),
        device=device,
    )
    fields = (*arm.item_fields, "history_action", "history_age")
    return Ranking(HistoryDLRMTrain(model), arm, inputs, fields)


def _dense_statistics(log: PreparedLog) -> Tensor:
    """Mean and standard deviation of the dense features in the first training rows, ``[2, F]``."""
    rows = min(16_384, log.rows("train"))
    first = next(iter(BatchReader(log, "train", BatchConfig(rows, 1, ("history_action",)))))
    return torch.stack([first.dense.mean(0), first.dense.std(0, correction=0)])
