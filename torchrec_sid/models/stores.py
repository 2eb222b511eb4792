"""Item stores: what one event of a history holds for a channel, and how the artefacts behind it open."""

from __future__ import annotations

import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch
from torch import Tensor

from torchrec_sid.catalog import SidCatalog
from torchrec_sid.errors import SidError
from torchrec_sid.quantizers import load_quantizer
from torchrec_sid.side.basis import FrozenBasis
from torchrec_sid.spec import SidSpec
from torchrec_sid.tables import SidPieces

logger = logging.getLogger(__name__)

RAW_ID_BYTES = 8
"""A raw id travels and rests as one int64."""
UNKNOWN_SID = -1
"""Packed SID of the item that tables know nothing of."""


@dataclass(frozen=True)
class ItemSource:
    """Where stores find what they hold of the items of a log."""

    arm: str
    """Name of the arm that asks, for errors."""
    requires: tuple[str, ...]
    """Options that the channels of the arm need."""
    item_ids: Tensor
    """``[N]`` int64 item id of each dense index."""
    options: Mapping[str, str | None]
    """Option -> path of an artefact."""
    content: Callable[[], Tensor]
    """Opens the log's ``[N, d]`` content embeddings."""
    seen: Tensor
    """``[N]`` bool: items with a training event."""

    def path(self, option: str) -> str:
        """The path that an option gives.

        Raises:
            SidError: the option is not given.
        """
        value = self.options.get(option)
        if value is None:
            raise SidError(option, f"missing, but arm {self.arm!r} reads it", f"Pass --{option}.")
        return value


@dataclass(frozen=True, kw_only=True)
class ItemStore(ABC):
    """What is stored of every item; channels of one store share what they store.

    A value that events carry into batches is named here once: ``values["bytes"]`` becomes the batch's
    ``item_bytes`` for the candidate and ``history_bytes`` for the events. A value ``[N]`` int64 rides in
    the KeyedJaggedTensor, ``[N, ...]`` of any dtype beside it.
    """

    kind: ClassVar[str]
    """Name of the store in arms and errors."""
    needs: ClassVar[str]
    """What to pass where it is missing."""
    event: ClassVar[str] = ""
    """What an event carries for it; stores that name the same share it. Empty: its own."""
    values: Mapping[str, Tensor] = field(default_factory=dict)
    """Name -> ``[N, ...]``, one row per dense item index."""
    catalogs: Mapping[str, SidCatalog] = field(default_factory=dict)
    """Those behind it, by their option."""
    dropped: Mapping[str, int] = field(default_factory=dict)
    """Names of those values that training drops at random, and what then stands in their place."""
    marks: Mapping[str, str] = field(default_factory=dict)
    """Fingerprints of further artefacts that weights depend on, by option."""

    @classmethod
    @abstractmethod
    def open(cls, source: ItemSource) -> Self:
        """Open the artefacts.

        Raises:
            SidError: an option is missing, or artefacts do not belong together.
        """

    @property
    @abstractmethod
    def bytes_per_event(self) -> int:
        """Bytes that the item of one history event costs at rest."""

    @property
    def bytes_per_item(self) -> int:
        """Bytes kept once per item, where events carry the item's index alone."""
        return 0

    def unknown(self) -> Mapping[str, Tensor]:
        """The values of an item that nothing is known of, ``[...]`` each; used by controls."""
        return {}

    @property
    def identity(self) -> dict[str, str]:
        """Fingerprints of what weights over this store depend on."""
        return {**{name: catalog.fingerprint for name, catalog in self.catalogs.items()}, **self.marks}


@dataclass(frozen=True, kw_only=True)
class IdStore(ItemStore):
    """The dense item index itself."""

    kind = "id"
    needs = "nothing"
    event = "id"

    @classmethod
    def open(cls, source: ItemSource) -> IdStore:
        """Nothing to open."""
        return cls()

    @property
    def bytes_per_event(self) -> int:
        """A raw id."""
        return RAW_ID_BYTES


@dataclass(frozen=True, kw_only=True)
class KnownIdStore(ItemStore):
    """The dense item index, or N for an item without a training event: the value ``known``."""

    kind = "known_id"
    needs = "which items training saw"
    event = "id"

    @classmethod
    def open(cls, source: ItemSource) -> KnownIdStore:
        """Number the items that training saw."""
        items = len(source.seen)
        known = torch.where(source.seen, torch.arange(items), items)
        return cls(values={"known": known}, dropped={"known": items})

    @property
    def bytes_per_event(self) -> int:
        """A raw id."""
        return RAW_ID_BYTES


