"""From table configurations to physical tables, keys and routes: everything decided at construction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig, PoolingType

from torchrec_sid.errors import SidError
from torchrec_sid.spec import SidSpec
from torchrec_sid.tables.catalog_map import Catalog, CatalogMap
from torchrec_sid.tables.configs import SidEmbeddingConfig
from torchrec_sid.tables.indexers import IdIndexer, Indexer, LevelIndexer, PassThrough, PieceIndexer
from torchrec_sid.tables.layout_checks import (
    TableConfig,
    check_catalogs,
    check_raw_tables,
    features_of,
    output_dim,
    resolve_spec,
)
from torchrec_sid.tables.schemes import HashedId, SentencePiece, TableScheme
from torchrec_sid.tables.side_scheme import Side, SideVectors
from torchrec_sid.tables.slots import Slot
from torchrec_sid.tables.transform import Route


class Part(NamedTuple):
    """A looked-up key that contributes to an output."""

    key: str
    """Key of the transformed KJT, and of the stock collection's result."""
    per_item: int
    """Rows per item; 0 where it varies."""
    group: int
    """Parts of one group (one scheme) are summed."""
    counts_key: str = ""
    """Key with the rows of each item, where they vary."""
    side: str = ""
    """Name of the :class:`~torchrec_sid.tables.side_scheme.SideVectors` that makes it without a table."""


@dataclass(frozen=True)
class Output:
    """One key of the result, as the stock collection would have named it."""

    name: str
    feature: str
    table: str
    dim: int
    mean: bool
    """Whether the sum over a bag is still to be divided by its items."""
    concat: bool
    parts: tuple[Part, ...]


@dataclass
class Layout:
    """What a collection is built from."""

    tables: list[EmbeddingConfig] = field(default_factory=list)
    """Physical tables of the stock collection inside."""
    routes: list[Route] = field(default_factory=list)
    outputs: list[Output] = field(default_factory=list)
    specs: dict[str, SidSpec] = field(default_factory=dict)
    """Feature -> shape of its SIDs."""
    maps: dict[str, CatalogMap] = field(default_factory=dict)
    """Feature -> its catalog on the device; features that share a catalog share the map."""
    public: list[EmbeddingConfig] = field(default_factory=list)
    """One configuration per configured table, describing the result: what consumers size themselves by."""
    sides: dict[str, SideVectors] = field(default_factory=dict)
    """Table name -> parameter-free features of that table's configuration."""
    pooling_factors: dict[str, float] = field(default_factory=dict)
    """Physical table -> rows per item."""

    @property
    def direct(self) -> bool:
        """Whether the stock collection's result is already the result."""
        looked_up = [key for table in self.tables for key in table.feature_names]
        return looked_up == [out.name for out in self.outputs] and all(
            len(out.parts) == 1 and out.parts[0].key == out.name and not out.parts[0].side and not out.mean
            for out in self.outputs
        )


def plan_layout(
    tables: Sequence[TableConfig],
    catalogs: Mapping[str, Catalog | CatalogMap],
    physical: type[EmbeddingConfig] | type[EmbeddingBagConfig],
    device: torch.device | None,
    output_order: Sequence[str] | None = None,
) -> Layout:
    """Resolve configurations into a :class:`Layout`, and build the modules without parameters.

    Args:
        tables: configurations as the user gave them.
        catalogs: feature -> catalog, for the features that carry raw ids.
        physical: configuration class of the stock collection.
        device: of the tables; buffers are on it unless it is meta.
        output_order: keys of the result in order; None: table by table.

    Raises:
        SidError: duplicate table names, a feature with two specs, a catalog whose spec is another, a
            feature that carries SIDs for one table and raw ids for another.
    """
    if not tables:
        raise SidError("tables", "none", "Give at least one table.")
    layout = Layout()
    shared = _shared_features(tables)
    check_catalogs(tables, catalogs)
    layout.maps = _make_maps(catalogs, device)
    for table in tables:
        if isinstance(table, SidEmbeddingConfig):
            spec = resolve_spec(layout.specs, table, catalogs)
            _place_sid_table(layout, table, spec, shared, physical, device)
        else:
            _place_raw_table(layout, table, shared)
    names = [table.name for table in layout.tables]
    for name in names:
        if names.count(name) > 1:
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


