"""The same ranker over raw ids, hashed prefixes, SentencePiece and SIDE, on the meta device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig

from torchrec_sid.models.arms import ItemInputs, ItemModules, arm_named
from torchrec_sid.models.build import RankingConfig
from torchrec_sid.models.dlrm import HistoryDLRM, HistoryDLRMTrain
from torchrec_sid.models.history import HistoryConfig
from torchrec_sid.spec import SidSpec

META = torch.device("meta")


class LogSizes(NamedTuple):
    """What a model needs to know of its log."""

    items: int
    """N."""
    actions: int
    """Distinct actions of a history event."""
    dense_names: tuple[str, ...]
    """Names of the dense features."""


@dataclass(frozen=True)
class PlanInputs:
    """The ranker that plans are compared for."""

    model: RankingConfig
    """Backbone; its arm is ignored."""
    log: LogSizes
    """Sizes of the log."""
    spec: SidSpec
    """SIDs of the hashed-prefix and the SentencePiece arm."""
    side_spec: SidSpec
    """SIDs of the SIDE arm."""
    pieces: int
    """Vocabulary of the SentencePiece arm."""
    pieces_per_item: float
    """Mean pieces of one item's SID."""
    mean_history: float
    """Mean events of a history."""


class ArmPlanInput(NamedTuple):
    """One arm, ready to plan."""

    module: nn.Module
    """On the meta device."""
    feature_lengths: dict[str, float]
    """Feature -> mean items (or pieces) per sample."""
    bytes_per_event: int
    """At rest: what the item of one history event costs."""


def full_id(inputs: PlanInputs, items: int) -> ArmPlanInput:
    """Tables with a row for every item."""
    return ArmPlanInput(_ranking("full_id", inputs, items), _lengths(inputs), 8)


def hashed_prefix(inputs: PlanInputs, items: int) -> ArmPlanInput:
    """Prefix n-grams of the SID, hashed into ``table_rows`` rows."""
    return ArmPlanInput(_ranking("hashed_prefix", inputs, items), _lengths(inputs), inputs.spec.nbytes)


def sentence_piece(inputs: PlanInputs, items: int) -> ArmPlanInput:
    """One row per piece; an item is as many rows as its SID has pieces.

    Of the vocabulary only its size and the pieces per item matter here, so the tables are stock
    collections over piece ids and no vocabulary need exist yet.
    """
    dim = inputs.model.dim
    rows = inputs.pieces
    candidate = EmbeddingBagCollection(
        [
            EmbeddingBagConfig(
                name="t_item", feature_names=["item_sid"], num_embeddings=rows, embedding_dim=dim
            )
        ],
        device=META,
    )
    history = EmbeddingCollection(
        [
            EmbeddingConfig(
                name="t_history", feature_names=["history_sid"], num_embeddings=rows, embedding_dim=dim
            )
        ],
        device=META,
    )
    module = _ranker(ItemModules(candidate, history), "history_sid", inputs)
    lengths = {name: n * inputs.pieces_per_item for name, n in _lengths(inputs).items()}
    return ArmPlanInput(module, lengths, inputs.spec.nbytes)


def side(inputs: PlanInputs, items: int) -> ArmPlanInput:
    """Vectors computed from the codes by frozen constants: no table, nothing to send."""
    return ArmPlanInput(_ranking("none", inputs, items), _lengths(inputs), inputs.side_spec.nbytes)


PLAN_ARMS: dict[str, Callable[[PlanInputs, int], ArmPlanInput]] = {
    "full_id": full_id,
    "hashed_prefix": hashed_prefix,
    "sentence_piece": sentence_piece,
    "side": side,
}
"""Name -> how to build it for a number of items."""


def _ranking(name: str, inputs: PlanInputs, items: int) -> nn.Module:
    """The model that ``apps.train`` builds for an arm, by the same names, so that its plan fits."""
    arm = arm_named(name)
    sizes = ItemInputs(
        items=items,
        dim=inputs.model.dim,
        table_rows=inputs.model.table_rows,
        spec=inputs.spec,
        device=META,
    )
    feature = arm.item_fields[1] if arm.item_fields else "history"
    return _ranker(arm.build(sizes), feature, inputs)


def _ranker(modules: ItemModules, history_feature: str, inputs: PlanInputs) -> nn.Module:
    model = inputs.model
    config = HistoryConfig(
        dim=model.dim,
        heads=model.heads,
        actions=inputs.log.actions,
        pools=model.pools,
        max_length=model.history_length,
    )
    ranker = HistoryDLRM(
        modules.candidate,
        modules.history,
        len(inputs.log.dense_names),
        config,
        dense_layers=model.dense_layers,
        over_layers=model.over_layers,
        history_feature=history_feature,
        device=META,
    )
    return HistoryDLRMTrain(ranker)


def _lengths(inputs: PlanInputs) -> dict[str, float]:
    history = inputs.mean_history
    return {"item": 1.0, "item_sid": 1.0, "history": history, "history_sid": history}
