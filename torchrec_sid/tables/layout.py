"""From table configurations to physical tables, keys and routes: everything decided at construction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig, PoolingType

from torchrec_sid.devices import buffer_device
from torchrec_sid.errors import SidError
from torchrec_sid.spec import SidSpec
from torchrec_sid.tables.catalog_map import Catalog, CatalogMap
from torchrec_sid.tables.configs import SidEmbeddingConfig, SidTableConfig
from torchrec_sid.tables.indexers import PassThrough
from torchrec_sid.tables.layout_checks import (
    TableConfig,
    check_catalogs,
    check_raw_tables,
    features_of,
    output_dim,
    resolve_spec,
)
from torchrec_sid.tables.scheme_registry import Scheme, SidVectors
from torchrec_sid.tables.slots import Slot
from torchrec_sid.tables.transform import EventGroup, Route


class OutputPart(NamedTuple):
    """A vector that contributes to an output."""

    key: str
    """Of the route that finds its rows."""
    per_item: int
    """Rows per item; 0 where it varies."""
    scheme: int
    """Parts of one scheme are summed."""
    vectors: str = ""
    """Name in :attr:`Layout.vectors` of what makes it without a look-up."""


@dataclass(frozen=True)
class CollectionOutput:
    """One key of the result, as the stock collection would have named it."""

    name: str
    feature: str
    dim: int
    mean: bool
    """Whether the sum over a bag is still to be divided by its items."""
    concat: bool
    parts: tuple[OutputPart, ...]

    @property
    def key_groups(self) -> list[list[str]]:
        """Keys scheme by scheme where they stand side by side, all together where they are summed."""
        if not self.concat:
            return [[part.key for part in self.parts]]
        schemes = sorted({part.scheme for part in self.parts})
        return [[part.key for part in self.parts if part.scheme == s] for s in schemes]

    @property
    def is_row(self) -> bool:
        """Whether it is one row of one table."""
        return len(self.parts) == 1 and self.parts[0].per_item == 1 and not self.parts[0].vectors


@dataclass
class Layout:
    """What a collection is built from."""

    physical: type[EmbeddingConfig] | type[EmbeddingBagConfig]
    """Configuration class of the stock collection."""
    device: torch.device
    """Of the tables; may be meta."""
    tables: list[EmbeddingConfig] = field(default_factory=list)
    """Physical tables of the stock collection inside."""
    event_tables: dict[tuple[str, ...], list[EmbeddingBagConfig]] = field(default_factory=dict)
    """Features -> tables of which each of their events reads a bag of rows."""
    event_routes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Key of such a table -> routes into it."""
    routes: list[Route] = field(default_factory=list)
    outputs: list[CollectionOutput] = field(default_factory=list)
    specs: dict[str, SidSpec] = field(default_factory=dict)
    """Feature -> shape of its SIDs."""
    maps: dict[str, CatalogMap] = field(default_factory=dict)
    """Feature -> its catalog on the device; features that share a catalog share the map."""
    public: list[EmbeddingConfig] = field(default_factory=list)
    """One configuration per configured table, describing the result: what consumers size themselves by."""
    vectors: dict[str, SidVectors] = field(default_factory=dict)
    """Name -> what computes vectors of some features without a table."""
    reads: dict[str, TableReads] = field(default_factory=dict)
    """Physical table -> what is read of it."""
    raw_tables: list[str] = field(default_factory=list)
    """Physical tables that are as TorchRec's own configuration says."""
    used_keys: set[str] = field(default_factory=set)
    aliases: dict[str, str] = field(default_factory=dict)
    """Configured table -> the name it bears outside."""

    @property
    def direct(self) -> bool:
        """Whether the stock collection's result is already the result."""
        looked_up = [key for table in self.tables for key in table.feature_names]
        return looked_up == [out.name for out in self.outputs] and all(
            len(out.parts) == 1
            and out.parts[0].key == out.name
            and not out.parts[0].vectors
            and not out.mean
            for out in self.outputs
        )

    @property
    def event_groups(self) -> list[EventGroup]:
        """The groups of :attr:`event_tables`, with their routes."""
        return [
            EventGroup(sources, {key: self.event_routes[key] for t in tables for key in t.feature_names})
            for sources, tables in self.event_tables.items()
        ]

    def own_key(self, wanted: str) -> str:
        """``wanted``, or with a number behind it where a feature or another key has that name."""
        key, number = wanted, 1
        while key in self.used_keys:
            number += 1
            key = f"{wanted}:{number}"
        self.used_keys.add(key)
        return key


