"""`Scheme`: what every way to embed a SID says about itself, and the ways that are known.

A new one is a frozen dataclass in one file: it subclasses :class:`Scheme`, sets ``label``, says which
tables it wants (``slots``) and what turns SIDs into their rows (``indexer``), or computes its vectors
without a table (``vectors``). Collections, planner and export need nothing else.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from torchrec_sid.errors import SidError
from torchrec_sid.plugins import Registry
from torchrec_sid.spec import SidSpec
from torchrec_sid.tables.catalog_map import CatalogMap
from torchrec_sid.tables.indexers import Indexer, LevelIndexer
from torchrec_sid.tables.slots import Slot


class SidVectors(nn.Module):
    """Packed SIDs to vectors without a table; may have parameters."""

    dim: int
    """Of the vectors."""

    def forward(self, packed: Tensor, lengths: Tensor | None, weights: Tensor | None) -> Tensor:
        """Packed SIDs ``[n]`` int64 -> vectors ``[n, dim]``, zero for -1; or their sums over bags.

        Args:
            packed: SIDs, -1 for the unknown item.
            lengths: ``[B]`` items per bag, for sums ``[B, dim]``.
            weights: ``[n]`` float32, for weighted sums.
        """
        raise NotImplementedError


class Scheme:
    """How the SID of an item becomes a vector: which rows of which tables, or none at all.

    Raises:
        SidError: at the definition of a subclass whose label another one has.
    """

    label: ClassVar[str]
    """Names its tables where a feature has several schemes, and the scheme in :data:`SCHEMES`."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        SCHEMES.add(cls.label, cls)

    @classmethod
    def for_rows(cls, spec: SidSpec, rows: int) -> Self:
        """A scheme for SIDs of this shape, of at most ``rows`` rows a table where it hashes.

        Raises:
            SidError: the scheme needs more than that, such as a vocabulary.
        """
        raise SidError(
            f"scheme {cls.label!r}", "cannot be built from sizes alone", f"Make a {cls.__name__}."
        )

    def slots(self, spec: SidSpec) -> tuple[Slot, ...]:
        """The tables, and how many rows of each an item reads; none for a scheme that has vectors.

        Raises:
            SidError: SIDs of another shape than the scheme is for.
        """
        raise NotImplementedError

    def indexer(
        self, slot: Slot, spec: SidSpec, catalog: CatalogMap | None, device: torch.device
    ) -> Indexer:
        """What turns packed SIDs into rows of one of :meth:`slots`: by default, its ranges of levels.

        Args:
            slot: one of :meth:`slots`.
            spec: shape of the SIDs.
            catalog: the feature's, if it carries raw ids.
            device: for buffers.
        """
        return LevelIndexer(slot, spec)

    def vectors(
        self, spec: SidSpec, embedding_dim: int, catalog: CatalogMap | None, device: torch.device | None
    ) -> SidVectors | None:
        """What computes vectors without a table; None where there are tables.

        Args:
            spec: shape of the SIDs.
            embedding_dim: D of the table configuration.
            catalog: the features', if they carry raw ids.
            device: of parameters; may be meta.
        """
        return None


SCHEMES = Registry[type[Scheme]]("scheme")
"""Label -> scheme; a class enters it when it is defined, also in a plugin's file."""
