"""What the channels of an arm read of items' SIDs, catalogs, vocabulary, basis, and the model over it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from torchrec_sid.catalog import SidCatalog
from torchrec_sid.data.prepared import PreparedLog
from torchrec_sid.data.schema import LogFolder
from torchrec_sid.errors import SidError
from torchrec_sid.models.build import Ranking, build_ranking
from torchrec_sid.models.channels import Arm, arm_named
from torchrec_sid.quantizers import load_quantizer
from torchrec_sid.seeding import derived_generator
from torchrec_sid.side.basis import FrozenBasis
from torchrec_sid.tables.pieces import SidPieces

from .train_config import TrainConfig

UNKNOWN = -1
"""Packed SID of the item that the tables know nothing of."""


class ItemSids(NamedTuple):
    """Opened artefacts; None where no channel of the arm reads them."""

    catalog: SidCatalog | None
    item_sids: Tensor | None
    """``[N]`` int64 packed SID by dense item index."""
    pieces: SidPieces | None
    side_catalog: SidCatalog | None
    item_bytes: Tensor | None
    """``[N, nbytes]`` uint8 of the side catalog, likewise."""
    basis: FrozenBasis | None

    @property
    def catalogs(self) -> dict[str, SidCatalog]:
        """Those that are read, by their name in a checkpoint."""
        both = {"catalog": self.catalog, "side_catalog": self.side_catalog}
        return {name: catalog for name, catalog in both.items() if catalog is not None}

    @property
    def fingerprints(self) -> dict[str, str]:
        """Of the catalogs."""
        return {name: catalog.fingerprint for name, catalog in self.catalogs.items()}

    @property
    def accepts(self) -> dict[str, Callable[[str], bool]]:
        """Which other fingerprints a checkpoint may have: those of catalogs that were appended to."""
        return {name: catalog.extends for name, catalog in self.catalogs.items()}


def open_item_sids(config: TrainConfig, log: PreparedLog) -> ItemSids:
    """Open what the arm of a run reads.

    Raises:
        SidError: an option that the arm needs is missing, or the artefacts do not belong together.
    """
    arm = arm_named(config.model.arm)
    ids = torch.from_numpy(np.array(log.item_ids))
    order = torch.arange(len(ids))
    if config.shuffle_sids:
        order = order[torch.randperm(len(ids), generator=derived_generator(config.seed, "shuffled SIDs"))]
    catalog = item_sids = pieces = side_catalog = item_bytes = basis = None
    if arm.needs_catalog:
        catalog = SidCatalog.open(_needed("catalog", config.catalog, arm))
        item_sids = catalog.lookup(ids)[order]
    if arm.needs_pieces:
        pieces = SidPieces.load(_needed("pieces", config.pieces, arm))
    if arm.needs_side:
        side_catalog = SidCatalog.open(_needed("side_catalog", config.side_catalog, arm))
        quantizer = load_quantizer(_needed("side_quantizer", config.side_quantizer, arm))
        if quantizer.fingerprint != side_catalog.quantizer_fingerprint:
            raise SidError(
                "side_quantizer",
                f"{config.side_quantizer} did not make {config.side_catalog}",
                "Pass the quantizer that the catalog was written with.",
            )
        item_bytes, basis = side_catalog.packed_bytes(ids)[order], FrozenBasis.from_quantizer(quantizer)
    if config.hide_new:
        new = torch.from_numpy(np.array(log.item_train_events) == 0)
        if item_sids is not None:
            item_sids[new] = UNKNOWN
        if item_bytes is not None and side_catalog is not None:
            middle = torch.tensor([[k // 2 for k in side_catalog.spec.cardinalities]])
            item_bytes[new] = side_catalog.spec.pack_bytes(middle)
    return ItemSids(catalog, item_sids, pieces, side_catalog, item_bytes, basis)


def build_run(
    config: TrainConfig, log: PreparedLog, sids: ItemSids, device: torch.device | None = None
) -> Ranking:
    """The unsharded model of a run, over what its arm reads."""
    content = None
    if arm_named(config.model.arm).needs_content:
        folder = LogFolder.open(config.data)
        names = config.source.split("+") if config.source else [None]
        content = torch.from_numpy(np.concatenate([folder.embedding_matrix(name) for name in names], 1))
    return build_ranking(
        config.model,
        log,
        spec=sids.catalog.spec if sids.catalog else None,
        pieces=sids.pieces,
        basis=sids.basis,
        side_bytes=sids.item_bytes,
        content=content,
        device=device,
    )


def _needed(option: str, value: str | None, arm: Arm) -> str:
    if value is None:
        raise SidError(option, f"missing, but arm {arm.name!r} reads it", f"Pass --{option}.")
    return value