@dataclass(frozen=True)
class SidStore(ItemStore):
    """Packed SIDs that address rows of tables: the value ``sid``, ``[N]`` int64."""

    kind = "sid"
    needs = "the SidCatalog that maps items to SIDs"
    spec: SidSpec
    """Shape of the SIDs."""
    pieces: SidPieces | None = None
    """SentencePiece vocabulary over them."""

    @classmethod
    def open(cls, source: ItemSource) -> SidStore:
        """Look the log's items up in ``catalog``; load ``pieces`` where a channel needs them."""
        catalog = SidCatalog.open(source.path("catalog"))
        _known(catalog, source)
        pieces = SidPieces.load(source.path("pieces")) if "pieces" in source.requires else None
        return cls(
            catalog.spec,
            pieces,
            values={"sid": catalog.lookup(source.item_ids, unknown=UNKNOWN_SID)},
            catalogs={"catalog": catalog},
            marks={} if pieces is None else {"pieces": pieces.fingerprint},
        )

    @property
    def bytes_per_event(self) -> int:
        """Of a packed SID."""
        return self.spec.nbytes

    def unknown(self) -> Mapping[str, Tensor]:
        """The SID that no item has."""
        return {"sid": torch.tensor(UNKNOWN_SID)}

    def require_pieces(self) -> SidPieces:
        """The vocabulary, or SidError where none was given."""
        if self.pieces is None:
            raise SidError(
                "channel 'sentencepiece'", "no pieces", "Pass SidPieces trained on the SIDs of the catalog."
            )
        return self.pieces


@dataclass(frozen=True)
class SideStore(ItemStore):
    """Packed SIDs whose codes are computed with: the value ``bytes``, ``[N, nbytes]`` uint8."""

    kind = "side"
    needs = "the basis of the quantizer that made the SIDs of SIDE"
    basis: FrozenBasis
    """Decoder of the SIDs."""

    @classmethod
    def open(cls, source: ItemSource) -> SideStore:
        """Pack the SIDs of ``side_catalog``; take the decoder of ``side_quantizer``."""
        catalog = SidCatalog.open(source.path("side_catalog"))
        quantizer = load_quantizer(source.path("side_quantizer"))
        if quantizer.fingerprint != catalog.quantizer_fingerprint:
            raise SidError(
                "side_quantizer",
                f"{source.path('side_quantizer')} did not make {source.path('side_catalog')}",
                "Pass the quantizer that the catalog was written with.",
            )
        known = _known(catalog, source)
        packed = _middle(catalog.spec).repeat(len(known), 1)
        packed[known] = catalog.packed_bytes(source.item_ids[known])
        return cls(
            FrozenBasis.from_quantizer(quantizer),
            values={"bytes": packed},
            catalogs={"side_catalog": catalog},
        )

    @property
    def bytes_per_event(self) -> int:
        """Of a packed SID."""
        return self.basis.spec.nbytes

    def unknown(self) -> Mapping[str, Tensor]:
        """The middle code of every level."""
        return {"bytes": _middle(self.basis.spec)[0]}


@dataclass(frozen=True)
class ContentStore(ItemStore):
    """Content embeddings, looked up by the item's index: data of the model, not of a batch."""

    kind = "content"
    needs = "the items' content embeddings"
    event = "id"
    content: Tensor
    """``[N, d]`` floating point."""

    @classmethod
    def open(cls, source: ItemSource) -> ContentStore:
        """Read the log's embeddings."""
        content = source.content()
        mark = hashlib.sha256(content.contiguous().view(torch.uint8).numpy().data).hexdigest()
        return cls(content, marks={"content": mark})

    @property
    def bytes_per_event(self) -> int:
        """Of the item's index, by which the embedding is looked up."""
        return RAW_ID_BYTES

    @property
    def bytes_per_item(self) -> int:
        """Of the embedding in bfloat16."""
        return 2 * self.content.shape[1]


def _known(catalog: SidCatalog, source: ItemSource) -> Tensor:
    """``[N]`` bool: which of the log's items have a SID; says so where some have none."""
    known = catalog.contains(source.item_ids)
    missing = len(known) - int(known.sum())
    if missing:
        logger.warning(
            "%d of %d items of the log have no SID in %s: they are unknown items to the model",
            missing,
            len(known),
            catalog.path,
        )
    return known


def _middle(spec: SidSpec) -> Tensor:
    """The middle code of every level, ``[1, nbytes]`` uint8."""
    return spec.pack_bytes(torch.tensor([[k // 2 for k in spec.cardinalities]]))
