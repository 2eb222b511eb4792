"""Contradictions between table configurations, refused at construction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from torchrec.modules.embedding_configs import EmbeddingConfig

from torchrec_sid.errors import SidError
from torchrec_sid.spec import SidSpec
from torchrec_sid.tables.catalog_map import Catalog, CatalogMap
from torchrec_sid.tables.configs import SidTableConfig

TableConfig: TypeAlias = EmbeddingConfig | SidTableConfig
"""A table of raw ids (TorchRec's own configuration) or of SIDs."""


def features_of(table: TableConfig) -> list[str]:
    """Features of a table; one of its own name where none is given, as in TorchRec."""
    return list(table.feature_names or [table.name])


def output_dim(table: SidTableConfig, dims: Sequence[int]) -> int:
    """Dimension of the output, from those of the schemes.

    Raises:
        SidError: schemes of different dimensions to be summed.
    """
    if table.combine == "concat":
        return sum(dims)
    if set(dims) != {table.embedding_dim}:
        other = next(dim for dim in dims if dim != table.embedding_dim)
        raise SidError(
            f"table {table.name!r}",
            f"Side features of {other} dimensions, embedding_dim={table.embedding_dim}",
            f"Use Side(project=True), combine='concat', or embedding_dim={other}.",
        )
    return table.embedding_dim


def check_catalogs(tables: Sequence[TableConfig], catalogs: Mapping[str, Catalog | CatalogMap]) -> None:
    """Refuse a catalog for a feature that has no SID table.

    Raises:
        SidError: naming the feature and those that do.
    """
    sid = [f for t in tables if isinstance(t, SidTableConfig) for f in features_of(t)]
    for feature in catalogs:
        if feature not in sid:
            raise SidError(
                f"catalog of feature {feature!r}",
                "no table of SIDs has that feature",
                f"Features of SID tables are {sorted(set(sid))}.",
            )


def check_raw_tables(
    tables: Sequence[TableConfig],
    specs: Mapping[str, SidSpec],
    catalogs: Mapping[str, Catalog | CatalogMap],
) -> None:
    """Refuse a table of raw ids for a feature that carries SIDs.

    Raises:
        SidError: naming feature and table.
    """
    for table in tables:
        if isinstance(table, SidTableConfig):
            continue
        for feature in features_of(table):
            if feature in specs and feature not in catalogs:
                raise SidError(
                    f"feature {feature!r}",
                    f"carries SIDs, but table {table.name!r} takes raw ids",
                    "Give the collection a catalog for it, or use HashedId for a table of whole SIDs.",
                )


def resolve_spec(
    specs: dict[str, SidSpec], table: SidTableConfig, catalogs: Mapping[str, Catalog | CatalogMap]
) -> SidSpec:
    """The one spec of a table and all its features; noted in ``specs`` for each feature.

    Raises:
        SidError: no spec, more than 63 bits, a catalog of another spec, or a feature with two.
    """
    found = table.spec
    for feature in features_of(table):
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
    for feature in features_of(table):
        other = specs.setdefault(feature, found)
        if other != found:
            raise SidError(
                f"feature {feature!r}",
                f"has SIDs of {other.cardinalities} in one table and of {found.cardinalities} in another",
                "A feature carries one kind of SID: use one spec.",
            )
    return found
