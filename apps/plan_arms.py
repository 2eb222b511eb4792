"""The ranker that `torchrec-sid train` builds for an arm, on the meta device, at any number of items."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import nn

from torchrec_sid.errors import SidError
from torchrec_sid.models.build import LogSizes, RankingConfig, build_ranking
from torchrec_sid.models.channels import CHANNELS, arm_named
from torchrec_sid.models.stores import ContentStore, SideStore, SidStore
from torchrec_sid.parallel.constraints import table_features
from torchrec_sid.side.basis import FrozenBasis
from torchrec_sid.spec import SidSpec
from torchrec_sid.tables import PieceTrainerConfig, SidPieces

META = torch.device("meta")
PLAN_ARMS = ("full_id", "hashed_prefix", "sentencepiece", "side")
"""The side by side: raw ids, hashed prefixes, SentencePiece, and codes without a table."""
SIDE_DIM = 384
"""Dimensions into which the SIDs of the channel side decode; only the dense parameters depend on it."""


@dataclass(frozen=True)
class PlanInputs:
    """The ranker that plans are compared for."""

    model: RankingConfig
    """Backbone; its arm is ignored."""
    log: LogSizes
    """Sizes of the log."""
    spec: SidSpec
    """SIDs of the channels with tables."""
    side_spec: SidSpec
    """SIDs of the channel side."""
    pieces: int
    """Vocabulary of the channel sentencepiece."""
    pieces_per_item: float
    """Mean pieces of one item's SID."""
    mean_history: float
    """Mean events of a history."""


class ArmPlanInput(NamedTuple):
    """One arm, ready to plan."""

    module: nn.Module
    """On the meta device."""
    feature_lengths: dict[str, float]
    """Feature -> mean items per sample; the collections know how many rows an item is."""
    bytes_per_event: int
    """At rest: what the item of one history event costs."""


def check_arm(name: str) -> None:
    """Raise SidError unless an arm can be planned for."""
    if ContentStore in arm_named(name).stores:
        possible = ", ".join(channel for channel in CHANNELS if CHANNELS[channel].store is not ContentStore)
        raise SidError("model.arm", f"{name!r} reads embeddings, not tables", f"Plan one of {possible}.")


def build_arm(name: str, inputs: PlanInputs, items: int) -> ArmPlanInput:
    """The model of an arm with ``items`` items, named as in training, so that its plan fits there.

    Raises:
        SidError: an unknown arm, or one over content embeddings, which has nothing to plan.
    """
    check_arm(name)
    digits = torch.randn(inputs.side_spec.levels, SIDE_DIM, generator=torch.Generator().manual_seed(0))
    ranking = build_ranking(
        replace(inputs.model, arm=name),
        inputs.log._replace(items=items),
        (
            SidStore(inputs.spec, _vocabulary(inputs) if "pieces" in arm_named(name).requires else None),
            SideStore(FrozenBasis.from_digits(inputs.side_spec, digits)),
        ),
        device=META,
    )
    history = inputs.mean_history
    read = table_features(ranking.module)
    lengths = {name: history if name.startswith("history") else 1.0 for name in read}
    return ArmPlanInput(ranking.module, lengths, ranking.bytes_per_event)


def _vocabulary(inputs: PlanInputs) -> SidPieces:
    """Only its size and the pieces per item matter to a plan: no vocabulary need exist yet."""
    rows = torch.zeros(inputs.pieces, dtype=torch.int64)
    return SidPieces(
        inputs.spec,
        PieceTrainerConfig(vocab_size=max(2, inputs.pieces)),
        starts=rows,
        stops=rows,
        bits=rows,
        scores=rows.float(),
        model_proto=torch.zeros(0, dtype=torch.uint8),
        pieces_per_item=inputs.pieces_per_item,
    )
