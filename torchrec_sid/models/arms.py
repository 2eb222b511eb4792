"""The arms of a comparison: ways to embed an item in the same backbone, at the same budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

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
from torchrec_sid.spec import SidSpec
from torchrec_sid.tables.configs import SidEmbeddingBagConfig, SidEmbeddingConfig
from torchrec_sid.tables.schemes import HashedId, HashedPrefix, Scheme

RAW_ID_BYTES = 8
"""A raw id travels and rests as one int64."""


class ItemModules(NamedTuple):
    """What embeds the candidate and the events of its user's history."""

    candidate: nn.Module | None
    """KeyedJaggedTensor -> KeyedTensor ``[B, D]``."""
    history: nn.Module | None
    """KeyedJaggedTensor -> Dict[str, JaggedTensor] with the history."""


@dataclass(frozen=True)
class ItemInputs:
    """What an arm may build on."""

    items: int
    """N, number of items; indices are 0 .. N - 1."""
    dim: int
    """D, width of every item vector."""
    table_rows: int
    """Rows of each hashed table, the same for every arm that hashes."""
    spec: SidSpec | None = None
    """Shape of the SIDs, where there is a catalog."""
    content: Tensor | None = None
    """``[N, d]`` content embeddings."""
    init_scale: float = 0.05
    """Table rows start uniform in +- this."""
    device: torch.device | None = None
    """Where the modules are built."""

    def require_spec(self) -> SidSpec:
        """The spec, or SidError where no catalog was given."""
        if self.spec is None:
            raise SidError("arm", "no catalog", "Pass the SidCatalog that maps items to SIDs.")
        return self.spec

    def initialise(self, weight: Tensor) -> Tensor:
        """Uniform start of a table."""
        return nn.init.uniform_(weight, -self.init_scale, self.init_scale)


@dataclass(frozen=True)
class Arm:
    """One way to embed an item.

    Example:
        >>> ARMS["full_id"].build(ItemInputs(items=10, dim=4, table_rows=5)).candidate is not None
        True
    """

    name: str
    """Name in reports."""
    item_fields: tuple[str, ...]
    """Batch fields it reads for candidate and history."""
    build: Callable[[ItemInputs], ItemModules]
    """Makes the modules."""
    bytes_per_event: Callable[[ItemInputs], int]
    """Bytes that the item of one history event costs at rest."""
    needs_catalog: bool = False
    """Whether it reads SIDs."""
    needs_content: bool = False
    """Whether it reads content embeddings."""


def _no_item(inputs: ItemInputs) -> ItemModules:
    return ItemModules(None, None)


def _full_id(inputs: ItemInputs) -> ItemModules:
    common = {
        "num_embeddings": inputs.items,
        "embedding_dim": inputs.dim,
        "init_fn": inputs.initialise,
    }
    return ItemModules(
        EmbeddingBagCollection(
            tables=[EmbeddingBagConfig(name="t_item", feature_names=["item"], **common)],
            device=inputs.device,
        ),
        EmbeddingCollection(
            tables=[EmbeddingConfig(name="t_history", feature_names=["history"], **common)],
            device=inputs.device,
        ),
    )


def _sid_tables(
    scheme: Scheme, spec: SidSpec, features: tuple[str, str], inputs: ItemInputs
) -> ItemModules:
    item, history = features
    bag = SidEmbeddingBagConfig(
        name="t_item",
        embedding_dim=inputs.dim,
        feature_names=[item],
        scheme=scheme,
        spec=spec,
        init_fn=inputs.initialise,
    )
    sequence = SidEmbeddingConfig(
        name="t_history",
        embedding_dim=inputs.dim,
        feature_names=[history],
        scheme=scheme,
        spec=spec,
        init_fn=inputs.initialise,
    )
    return ItemModules(
        SidEmbeddingBagCollection(tables=[bag], device=inputs.device),
        SidEmbeddingCollection(tables=[sequence], device=inputs.device),
    )


def _random_hash(inputs: ItemInputs) -> ItemModules:
    # An item index is a SID of one level.
    spec = SidSpec((inputs.items,))
    return _sid_tables(HashedId(num_embeddings=inputs.table_rows), spec, ("item", "history"), inputs)


def _hashed_prefix(inputs: ItemInputs) -> ItemModules:
    spec = inputs.require_spec()
    scheme = HashedPrefix(depth=spec.levels, num_embeddings=inputs.table_rows)
    return _sid_tables(scheme, spec, ("item_sid", "history_sid"), inputs)


def _dense(inputs: ItemInputs) -> ItemModules:
    if inputs.content is None:
        raise SidError("arm 'dense'", "no content embeddings", "Pass them as ItemInputs.content.")
    content = inputs.content

    def tower() -> ContentTower:
        return ContentTower(content, inputs.dim, device=inputs.device)

    return ItemModules(
        ContentEmbeddingBagCollection("item", tower()),
        ContentEmbeddingCollection("history", tower()),
    )


def _raw_id_bytes(inputs: ItemInputs) -> int:
    return RAW_ID_BYTES


def _content_bytes(inputs: ItemInputs) -> int:
    return 0 if inputs.content is None else 2 * inputs.content.shape[1]


ARMS: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm("none", (), _no_item, lambda inputs: 0),
        Arm("random_hash", ("item", "history"), _random_hash, _raw_id_bytes),
        Arm("full_id", ("item", "history"), _full_id, _raw_id_bytes),
        Arm("dense", ("item", "history"), _dense, _content_bytes, needs_content=True),
        Arm(
            "hashed_prefix",
            ("item_sid", "history_sid"),
            _hashed_prefix,
            lambda inputs: inputs.require_spec().nbytes,
            needs_catalog=True,
        ),
    )
}
"""Arm name -> arm."""


def arm_named(name: str) -> Arm:
    """The arm of that name.

    Raises:
        SidError: unknown name, listing the known ones.
    """
    if name not in ARMS:
        raise SidError("arm", f"unknown name {name!r}", f"Choose one of {', '.join(ARMS)}.")
    return ARMS[name]
