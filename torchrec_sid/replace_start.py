"""Rows of SID tables that start from the rows of the ids they stand for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchrec_sid.errors import SidError
from torchrec_sid.replace_rebuild import NewTable, Rebuilt, configured, physical_tables, raw_features
from torchrec_sid.tables.catalog_map import CatalogMap
from torchrec_sid.tables.layout import physical_name

# Weight of an id that never occurs, as a share of the mean: it speaks where no other does.
_UNSEEN = 1e-6


def require_weights(
    collections: Sequence[Any],
    features: Mapping[str, Any],
    maps: Mapping[str, CatalogMap],
    traffic: Mapping[str, Tensor] | None,
) -> None:
    """Refuse what has nothing to start from.

    Raises:
        SidError: a feature without a catalog, tables on meta, traffic of an unknown table, of another
            length or below 0.
    """
    for feature in features:
        if feature not in maps:
            raise SidError("start", f"'ids', and feature {feature!r} has no catalog", "Give catalog=.")
    sizes = {}
    for collection in collections:
        for config in configured(collection):
            if set(config.feature_names) & set(features) & raw_features(collection):
                weight = physical_tables(collection)[config.name].weight
                sizes[config.name] = len(weight)
                if weight.is_meta:
                    raise SidError(
                        "start", f"'ids', and table {config.name!r} is on meta", "Load it first."
                    )
    for name, counts in (traffic or {}).items():
        if name not in sizes:
            raise SidError(
                f"traffic of {name!r}", "no table that is replaced", f"Tables are {sorted(sizes)}."
            )
        if counts.shape != (sizes[name],) or bool((counts < 0).any()):
            raise SidError(
                f"traffic of {name!r}",
                f"shape {tuple(counts.shape)}, smallest {float(counts.min()) if len(counts) else 0:g}",
                f"Give {sizes[name]} numbers of 0 or more, one for each row of the table.",
            )


@torch.no_grad()
def start_from_ids(built: Rebuilt, traffic: Mapping[str, Tensor]) -> list[str]:
    """Set the rows of the new tables, coarse to fine; returns a sentence for each for the report.

    What an item's vector was is told by its rows together: the first takes the mean over its items, the
    next the mean of what is left, and so on. With SIDs that tell all items apart the last row makes it
    exact. Rows that no item addresses start at zero, where they say nothing.

    Args:
        built: filled.
        traffic: old table -> ``[rows]`` weights of its ids.
    """
    notes = []
    for table in built.made:
        old = physical_tables(built.old)[table.old].weight
        weights = traffic.get(table.old, torch.ones(len(old))).to(old.device, torch.float32)
        weights = weights + _UNSEEN * weights.mean().clamp(min=1e-30)
        kept = _start(built, table, old.float(), weights)
        notes.append(
            f"{table.config.name} starts from {len(old):,} id rows and keeps {kept:.1%} of their variance."
        )
    return notes


class _ItemColumn(NamedTuple):
    """The j-th row that items read from one table."""

    weight: Tensor
    """``[rows, D]``, of the table."""
    items: Tensor
    """``[m]`` items that have a j-th row."""
    rows: Tensor
    """``[m]``."""


def _start(built: Rebuilt, table: NewTable, target: Tensor, weights: Tensor) -> float:
    """Set the rows of one configured table; returns the share of the weighted variance that it keeps."""
    ids = torch.arange(len(target), device=target.device)
    catalog = built.new.catalog_maps[(table.config.feature_names or (table.config.name,))[0]]
    packed = catalog.packed.index_select(0, catalog.place(ids.clone()))
    columns = _columns(built, table, catalog, packed, ids)
    tables = {id(column.weight): column.weight for column in columns}
    sums = {key: torch.zeros_like(weight, dtype=torch.float32) for key, weight in tables.items()}
    counts = {key: weight.new_zeros(len(weight), dtype=torch.float32) for key, weight in tables.items()}
    for weight in tables.values():
        weight.zero_()
    left = target.clone()
    for done, column in enumerate(columns, 1):
        total, count = sums[id(column.weight)], counts[id(column.weight)]
        share = weights.index_select(0, column.items)
        # A hashed row may have been set by an earlier column: it takes the mean over both.
        total.index_add_(0, column.rows, share.unsqueeze(1) * left.index_select(0, column.items))
        count.index_add_(0, column.rows, share)
        column.weight.copy_(total / count.clamp(min=1e-30).unsqueeze(1))
        left = target.clone()
        for other in columns[:done]:
            left.index_add_(0, other.items, other.weight.float().index_select(0, other.rows), alpha=-1)
    mean = (weights.unsqueeze(1) * target).sum(0) / weights.sum()
    spread = (weights * (target - mean).square().sum(1)).sum()
    return 1 - float((weights * left.square().sum(1)).sum() / spread.clamp(min=1e-30))


def _columns(
    built: Rebuilt, table: NewTable, catalog: CatalogMap, packed: Tensor, ids: Tensor
) -> list[_ItemColumn]:
    unknown = packed < 0
    spec, columns = catalog.spec, []
    for scheme in table.config.schemes:
        for slot in scheme.slots(spec):
            weight = physical_tables(built.new)[physical_name(table.config, scheme, slot)].weight.detach()
            indexer = scheme.indexer(slot, spec, catalog, ids.device)
            found = indexer(packed, ids, unknown)
            counts = found.counts
            if counts is None:
                counts = torch.full_like(ids, indexer.per_item)
            first = counts.cumsum(0) - counts
            for j in range(int(counts.max()) if len(counts) else 0):
                items = (counts > j).nonzero().flatten()
                rows = found.rows.index_select(0, first.index_select(0, items) + j)
                columns.append(_ItemColumn(weight, items, rows))
    return columns
