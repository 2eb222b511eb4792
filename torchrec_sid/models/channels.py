"""Channels: the ways in which an item reaches a ranker. An arm of a comparison is some of them together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig

from torchrec_sid.collections import SidEmbeddingBagCollection, SidEmbeddingCollection
from torchrec_sid.errors import SidError
from torchrec_sid.models.attend import EmbeddedChannel, ItemChannel, SideChannel, side_features
from torchrec_sid.models.content import (
    ContentEmbeddingBagCollection,
    ContentEmbeddingCollection,
    ContentTower,
)
from torchrec_sid.models.embedder import Embedder, ItemEmbedder, SideEmbedder
from torchrec_sid.models.similarities import ContentCosine, PrefixOverlap, SameItem, SimilarityChannel
from torchrec_sid.models.stores import ContentStore, IdStore, ItemStore, KnownIdStore, SideStore, SidStore
from torchrec_sid.models.target_attention import HistoryConfig, TargetAttention
from torchrec_sid.plugins import Registry
from torchrec_sid.spec import SidSpec
from torchrec_sid.tables import (
    HashedId,
    HashedPrefix,
    NGramGroups,
    PerLevel,
    Scheme,
    SentencePiece,
    SidEmbeddingBagConfig,
    SidEmbeddingConfig,
)

S = TypeVar("S", bound=ItemStore)


@dataclass(frozen=True)
class ChannelInputs:
    """What a channel is built on."""

    items: int
    """N, number of items; indices are 0 .. N - 1."""
    dim: int
    """D, width of every item vector."""
    table_rows: int
    """Rows of each hashed table, the same for every channel that hashes."""
    history: HistoryConfig | None
    """How histories are summarised; None: the model reads none."""
    action_values: Tensor
    """``[actions]`` how much an action speaks for an item, within -1 .. 1."""
    stores: Mapping[str, ItemStore]
    """By their kind."""
    init_scale: float = 0.05
    """Table rows start uniform in +- this."""
    device: torch.device | None = None
    """Where the modules are built."""

    def store(self, kind: type[S]) -> S:
        """The store of a class.

        Raises:
            SidError: it was not opened.
        """
        store = self.stores.get(kind.kind)
        if not isinstance(store, kind):
            raise SidError("arm", f"no store {kind.kind!r}", f"Pass {kind.needs}.")
        return store

    def initialise(self, weight: Tensor) -> Tensor:
        """Uniform start of a table."""
        return nn.init.uniform_(weight, -self.init_scale, self.init_scale)

    def attention(self) -> TargetAttention | None:
        """Target attention over the embedded events of a history."""
        return None if self.history is None else TargetAttention(self.history, device=self.device)


@dataclass(frozen=True)
class Channel:
    """One way in which an item reaches a ranker.

    Another one is added by :func:`register_channel`, here or in a plugin.
    """

    name: str
    """Name in arms and reports."""
    store: type[ItemStore]
    """What an event holds for it."""
    requires: tuple[str, ...]
    """Options of a training whose artefacts its store opens."""
    fields: tuple[str, str]
    """Batch fields of the candidate and of the history."""
    embed: Callable[[ChannelInputs], Embedder] | None
    """Makes a vector of the candidate and one of each event; None: it has none, only numbers."""
    attend: Callable[[ChannelInputs], ItemChannel] | None = None
    """Makes a channel that summarises the history without embedding its events; None: target attention over
    embedded events. A channel has one of the two."""
    about: str = ""
    """How the ranker gets to know an item, in a line of a report."""

    def build(self, inputs: ChannelInputs, embedder: Embedder | None = None) -> ItemChannel:
        """The channel as a module.

        Args:
            inputs: sizes and stores.
            embedder: made before by :attr:`embed`; None: make one.
        """
        if self.attend is not None:
            return self.attend(inputs)
        assert self.embed is not None
        return EmbeddedChannel(embedder or self.embed(inputs), inputs.attention())


def _full_id(inputs: ChannelInputs) -> ItemEmbedder:
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
        if inputs.history is not None
        else None,
        "history",
    )


def _known_id(inputs: ChannelInputs) -> ItemEmbedder:
    common: dict[str, Any] = {
        "num_embeddings": inputs.items + 1,
        "embedding_dim": inputs.dim,
        "init_fn": inputs.initialise,
    }
    bag = EmbeddingBagConfig(name="t_item_known", feature_names=["item_known"], **common)
    sequence = EmbeddingConfig(name="t_history_known", feature_names=["history_known"], **common)
    return ItemEmbedder(
        EmbeddingBagCollection(tables=[bag], device=inputs.device),
        EmbeddingCollection(tables=[sequence], device=inputs.device)
        if inputs.history is not None
        else None,
        "history_known",
    )


def _dense(inputs: ChannelInputs) -> ItemEmbedder:
    content = inputs.store(ContentStore).content

    def tower() -> ContentTower:
        return ContentTower(content, inputs.dim, device=inputs.device)

    return ItemEmbedder(
        ContentEmbeddingBagCollection("item", tower()),
        ContentEmbeddingCollection("history", tower()) if inputs.history is not None else None,
        "history",
    )


def _random_hash(inputs: ChannelInputs) -> ItemEmbedder:
    # An item index is a SID of one level.
    spec = SidSpec((inputs.items,))
    scheme = HashedId(num_embeddings=inputs.table_rows)
    return _sid_tables(scheme, spec, ("item", "history"), inputs, "hash")


def over_sids(
    make: Callable[[SidStore, ChannelInputs], Scheme],
) -> Callable[[ChannelInputs], ItemEmbedder]:
    """A :attr:`Channel.embed`: tables of a scheme over the SIDs of a :class:`SidStore`, read by the fields
    ``item_sid`` and ``history_sid``.

    Args:
        make: the scheme, for the store's shape of SIDs and the rows of a table.
    """

    def embed(inputs: ChannelInputs) -> ItemEmbedder:
        store = inputs.store(SidStore)
        scheme = make(store, inputs)
        return _sid_tables(scheme, store.spec, ("item_sid", "history_sid"), inputs, scheme.label)

    return embed


def _sid_tables(
    scheme: Scheme, spec: SidSpec, fields: tuple[str, str], inputs: ChannelInputs, label: str
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
        SidEmbeddingCollection(tables=[sequence], device=inputs.device)
        if inputs.history is not None
        else None,
        history,
    )


def _side(inputs: ChannelInputs) -> SideChannel:
    store = inputs.store(SideStore)
    return SideChannel(
        store.basis,
        inputs.dim,
        inputs.history,
        inputs.action_values,
        item_bytes=store.values.get("bytes"),
        device=inputs.device,
    )


def _embedded_side(inputs: ChannelInputs) -> SideEmbedder:
    store = inputs.store(SideStore)
    features = side_features(store.basis, store.values.get("bytes"), inputs.device)
    return SideEmbedder(features, nn.Linear(features.dim, inputs.dim, device=inputs.device))


def _similarity(
    measure: Callable[[ChannelInputs], nn.Module], fields: tuple[str, str]
) -> Callable[[ChannelInputs], ItemChannel]:
    def attend(inputs: ChannelInputs) -> ItemChannel:
        made = measure(inputs)
        return SimilarityChannel(
            made, fields, inputs.dim, inputs.history, inputs.action_values, inputs.device
        )

    return attend


CHANNELS: Registry[Channel] = Registry("channel")
"""Channel name -> channel."""


def register_channel(channel: Channel) -> Channel:
    """Add a channel to :data:`CHANNELS`, so that arms can name it.

    Raises:
        SidError: the name is taken.
    """
    return CHANNELS.add(channel.name, channel)


_BY_ID, _BY_SID, _BY_BYTES = (
    ("item", "history"),
    ("item_sid", "history_sid"),
    ("item_bytes", "history_bytes"),
)
_CATALOG = ("catalog",)

for _name, _store, _fields, _embed, _about in (
    ("full_id", IdStore, _BY_ID, _full_id, "a table with a row for every item id"),
    (
        "known_id",
        KnownIdStore,
        ("item_known", "history_known"),
        _known_id,
        "a table with a row for every item id that training saw, and a trained row for all others",
    ),
    (
        "random_hash",
        IdStore,
        _BY_ID,
        _random_hash,
        "item ids hashed into the rows of a smaller table: the usual remedy, and the control",
    ),
    ("dense", ContentStore, _BY_ID, _dense, "the content embedding itself, through a small tower"),
):
    register_channel(Channel(_name, _store, (), _fields, _embed, about=_about))
for _name, _scheme, _about in (
    (
        "hashed_prefix",
        lambda store, inputs: HashedPrefix(store.spec.levels, inputs.table_rows),
        "a table over the prefixes of the item's SID, from coarse to fine",
    ),
    ("per_level", lambda store, inputs: PerLevel(), "a table over each code of the SID by itself"),
    (
        "bigram",
        lambda store, inputs: NGramGroups(2, num_embeddings=inputs.table_rows),
        "a table over pairs of neighbouring codes of the SID",
    ),
):
    register_channel(Channel(_name, SidStore, _CATALOG, _BY_SID, over_sids(_scheme), about=_about))
register_channel(
    Channel(
        "sentencepiece",
        SidStore,
        ("catalog", "pieces"),
        _BY_SID,
        over_sids(lambda store, inputs: SentencePiece(store.require_pieces())),
        about="a table over pieces of the SID that are frequent in the traffic",
    )
)
register_channel(
    Channel(
        "side",
        SideStore,
        ("side_catalog", "side_quantizer"),
        _BY_BYTES,
        _embedded_side,
        _side,
        about="the SID's codes turned into vectors and similarities without a table (SIDE)",
    )
)
for _channel in (
    Channel(
        "cosine",
        ContentStore,
        (),
        _BY_ID,
        None,
        _similarity(lambda i: ContentCosine(i.store(ContentStore).content, device=i.device), _BY_ID),
        about="no vector: how like the content of what the user liked its content is",
    ),
    Channel(
        "overlap",
        SidStore,
        _CATALOG,
        _BY_SID,
        None,
        _similarity(lambda i: PrefixOverlap(i.store(SidStore).spec), _BY_SID),
        about="no vector: how long a prefix its SID shares with those of what the user liked",
    ),
    Channel(
        "identity",
        IdStore,
        (),
        _BY_ID,
        None,
        _similarity(lambda i: SameItem(), _BY_ID),
        about="no vector: whether the user had to do with this very item before",
    ),
):
    register_channel(_channel)


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
    def stores(self) -> tuple[type[ItemStore], ...]:
        """What an event holds for it, each once."""
        return tuple(dict.fromkeys(channel.store for channel in self.channels))

    @property
    def requires(self) -> tuple[str, ...]:
        """Options of a training that it needs, each once."""
        return tuple(dict.fromkeys(name for channel in self.channels for name in channel.requires))

    def build(self, inputs: ChannelInputs) -> dict[str, ItemChannel]:
        """Its channels as modules by name, those that attend without embedding events first."""
        embedders = {c.name: c.embed(inputs) for c in self.channels if c.embed and c.attend is None}
        ordered = sorted(self.channels, key=lambda channel: channel.attend is None)
        return {c.name: c.build(inputs, embedders.get(c.name)) for c in ordered}

    def embedders(self, inputs: ChannelInputs) -> list[Embedder]:
        """Every channel as vectors of events, for a model in which all share one stream; those that have
        only numbers stay beside it."""
        ordered = sorted(self.channels, key=lambda channel: channel.attend is not None)
        return [channel.embed(inputs) for channel in ordered if channel.embed is not None]


ARMS = ("full_id", "full_id+side", "dense", "hashed_prefix", "random_hash", "none")
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
