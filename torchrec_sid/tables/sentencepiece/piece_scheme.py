"""`SentencePiece`: one row per piece of a vocabulary over SIDs, as one more way to embed a feature."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from torchrec_sid.errors import SidError
from torchrec_sid.spec import SidSpec
from torchrec_sid.tables.catalog_map import CatalogMap
from torchrec_sid.tables.indexers import Indexer, ItemRows
from torchrec_sid.tables.scheme_registry import Scheme
from torchrec_sid.tables.sentencepiece.pieces import SidPieces
from torchrec_sid.tables.sentencepiece.tokenizer import SidTokenizer, Tokens
from torchrec_sid.tables.slots import Slot


@dataclass(frozen=True)
class SentencePiece(Scheme):
    """One row per piece of a SentencePiece model over SIDs (arXiv 2306.08121); their number varies.

    Args:
        pieces: the vocabulary, from :func:`~torchrec_sid.tables.sentencepiece.train_pieces` or
            ``SidPieces.load(path)``.
        precompute: keep the pieces of every item of the catalog in a buffer, ``4 L`` bytes an item, instead
            of cutting each batch; for features with a catalog.
    """

    pieces: SidPieces
    precompute: bool = False
    label: ClassVar[str] = "piece"

    def slots(self, spec: SidSpec) -> tuple[Slot, ...]:
        """The one table: a row per piece, and one for the unknown item.

        Raises:
            SidError: the vocabulary was trained on SIDs of another shape.
        """
        if spec != self.pieces.spec:
            raise SidError(
                "SentencePiece",
                f"pieces of SIDs of {self.pieces.spec.cardinalities} for SIDs of {spec.cardinalities}",
                "Train the pieces on the SIDs of this catalog.",
            )
        return (Slot("", len(self.pieces) + 1, (), self.pieces.pieces_per_item),)

    def indexer(
        self, slot: Slot, spec: SidSpec, catalog: CatalogMap | None, device: torch.device
    ) -> Indexer:
        """What cuts SIDs into pieces.

        Raises:
            SidError: ``precompute`` without a catalog.
        """
        if self.precompute and catalog is None:
            raise SidError(
                "SentencePiece",
                "precompute=True for a feature without a catalog",
                "Give the collection one.",
            )
        return PieceIndexer(self.pieces, catalog if self.precompute else None, device)


class PieceIndexer(Indexer):
    """One row per piece: cut from each batch, or read from a buffer with those of every catalog item."""

    table: Tensor
    counts: Tensor

    def __init__(
        self, pieces: SidPieces, catalog: CatalogMap | None, device: torch.device | str | None
    ) -> None:
        super().__init__()
        self.per_item: int = 0
        self._unknown_row: int = len(pieces)
        self.tokenizer = SidTokenizer(pieces, device)
        self.catalog = catalog
        self.cut_catalog()

    def cut_catalog(self) -> None:
        """Cut every item of the catalog, where there is one; again after it was replaced."""
        if self.catalog is not None:
            tokens = self._cut(self.catalog.packed, self.catalog.packed < 0)
            self.register_buffer("table", tokens.ids.contiguous(), persistent=False)
            self.register_buffer("counts", tokens.counts, persistent=False)

    def rows_by_level(self, packed: Tensor) -> tuple[Tensor, Tensor]:
        """Known SIDs ``[n]`` -> the row of the piece that holds each level, and its levels, ``[n, L]``."""
        ends: Tensor = self.tokenizer(packed).ids.to(torch.int64)
        levels = ends.shape[1]
        places = torch.arange(levels, device=ends.device)
        # From the last level down: the nearest end at or after each level.
        place = torch.where(ends >= 0, places, levels).flip(1).cummin(1).values.flip(1)
        size = torch.zeros_like(ends).scatter_add_(1, place, torch.ones_like(ends))
        return ends.gather(1, place), size.gather(1, place)

    def forward(self, packed: Tensor, raw: Tensor, unknown: Tensor | None) -> ItemRows:
        """Packed SIDs ``[n]`` int64 -> rows ``[sum of counts]`` and counts ``[n]``, int64."""
        if self.catalog is not None:
            place = self.catalog.place(raw)
            tokens = Tokens(self.table.index_select(0, place), self.counts.index_select(0, place))
        else:
            tokens = self._cut(packed, unknown)
        return ItemRows(tokens.flat(), tokens.counts)

    def _cut(self, packed: Tensor, unknown: Tensor | None) -> Tokens:
        if unknown is None:
            tokens: Tokens = self.tokenizer(packed)
            return tokens
        tokens = self.tokenizer(packed.clamp(min=0))
        ids = tokens.ids.masked_fill(unknown.unsqueeze(1), -1)
        ids[:, 0].masked_fill_(unknown, self._unknown_row)
        return Tokens(ids, tokens.counts.masked_fill(unknown, 1))
