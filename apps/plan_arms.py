"""The same ranker over raw ids, hashed prefixes, SentencePiece and SIDE, on the meta device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import nn

from torchrec_sid.models.build import LogSizes, RankingConfig, build_ranking
from torchrec_sid.side.basis import FrozenBasis
from torchrec_sid.spec import SidSpec
from torchrec_sid.tables.pieces import PieceTrainerConfig, SidPieces

META = torch.device("meta")
SIDE_DIM = 384
"""Dimensions into which the SIDs of the SIDE arm decode; only the dense parameters depend on it."""


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
    return _arm("full_id", inputs, items)


def hashed_prefix(inputs: PlanInputs, items: int) -> ArmPlanInput:
    """Prefix n-grams of the SID, hashed into ``table_rows`` rows."""
    return _arm("hashed_prefix", inputs, items)


def sentence_piece(inputs: PlanInputs, items: int) -> ArmPlanInput:
    """One row per piece; an item is as many rows as its SID has pieces.

    Of the vocabulary only its size and the pieces per item matter here: no vocabulary need exist yet.
    """
    rows = torch.zeros(inputs.pieces, dtype=torch.int64)
    pieces = SidPieces(
        inputs.spec,
        PieceTrainerConfig(vocab_size=max(2, inputs.pieces)),
        starts=rows,
        stops=rows,
        bits=rows,
        scores=rows.float(),
        model_proto=torch.zeros(0, dtype=torch.uint8),
        pieces_per_item=inputs.pieces_per_item,
    )
    lengths = {name: n * inputs.pieces_per_item for name, n in _lengths(inputs).items()}
    return _arm("sentencepiece", inputs, items, lengths, pieces)


def side(inputs: PlanInputs, items: int) -> ArmPlanInput:
    """Attention over packed codes, by frozen constants: no table, nothing to send."""
    return _arm("side", inputs, items)


PLAN_ARMS: dict[str, Callable[[PlanInputs, int], ArmPlanInput]] = {
    "full_id": full_id,
    "hashed_prefix": hashed_prefix,
    "sentence_piece": sentence_piece,
    "side": side,
}
"""Name -> how to build it for a number of items."""


def _arm(
    name: str,
    inputs: PlanInputs,
    items: int,
    lengths: dict[str, float] | None = None,
    pieces: SidPieces | None = None,
) -> ArmPlanInput:
    """The model that ``apps.train`` builds for an arm, by the same names, so that its plan fits."""
    digits = torch.randn(inputs.side_spec.levels, SIDE_DIM, generator=torch.Generator().manual_seed(0))
    ranking = build_ranking(
        replace(inputs.model, arm=name),
        inputs.log._replace(items=items),
        spec=inputs.spec,
        pieces=pieces,
        basis=FrozenBasis.from_digits(inputs.side_spec, digits),
        device=META,
    )
    size = ranking.arm.bytes_per_event(ranking.inputs)
    return ArmPlanInput(ranking.module, lengths or _lengths(inputs), size)


def _lengths(inputs: PlanInputs) -> dict[str, float]:
    history = inputs.mean_history
    return {"item": 1.0, "item_sid": 1.0, "history": history, "history_sid": history}