class TableReads(NamedTuple):
    """What is read of a physical table."""

    table: str
    """Configured table that it belongs to."""
    features: tuple[str, ...]
    """Features of the batch that read it, one for each of its keys; all of one key where ``events``."""
    rows_per_item: float
    """Mean rows that one item reads."""
    events: bool
    """Whether a bag is an event, and not an example."""


def plan_layout(
    tables: Sequence[TableConfig],
    catalogs: Mapping[str, Catalog | CatalogMap],
    physical: type[EmbeddingConfig] | type[EmbeddingBagConfig],
    device: torch.device | None,
    output_order: Sequence[str] | None = None,
    aliases: Mapping[str, str] | None = None,
) -> Layout:
    """Resolve configurations into a :class:`Layout`, and build the modules without parameters.

    Args:
        tables: configurations as the user gave them.
        catalogs: feature -> catalog, for the features that carry raw ids.
        physical: configuration class of the stock collection.
        device: of the tables; buffers are on it unless it is meta.
        output_order: keys of the result in order; None: table by table.
        aliases: configured table -> the name that its outputs and its public configuration bear.

    Raises:
        SidError: duplicate table names, a feature with two specs, a catalog whose spec is another, a
            feature that carries SIDs for one table and raw ids for another.
    """
    layout = Layout(physical, torch.get_default_device() if device is None else device)
    layout.aliases = dict(aliases or {})
    shared = _shared_features(tables)
    layout.used_keys = {feature for table in tables for feature in features_of(table)}
    check_catalogs(tables, catalogs)
    # What has no initialiser must not be built on meta, whatever the context.
    with buffer_device(device):
        layout.maps = _make_maps(catalogs, device)
        for table in tables:
            if isinstance(table, SidTableConfig):
                spec = resolve_spec(layout.specs, table, catalogs)
                _SidTable(layout, table, spec, shared).place()
            else:
                _place_raw_table(layout, table, shared)
    names = list(layout.reads)
    every = [t.name for t in layout.tables] + [t.name for g in layout.event_tables.values() for t in g]
    for name in names:
        if every.count(name) > 1:
            raise SidError(f"table {name!r}", "the name is used twice", "Give every table its own name.")
    check_raw_tables(tables, layout.specs, catalogs)
    if output_order is not None:
        _reorder(layout, output_order)
    return layout


def _reorder(layout: Layout, order: Sequence[str]) -> None:
    found = [out.name for out in layout.outputs]
    if sorted(found) != sorted(order):
        raise SidError("output_order", f"{list(order)}", f"Name every output once: {found}.")
    layout.outputs.sort(key=lambda out: list(order).index(out.name))


def _make_maps(
    catalogs: Mapping[str, Catalog | CatalogMap], device: torch.device | None
) -> dict[str, CatalogMap]:
    maps: dict[int, CatalogMap] = {}
    for catalog in catalogs.values():
        if isinstance(catalog, CatalogMap):
            maps[id(catalog)] = catalog
        elif id(catalog) not in maps:
            maps[id(catalog)] = CatalogMap(catalog, device)
    return {feature: maps[id(catalog)] for feature, catalog in catalogs.items()}