def _place_sid_table(
    layout: Layout,
    table: SidEmbeddingConfig,
    spec: SidSpec,
    shared: set[str],
    physical: type[EmbeddingConfig] | type[EmbeddingBagConfig],
    device: torch.device | None,
) -> None:
    features = features_of(table)
    parts: dict[str, list[Part]] = {feature: [] for feature in features}
    alone = sum(len(s.slots(spec)) for s in table.schemes if not isinstance(s, Side)) == 1
    alone = alone and len(table.schemes) == 1
    rows, dims = 0, []
    for group, scheme in enumerate(table.schemes):
        if isinstance(scheme, Side):
            dims.append(_add_side(layout, table, scheme, spec, parts, group, device))
            continue
        dims.append(table.embedding_dim)
        for slot in scheme.slots(spec):
            name = _physical_name(table, scheme, slot)
            keys = []
            for feature in features:
                key = feature if alone and feature not in shared else f"{feature}:{name}"
                indexer = _indexer(scheme, slot, spec, layout.maps.get(feature), device)
                counts_key = f"{key}#" if indexer.per_item == 0 and physical is EmbeddingConfig else ""
                layout.routes.append(Route(feature, key, indexer, counts_key))
                parts[feature].append(Part(key, indexer.per_item, group, counts_key))
                keys.append(key)
            layout.tables.append(
                physical(
                    name=name,
                    embedding_dim=table.embedding_dim,
                    num_embeddings=slot.rows,
                    feature_names=keys,
                    data_type=table.data_type,
                    init_fn=table.init_fn,
                )
            )
            layout.pooling_factors[name] = slot.rows_per_item
            rows += slot.rows
    _add_outputs(layout, table, parts, shared, output_dim(table, dims), rows, physical)


def _add_outputs(
    layout: Layout,
    table: SidEmbeddingConfig,
    parts: Mapping[str, Sequence[Part]],
    shared: set[str],
    dim: int,
    rows: int,
    physical: type[EmbeddingConfig] | type[EmbeddingBagConfig],
) -> None:
    pooling = getattr(table, "pooling", PoolingType.SUM)
    layout.public.append(
        physical(
            name=table.name,
            embedding_dim=dim,
            num_embeddings=rows,
            feature_names=features_of(table),
            data_type=table.data_type,
            # Its default divides by the rows, of which a Side alone has none.
            weight_init_min=0.0 if not rows else None,
            weight_init_max=0.0 if not rows else None,
            **({"pooling": pooling} if physical is EmbeddingBagConfig else {}),
        )
    )
    mean, concat = pooling is PoolingType.MEAN, table.combine == "concat"
    for feature in features_of(table):
        name = f"{feature}@{table.name}" if feature in shared else feature
        layout.outputs.append(Output(name, feature, table.name, dim, mean, concat, tuple(parts[feature])))


def _add_side(
    layout: Layout,
    table: SidEmbeddingConfig,
    side: Side,
    spec: SidSpec,
    parts: Mapping[str, list[Part]],
    group: int,
    device: torch.device | None,
) -> int:
    """Route the packed SIDs of the table's features past the look-up; returns the dimension."""
    known = [layout.maps[feature].packed for feature in parts if feature in layout.maps]
    vectors = SideVectors(side, spec, table.embedding_dim, known[0] if known else None, device)
    layout.sides[table.name] = vectors
    for feature, own in parts.items():
        key = f"{feature}:{table.name}_{side.label}"
        layout.routes.append(Route(feature, key, PassThrough(packed=True)))
        own.append(Part(key, 1, group, side=table.name))
    return vectors.dim


def _place_raw_table(layout: Layout, table: EmbeddingConfig, shared: set[str]) -> None:
    features = features_of(table)
    keys = [f"{name}:{table.name}" if name in shared else name for name in features]
    layout.tables.append(replace(table, feature_names=keys))
    layout.public.append(replace(table, feature_names=features))
    layout.pooling_factors[table.name] = 1.0
    for feature, key in zip(features, keys, strict=True):
        layout.routes.append(Route(feature, key, PassThrough()))
        name = f"{feature}@{table.name}" if feature in shared else feature
        part = Part(key, 1, 0)
        layout.outputs.append(Output(name, feature, table.name, table.embedding_dim, False, False, (part,)))


def _physical_name(table: SidEmbeddingConfig, scheme: TableScheme, slot: Slot) -> str:
    """The configured name, then the scheme where there are several, then the slot."""
    stem = table.name if len(table.schemes) == 1 else f"{table.name}_{scheme.label}"
    return f"{stem}_{slot.suffix}" if slot.suffix else stem


def _indexer(
    scheme: TableScheme, slot: Slot, spec: SidSpec, catalog: CatalogMap | None, device: torch.device | None
) -> Indexer:
    if isinstance(scheme, HashedId):
        return IdIndexer(slot, raw_ids=catalog is not None)
    if isinstance(scheme, SentencePiece):
        if scheme.precompute and catalog is None:
            raise SidError(
                "SentencePiece",
                "precompute=True for a feature without a catalog",
                "Give the collection one.",
            )
        return PieceIndexer(scheme.pieces, catalog if scheme.precompute else None, device)
    return LevelIndexer(slot, spec)


def _shared_features(tables: Sequence[TableConfig]) -> set[str]:
    """Features of more than one table: TorchRec names their outputs ``feature@table``."""
    names = [feature for table in tables for feature in features_of(table)]
    return {name for name in names if names.count(name) > 1}
