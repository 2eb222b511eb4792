"""From table configurations to physical tables, keys and routes: everything decided at construction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeAlias

from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig, PoolingType

from torchrec_sid.errors import SidError
from torchrec_sid.spec import SidSpec
from torchrec_sid.tables.catalog_map import Catalog, CatalogMap
from torchrec_sid.tables.configs import SidEmbeddingConfig
from torchrec_sid.tables.indexers import IdIndexer, Indexer, LevelIndexer, PassThrough
from torchrec_sid.tables.schemes import Slot
from torchrec_sid.tables.transform import Route

TableConfig: TypeAlias = EmbeddingConfig | SidEmbeddingConfig
"""A table of raw ids (TorchRec's own configuration) or of SIDs."""


class Part(NamedTuple):
    """A looked-up key that contributes to an output."""

    key: str
    """Key of the transformed KJT, and of the stock collection's result."""
    per_item: int
    """Rows per item; 0 where it varies."""
    group: int
    """Parts of one group (one scheme) are summed."""


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

    tables: list[TableConfig] = field(default_factory=list)
    """Physical tables of the stock collection inside."""
    routes: list[Route] = field(default_factory=list)
    outputs: list[Output] = field(default_factory=list)
    specs: dict[str, SidSpec] = field(default_factory=dict)
    """Feature -> shape of its SIDs."""
    public: list[TableConfig] = field(default_factory=list)
    """One configuration per configured table, describing the result: what consumers size themselves by."""
    pooling_factors: dict[str, float] = field(default_factory=dict)
    """Physical table -> rows per item."""

    @property
    def direct(self) -> bool:
        """Whether the stock collection's result is already the result."""
        return all(
            len(out.parts) == 1 and out.parts[0].key == out.name and not out.mean for out in self.outputs
        )


def plan_layout(
    tables: Sequence[TableConfig],
    catalogs: Mapping[str, Catalog],
    physical: type[EmbeddingConfig] | type[EmbeddingBagConfig],
) -> Layout:
    """Resolve configurations into a :class:`Layout`.

    Args:
        tables: configurations as the user gave them.
        catalogs: feature -> catalog, for the features that carry raw ids.
        physical: configuration class of the stock collection.

    Raises:
        SidError: duplicate table names, a feature with two specs, a catalog whose spec is another, a
            feature that carries SIDs for one table and raw ids for another.
    """
    if not tables:
        raise SidError("tables", "none", "Give at least one table.")
    layout = Layout()
    shared = _shared_features(tables)
    _check_catalogs(tables, catalogs)
    for table in tables:
        if isinstance(table, SidEmbeddingConfig):
            _place_sid_table(layout, table, catalogs, shared, physical)
        else:
            _place_raw_table(layout, table, catalogs, shared)
    names = [table.name for table in layout.tables]
    for name in names:
        if names.count(name) > 1:
            raise SidError(f"table {name!r}", "the name is used twice", "Give every table its own name.")
    _check_raw_tables(tables, layout.specs, catalogs)
    return layout


def make_catalog_maps(
    layout: Layout, catalogs: Mapping[str, Catalog], device: object
) -> dict[str, CatalogMap]:
    """One map per catalog, shared by the features that use it."""
    maps: dict[int, CatalogMap] = {}
    result = {}
    for feature in layout.specs:
        catalog = catalogs.get(feature)
        if catalog is not None:
            if id(catalog) not in maps:
                maps[id(catalog)] = CatalogMap(catalog, device)  # type: ignore[arg-type]
            result[feature] = maps[id(catalog)]
    return result


def _place_sid_table(
    layout: Layout,
    table: SidEmbeddingConfig,
    catalogs: Mapping[str, Catalog],
    shared: set[str],
    physical: type[EmbeddingConfig],
) -> None:
    spec = _resolve_spec(layout, table, catalogs)
    slots = [
        (group, name, slot)
        for group, scheme in enumerate(table.schemes)
        for name, slot in _names(table, group, scheme.slots(spec))
    ]
    pooling = getattr(table, "pooling", PoolingType.SUM)
    parts: dict[str, list[Part]] = {feature: [] for feature in _features(table)}
    for group, name, slot in slots:
        keys = []
        for feature in _features(table):
            key = feature if len(slots) == 1 and feature not in shared else f"{feature}:{name}"
            indexer = _indexer(slot, spec, feature in catalogs)
            layout.routes.append(Route(feature, key, indexer))
            parts[feature].append(Part(key, len(slot.columns), group))
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
        layout.pooling_factors[name] = float(len(slot.columns))
    dim = table.embedding_dim * (len(table.schemes) if table.combine == "concat" else 1)
    options = {"pooling": pooling} if physical is EmbeddingBagConfig else {}
    layout.public.append(
        physical(
            name=table.name,
            embedding_dim=dim,
            num_embeddings=sum(slot.rows for _, _, slot in slots),
            feature_names=list(_features(table)),
            data_type=table.data_type,
            **options,
        )
    )
    for feature in _features(table):
        name = f"{feature}@{table.name}" if feature in shared else feature
        mean = pooling is PoolingType.MEAN
        concat = table.combine == "concat"
        layout.outputs.append(Output(name, feature, table.name, dim, mean, concat, tuple(parts[feature])))


def _place_raw_table(
    layout: Layout, table: EmbeddingConfig, catalogs: Mapping[str, Catalog], shared: set[str]
) -> None:
    features = list(table.feature_names) or [table.name]
    keys = [f"{name}:{table.name}" if name in shared else name for name in features]
    inner = replace(table, feature_names=keys)
    layout.tables.append(inner)
    layout.public.append(replace(table, feature_names=features))
    layout.pooling_factors[table.name] = 1.0
    for feature, key in zip(features, keys, strict=True):
        layout.routes.append(Route(feature, key, PassThrough()))
        name = f"{feature}@{table.name}" if feature in shared else feature
        part = Part(key, 1, 0)
        layout.outputs.append(Output(name, feature, table.name, table.embedding_dim, False, False, (part,)))


def _names(table: SidEmbeddingConfig, group: int, slots: Sequence[Slot]) -> list[tuple[str, Slot]]:
    """Physical table names: the configured one, then the scheme where there are several, then the slot."""
    stem = table.name if len(table.schemes) == 1 else f"{table.name}_{table.schemes[group].label}"
    return [(f"{stem}_{slot.suffix}" if slot.suffix else stem, slot) for slot in slots]


def _indexer(slot: Slot, spec: SidSpec, raw_ids: bool) -> Indexer:
    return IdIndexer(slot, raw_ids=raw_ids) if slot.raw else LevelIndexer(slot, spec)


def _features(table: TableConfig) -> list[str]:
    return list(table.feature_names or [table.name])


def _shared_features(tables: Sequence[TableConfig]) -> set[str]:
    """Features of more than one table: TorchRec names their outputs ``feature@table``."""
    names = [feature for table in tables for feature in _features(table)]
    return {name for name in names if names.count(name) > 1}


def _check_raw_tables(
    tables: Sequence[TableConfig], specs: Mapping[str, SidSpec], catalogs: Mapping[str, Catalog]
) -> None:
    for table in tables:
        if isinstance(table, SidEmbeddingConfig):
            continue
        for feature in _features(table):
            if feature in specs and feature not in catalogs:
                raise SidError(
                    f"feature {feature!r}",
                    f"carries SIDs, but table {table.name!r} takes raw ids",
                    "Give the collection a catalog for it, or use HashedId for a table of whole SIDs.",
                )


def _check_catalogs(tables: Sequence[TableConfig], catalogs: Mapping[str, Catalog]) -> None:
    sid = [f for t in tables if isinstance(t, SidEmbeddingConfig) for f in _features(t)]
    for feature in catalogs:
        if feature not in sid:
            raise SidError(
                f"catalog of feature {feature!r}",
                "no table of SIDs has that feature",
                f"Features of SID tables are {sorted(set(sid))}.",
            )


def _resolve_spec(layout: Layout, table: SidEmbeddingConfig, catalogs: Mapping[str, Catalog]) -> SidSpec:
    """The one spec of a table and all its features."""
    found = table.spec
    for feature in _features(table):
        catalog = catalogs.get(feature)
        if catalog is not None:
            if found is not None and catalog.spec != found:
                raise SidError(
                    f"table {table.name!r}, feature {feature!r}",
                    f"the catalog holds SIDs of {catalog.spec.cardinalities}, "
                    f"the table is for {found.cardinalities}",
                    "Use the catalog that this spec belongs to, or leave spec=None to take the catalog's.",
                )
            found = catalog.spec
    if found is None:
        raise SidError(f"table {table.name!r}", "no spec", "Give spec=SidSpec(...), or a catalog.")
    if not found.fits_int64:
        raise SidError(
            f"table {table.name!r}",
            f"a SID of {found.bits} bits",
            "Tables take SIDs that pack into 63 bits: truncate it.",
        )
    for feature in _features(table):
        other = layout.specs.setdefault(feature, found)
        if other != found:
            raise SidError(
                f"feature {feature!r}",
                f"has SIDs of {other.cardinalities} in one table and of {found.cardinalities} in another",
                "A feature carries one kind of SID: use one spec.",
            )
    return found