class _SidTable(NamedTuple):
    """A configured table of SIDs on its way into a layout."""

    layout: Layout
    table: SidTableConfig
    spec: SidSpec
    shared: set[str]

    def place(self) -> None:
        """Enter its physical tables, routes and outputs."""
        layout, table = self.layout, self.table
        parts: dict[str, list[OutputPart]] = {feature: [] for feature in features_of(table)}
        slots = [scheme.slots(self.spec) for scheme in table.schemes]
        alone = len(table.schemes) == 1 and len(slots[0]) == 1
        rows, dims = 0, []
        for number, (scheme, own) in enumerate(zip(table.schemes, slots, strict=True)):
            catalog = next((layout.maps[f] for f in parts if f in layout.maps), None)
            vectors = scheme.vectors(self.spec, table.embedding_dim, catalog, layout.device)
            if vectors is not None:
                self._add_vectors(scheme, number, vectors, parts)
                dims.append(int(vectors.dim))
                continue
            dims.append(table.embedding_dim)
            for slot in own:
                self._add_table(scheme, number, slot, alone, parts)
                rows += slot.rows
        self._add_outputs(parts, output_dim(table, dims), rows)

    def _add_vectors(
        self, scheme: Scheme, number: int, vectors: SidVectors, parts: Mapping[str, list[OutputPart]]
    ) -> None:
        """Route the packed SIDs of the table's features past the look-up."""
        layout = self.layout
        name = f"{self.table.name}_{scheme.label}"
        layout.vectors[name] = vectors
        for feature, own in parts.items():
            key = layout.own_key(f"{feature}:{name}")
            layout.routes.append(Route(feature, key, PassThrough(packed=True)))
            own.append(OutputPart(key, 1, number, vectors=name))

    def _add_table(
        self, scheme: Scheme, number: int, slot: Slot, alone: bool, parts: Mapping[str, list[OutputPart]]
    ) -> None:
        layout, table = self.layout, self.table
        name, keys = physical_name(table, scheme, slot), []
        for feature, own in parts.items():
            catalog, place = layout.maps.get(feature), buffer_device(layout.device)
            indexer = scheme.indexer(slot, self.spec, catalog, place)
            # The stock collection's result is the result where a key is a feature's own name.
            plain = alone and feature not in self.shared
            key = feature if plain else layout.own_key(f"{feature}:{name}")
            layout.routes.append(Route(feature, key, indexer))
            own.append(OutputPart(key, indexer.per_item, number))
            keys.append(key)
        events = False
        if isinstance(table, SidEmbeddingConfig):
            bags = table.events == "bag"
            events = indexer.per_item == 0 or (bags and indexer.per_item > 1)
        options = {
            "name": name,
            "embedding_dim": table.embedding_dim,
            "num_embeddings": slot.rows,
            "data_type": table.data_type,
            "init_fn": table.init_fn,
            "weight_init_min": table.weight_init_min,
            "weight_init_max": table.weight_init_max,
        }
        if events:
            key = layout.own_key(name)
            layout.event_routes[key] = tuple(keys)
            group = layout.event_tables.setdefault(tuple(parts), [])
            group.append(EmbeddingBagConfig(feature_names=[key], **options))
        else:
            layout.tables.append(layout.physical(feature_names=keys, **options))
        layout.reads[name] = TableReads(table.name, tuple(parts), slot.rows_per_item, events)

    def _add_outputs(self, parts: Mapping[str, Sequence[OutputPart]], dim: int, rows: int) -> None:
        layout, table = self.layout, self.table
        pooling = getattr(table, "pooling", PoolingType.SUM)
        given = table.weight_init_min is not None or table.weight_init_max is not None
        outside = layout.aliases.get(table.name, table.name)
        layout.public.append(
            layout.physical(
                name=outside,
                embedding_dim=dim,
                num_embeddings=rows,
                feature_names=features_of(table),
                data_type=table.data_type,
                # Its default divides by the rows, of which vectors without a table have none.
                weight_init_min=table.weight_init_min if given or rows else 0.0,
                weight_init_max=table.weight_init_max if given or rows else 0.0,
                **({"pooling": pooling} if layout.physical is EmbeddingBagConfig else {}),
            )
        )
        mean, concat = pooling is PoolingType.MEAN, table.combine == "concat"
        for feature, own in parts.items():
            name = f"{feature}@{outside}" if feature in self.shared else feature
            layout.outputs.append(CollectionOutput(name, feature, dim, mean, concat, tuple(own)))


def physical_name(table: SidTableConfig, scheme: Scheme, slot: Slot) -> str:
    """Of a table: the configured name, then the scheme where there are several, then the slot."""
    stem = table.name if len(table.schemes) == 1 else f"{table.name}_{scheme.label}"
    return f"{stem}_{slot.suffix}" if slot.suffix else stem


def _place_raw_table(layout: Layout, table: EmbeddingConfig, shared: set[str]) -> None:
    features = features_of(table)
    keys = [layout.own_key(f"{name}:{table.name}") if name in shared else name for name in features]
    layout.tables.append(replace(table, feature_names=keys))
    layout.public.append(replace(table, feature_names=features))
    layout.reads[table.name] = TableReads(table.name, tuple(features), 1.0, False)
    layout.raw_tables.append(table.name)
    for feature, key in zip(features, keys, strict=True):
        layout.routes.append(Route(feature, key, PassThrough()))
        name = f"{feature}@{table.name}" if feature in shared else feature
        dim, part = table.embedding_dim, OutputPart(key, 1, 0)
        layout.outputs.append(CollectionOutput(name, feature, dim, False, False, (part,)))


def _shared_features(tables: Sequence[TableConfig]) -> set[str]:
    """Features of more than one table: TorchRec names their outputs ``feature@table``."""
    names = [feature for table in tables for feature in features_of(table)]
    return {name for name in names if names.count(name) > 1}
