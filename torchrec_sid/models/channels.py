"""Channels: the ways in which an item reaches a ranker. An arm of a comparison is some of them together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig

from torchrec_sid.collections import SidEmbeddingBagCollection, SidEmbeddingCollection
from torchrec_sid.errors import SidError
from torchrec_sid.models.content import (
    ContentEmbeddingBagCollection,
    ContentEmbeddingCollection,
    ContentTower,
)
from torchrec_sid.models.embedder import ItemEmbedder
from torchrec_sid.side.basis import FrozenBasis
from torchrec_sid.spec import SidSpec
from torchrec_sid.tables.configs import SidEmbeddingBagConfig, SidEmbeddingConfig
from torchrec_sid.tables.pieces import SidPieces
from torchrec_sid.tables.schemes import (
    HashedId,
    HashedPrefix,
    NGramGroups,
    PerLevel,
    Scheme,
    SentencePiece,
)

RAW_ID_BYTES = 8
"""A raw id travels and rests as one int64."""

Storage = Literal["id", "sid", "side", "content"]
"""What a history event holds for a channel."""


@dataclass(frozen=True)
class ItemInputs:
    """What a channel may build on."""

    items: int
    """N, number of items; indices are 0 .. N - 1."""
    dim: int
    """D, width of every item vector."""
    table_rows: int
    """Rows of each hashed table, the same for every channel that hashes."""
    spec: SidSpec | None = None
    """Shape of the SIDs of the tables, where there is a catalog."""
    pieces: SidPieces | None = None
    """SentencePiece vocabulary over those SIDs."""
    basis: FrozenBasis | None = None
    """Decoder of the SIDs of the channel ``side``, which have their own catalog."""
    content: Tensor | None = None
    """``[N, d]`` content embeddings."""
    history: bool = True
    """Whether the model reads histories."""
    init_scale: float = 0.05
    """Table rows start uniform in +- this."""
    device: torch.device | None = None
    """Where the modules are built."""

    def require_spec(self) -> SidSpec:
        """The spec, or SidError where no catalog was given."""
        if self.spec is None:
            raise SidError("arm", "no catalog", "Pass the SidCatalog that maps items to SIDs.")
        return self.spec

    def require_pieces(self) -> SidPieces:
        """The vocabulary, or SidError where none was given."""
        if self.pieces is None:
            raise SidError("arm 'sentencepiece'", "no pieces", "Train them: apps.quantize --pieces.")
        return self.pieces

    def require_basis(self) -> FrozenBasis:
        """The basis, or SidError where none was given."""
        if self.basis is None:
            raise SidError(
                "arm 'side'", "no basis", "Pass the quantizer and the catalog of the SIDs of SIDE."
            )
        return self.basis

    def require_content(self) -> Tensor:
        """The embeddings, or SidError where none were given."""
        if self.content is None:
            raise SidError("arm 'dense'", "no content embeddings", "Pass them as ItemInputs.content.")
        return self.content

    def initialise(self, weight: Tensor) -> Tensor:
        """Uniform start of a table."""
        return nn.init.uniform_(weight, -self.init_scale, self.init_scale)


@dataclass(frozen=True)
class Channel:
    """One way in which an item reaches a ranker."""

    name: str
    """Name in arms and reports."""
    stores: Storage
    """What an event holds for it."""
    fields: tuple[str, str]
    """Batch fields of the candidate and of the history."""
    embed: Callable[[ItemInputs], ItemEmbedder] | None
    """Makes the embedder; None for ``side``, which attends in code space without embedding events."""

    def bytes_per_event(self, inputs: ItemInputs) -> int:
        """Bytes that the item of one history event costs at rest."""
        if self.stores == "id":
            return RAW_ID_BYTES
        if self.stores == "content":
            return 2 * inputs.require_content().shape[1]
        return inputs.require_spec().nbytes if self.stores == "sid" else inputs.require_basis().spec.nbytes


def _full_id(inputs: ItemInputs) -> ItemEmbedder:
    common: dict[str, Any] = {
        "num_embeddings": inputs.items,
        "embedding_dim": inputs.dim,
        "init_fn": inputs.initialise,
    }
    return ItemEmbedder(
        EmbeddingBagCollection(
            tables=[EmbeddingBagConfig(name="t_item_id", feature_names=["item"], **common)],
            device=inputs.device,
        ),
        EmbeddingCollection(
            tables=[EmbeddingConfig(name="t_history_id", feature_names=["history"], **common)],
            device=inputs.device,
        )
        if inputs.history
        else None,
        "history",
    )


def _dense(inputs: ItemInputs) -> ItemEmbedder:
    content = inputs.require_content()

    def tower() -> ContentTower:
        return ContentTower(content, inputs.dim, device=inputs.device)

    return ItemEmbedder(
        ContentEmbeddingBagCollection("item", tower()),
        ContentEmbeddingCollection("history", tower()) if inputs.history else None,
        "history",
    )


def _random_hash(inputs: ItemInputs) -> ItemEmbedder:
    # An item index is a SID of one level.
    spec = SidSpec((inputs.items,))
    scheme = HashedId(num_embeddings=inputs.table_rows)
    return _sid_tables(scheme, spec, ("item", "history"), inputs, "hash")


def _over_sids(make: Callable[[SidSpec, ItemInputs], Scheme]) -> Callable[[ItemInputs], ItemEmbedder]:
    def embed(inputs: ItemInputs) -> ItemEmbedder:
        spec = inputs.require_spec()
        scheme = make(spec, inputs)
        return _sid_tables(scheme, spec, ("item_sid", "history_sid"), inputs, scheme.label)

    return embed


def _sid_tables(
    scheme: Scheme, spec: SidSpec, fields: tuple[str, str], inputs: ItemInputs, label: str
) -> ItemEmbedder:
    item, history = fields
    common: dict[str, Any] = {
        "embedding_dim": inputs.dim,
        "scheme": scheme,
        "spec": spec,
        "init_fn": inputs.initialise,
    }
    bag = SidEmbeddingBagConfig(name=f"t_item_{label}", feature_names=[item], **common)
    sequence = SidEmbeddingConfig(name=f"t_history_{label}", feature_names=[history], **common)
    return ItemEmbedder(
        SidEmbeddingBagCollection(tables=[bag], device=inputs.device),
        SidEmbeddingCollection(tables=[sequence], device=inputs.device) if inputs.history else None,
        history,
    )


_BY_ID, _BY_SID, _BY_BYTES = (
    ("item", "history"),
    ("item_sid", "history_sid"),
    ("item_bytes", "history_bytes"),
)

CHANNELS: dict[str, Channel] = {
    channel.name: channel
    for channel in (
        Channel("full_id", "id", _BY_ID, _full_id),
        Channel("random_hash", "id", _BY_ID, _random_hash),
        Channel("dense", "content", _BY_ID, _dense),
        Channel(
            "hashed_prefix",
            "sid",
            _BY_SID,
            _over_sids(lambda spec, inputs: HashedPrefix(spec.levels, inputs.table_rows)),
        ),
        Channel("per_level", "sid", _BY_SID, _over_sids(lambda spec, inputs: PerLevel())),
        Channel(
            "bigram",
            "sid",
            _BY_SID,
            _over_sids(lambda spec, inputs: NGramGroups(2, num_embeddings=inputs.table_rows)),
        ),
        Channel(
            "sentencepiece",
            "sid",
            _BY_SID,
            _over_sids(lambda spec, inputs: SentencePiece(inputs.require_pieces())),
        ),
        Channel("side", "side", _BY_BYTES, None),
    )
}
"""Channel name -> channel."""


@dataclass(frozen=True)
class Arm:
    """Some channels together, such as ``full_id+side``; ``none`` has no channel."""

    name: str
    """Names of the channels, joined by +."""
    channels: tuple[Channel, ...]
    """In the order of the name."""

    @property
    def item_fields(self) -> tuple[str, ...]:
        """Batch fields that it reads, each once."""
        return tuple(dict.fromkeys(name for channel in self.channels for name in channel.fields))

    @property
    def needs_catalog(self) -> bool:
        """Whether it reads SIDs through tables."""
        return self._stores("sid")

    @property
    def needs_side(self) -> bool:
        """Whether it computes with the codes of a second catalog."""
        return self._stores("side")

    @property
    def needs_content(self) -> bool:
        """Whether it reads content embeddings."""
        return self._stores("content")

    @property
    def needs_pieces(self) -> bool:
        """Whether it needs a SentencePiece vocabulary."""
        return any(channel.name == "sentencepiece" for channel in self.channels)

    def bytes_per_event(self, inputs: ItemInputs) -> int:
        """Bytes of one history event at rest; what two channels share counts once."""
        return sum({c.stores: c.bytes_per_event(inputs) for c in self.channels}.values())

    def _stores(self, kind: Storage) -> bool:
        return any(channel.stores == kind for channel in self.channels)


ARMS = ("none", "random_hash", "full_id", "dense", "hashed_prefix", "full_id+side")
"""The arms that a comparison has by default."""


def arm_named(name: str) -> Arm:
    """The arm of that name.

    Raises:
        SidError: an unknown channel, listing the known ones, or one twice.

    Example:
        >>> arm_named("full_id+side").item_fields
        ('item', 'history', 'item_bytes', 'history_bytes')
    """
    if name == "none":
        return Arm(name, ())
    parts = name.split("+")
    for part in parts:
        if part not in CHANNELS:
            raise SidError(
                "arm", f"unknown name {part!r}", f"Join some of {', '.join(CHANNELS)} by '+', or 'none'."
            )
    if len(set(parts)) < len(parts):
        raise SidError("arm", f"{name!r} repeats a channel", "Name each one once.")
    return Arm(name, tuple(CHANNELS[part] for part in parts))
