"""`move_tables`: tables of SIDs that were trained under one catalog, carried to the SIDs of another.

A new generation of SIDs gives items other rows. What a new row should know is in the old rows of its items:
it starts as their mean, weighted by traffic, and so does its optimizer state. Everything is a sparse linear
map from old rows to new ones, so that it works wherever the rows are: each process adds up what its blocks
of the old table contribute, and keeps its blocks of the sum.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.model_parallel import DMPCollection
from torchrec.optim.keyed import KeyedOptimizer

from torchrec_sid.catalog.drift import ItemValues
from torchrec_sid.collections import SidCollection
from torchrec_sid.errors import SidError
from torchrec_sid.parallel.embedding_tables import LocalShard, row_blocks
from torchrec_sid.parallel.ranks import Ranks
from torchrec_sid.tables.catalog_map import UNKNOWN, Catalog
from torchrec_sid.tables.configs import SidTableConfig
from torchrec_sid.tables.indexers import Indexer
from torchrec_sid.tables.layout import physical_name
from torchrec_sid.tables.sentencepiece.piece_scheme import PieceIndexer, SentencePiece
from torchrec_sid.tables.slots import Slot

Catalogs = Catalog | Mapping[str, Catalog]
"""One catalog for every feature of SIDs, or feature -> catalog."""

# Traffic of an item that has none, as a share of the mean: it speaks where no other does.
_UNSEEN = 1e-6
_ITEMS = 1 << 21  # at a time
_NUMBERS = 1 << 24  # of a table that travel at a time: 64 MiB of float32


@dataclass(frozen=True)
class MovedTable:
    """What became of one table."""

    name: str
    rows: int
    started: int
    """Rows that start from old rows. The others are zero, where they say nothing."""
    states: tuple[str, ...]
    """Optimizer states that were carried along, by name."""


@dataclass(frozen=True)
class MoveReport:
    """What :func:`move_tables` did."""

    tables: tuple[MovedTable, ...]
    items: int
    """Items in both catalogs."""
    left: tuple[str, ...]
    """Tables of the SIDs that stayed as they are, each with the reason."""

    def describe(self) -> str:
        """Line by line."""
        lines = [f"{self.items:,} items in both catalogs"]
        for table in self.tables:
            states = f", with {', '.join(table.states)}" if table.states else ", without optimizer state"
            lines.append(
                f"{table.name}: {table.started:,} of {table.rows:,} rows start from old rows{states}"
            )
        return "\n".join([*lines, *self.left])


@torch.no_grad()
def move_tables(
    model: nn.Module,
    before: Catalogs,
    after: Catalogs,
    *,
    traffic: ItemValues | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> MoveReport:
    """Carry the tables of SIDs from one catalog to another, in place; collective where it is sharded.

    A row becomes the mean of the old rows of its items, weighted by their traffic. Prefixes in one table
    are carried coarse to fine: the rows of depths 1 to d together become the mean of what the old rows of
    depths 1 to d summed up to, so that a fine row takes up what the mean in a coarse one leaves. A piece
    takes the pieces that held its levels, each by the share of its levels, which keeps the sums of items
    too. Rows of no item become zero, and the row of the unknown item stays. Optimizer state moves as plain
    means. Features that carry raw ids are looked up in ``after`` from then on; a reader that looks SIDs up
    must use it too. What is not a table (SIDE's features, their projections, dense parameters) stays.

    Args:
        model: holds SID collections; plain, or a ``DistributedModelParallel`` under any sharding.
        before: catalogs that the tables were trained with.
        after: catalogs of the new SIDs, of the same shape.
        traffic: weights of items, 0 or more, e.g. their impressions; all alike by default. Items that it
            lacks count next to nothing.
        optimizer: whose state moves along. By default that which is fused into a sharded model's backward
            pass: give all of it (``ShardedModel.make_optimizer``) where tables are data-parallel, and that
            of an unsharded model.

    Raises:
        SidError: no table of SIDs, catalogs of another shape or missing for a feature, no item in both, a
            model of 2D parallelism, negative traffic.
    """
    if isinstance(model, DMPCollection):
        raise SidError(
            "move_tables",
            "a model of 2D parallelism",
            "Move the tables of a model over one group of ranks, and load its checkpoint.",
        )
    inner, ranks = model, Ranks(None, 0, 1)
    if isinstance(model, DistributedModelParallel):
        wrapped: Any = model
        inner, ranks = wrapped.module, Ranks.open()
        optimizer = wrapped.fused_optimizer if optimizer is None else optimizer
    found = [(path, m) for path, m in inner.named_modules() if isinstance(m, SidCollection)]
    moves, left, items = [], [], 0
    for path, collection in found:
        for table in collection.tables:
            if isinstance(table, SidTableConfig):
                pairs = _catalog_pairs(table, before, after)
                plans, reasons, known = _plan_table(collection, table, pairs, traffic)
                items = max(items, known)
                prefix = f"{path}." if path else ""
                moves += [(f"{prefix}{collection.table_keys[plan.name]}", plan) for plan in plans]
                left += reasons
    if not moves and not left:
        raise SidError("move_tables", "a model without tables of SIDs", "Pass one with a SID collection.")
    weights = model.state_dict()
    parameters = dict(model.named_parameters())
    done = []
    for key, plan in moves:
        for rows in plan.nested or (plan.mean,):
            _move(weights[key], rows, ranks)
        states = _states(optimizer, key, parameters, plan.rows)
        names = _names(states, ranks)
        for name in names:
            _move(states.get(name), plan.mean, ranks)
        started = len(plan.mean.new.unique()) - 1
        done.append(MovedTable(plan.name, plan.rows, started, tuple(names)))
    for _, collection in found:
        _look_up_in(collection, after)
    return MoveReport(tuple(done), items, tuple(left))


class _RowMap(NamedTuple):
    """A physical table's new rows as sums of its old ones; sorted by new row."""

    name: str
    rows: int
    new: Tensor
    """``[m]`` int64."""
    old: Tensor
    """``[m]`` int64."""
    share: Tensor
    """``[m]`` float64: how much of the old row is in the new one."""


class _TablePlan(NamedTuple):
    """How the rows of a physical table move."""

    name: str
    rows: int
    mean: _RowMap
    """What each row has itself; of optimizer state."""
    nested: tuple[_RowMap, _RowMap] | None
    """For weights of prefixes: what the rows up to each depth sum up to, then less that of a depth before.
    None where that is :attr:`mean`."""


class _CatalogPair(NamedTuple):
    before: Catalog
    after: Catalog


def _catalog_pairs(table: SidTableConfig, before: Catalogs, after: Catalogs) -> list[_CatalogPair]:
    """The catalogs of a table's features, each pair once."""
    pairs: dict[tuple[int, int], _CatalogPair] = {}
    for feature in table.feature_names or (table.name,):
        pair = _CatalogPair(_catalog_of(before, feature), _catalog_of(after, feature))
        if pair.before.spec != pair.after.spec:
            raise SidError(
                f"feature {feature!r}",
                f"SIDs of {pair.before.spec.cardinalities} before, {pair.after.spec.cardinalities} after",
                "Rows can be moved between SIDs of one shape: build and train a model for the other one.",
            )
        pairs[id(pair.before), id(pair.after)] = pair
    return list(pairs.values())


def _catalog_of(catalogs: Catalogs, feature: str) -> Catalog:
    if not isinstance(catalogs, Mapping):
        return catalogs
    if feature not in catalogs:
        raise SidError(f"feature {feature!r}", "no catalog", f"There are some for {sorted(catalogs)}.")
    return catalogs[feature]


def _plan_table(
    collection: SidCollection,
    table: SidTableConfig,
    pairs: list[_CatalogPair],
    traffic: ItemValues | None,
) -> tuple[list[_TablePlan], list[str], int]:
    """Row maps of the physical tables of one configuration, what stays and why, and items in common."""
    feature = (table.feature_names or (table.name,))[0]
    catalog = collection.catalog_maps.get(feature)
    plans, left, most = [], [], 0
    for scheme in table.schemes:
        slots = scheme.slots(pairs[0].before.spec)
        if (
            scheme.vectors(pairs[0].before.spec, table.embedding_dim, catalog, torch.device("cpu"))
            is not None
        ):
            left.append(f"{table.name}: {scheme.label} has no rows to move: fine-tune it")
            continue
        for slot in slots:
            name = physical_name(table, scheme, slot)
            # The pieces of a few SIDs at a time are cut here, not looked up.
            plain = replace(scheme, precompute=False) if isinstance(scheme, SentencePiece) else scheme
            indexer = plain.indexer(slot, pairs[0].before.spec, None, torch.device("cpu"))
            if scheme.label == "id" and catalog is not None:
                left.append(f"{name}: rows of raw ids, which stay where they are")
                continue
            plan, known = _plan_slot(name, slot, indexer, pairs, traffic)
            plans.append(plan)
            most = max(most, known)
    return plans, left, most


class _Sums:
    """Weighted means of old rows by new row, items added some at a time."""

    def __init__(self, name: str, rows: int) -> None:
        self._name, self._rows = name, rows
        self._keys = torch.zeros(0, dtype=torch.int64)
        self._values = torch.zeros(0, dtype=torch.float64)
        self._total = torch.zeros(rows, dtype=torch.float64)

    def add(self, new: Tensor, old: Tensor, values: Tensor) -> None:
        """What old rows are worth to new rows, all of one shape."""
        keys, place = torch.cat([self._keys, (new * self._rows + old).flatten()]).unique(
            return_inverse=True
        )
        values = torch.cat([self._values, values.flatten()])
        self._values = torch.zeros(len(keys), dtype=torch.float64).index_add_(0, place, values)
        self._keys = keys

    def count(self, new: Tensor, weights: Tensor) -> None:
        """What their sums are divided by."""
        self._total.index_add_(0, new.flatten(), weights.flatten())

    def mean(self) -> _RowMap:
        """The map; the last row, of the unknown item, stays."""
        new, old = self._keys // self._rows, self._keys % self._rows
        last = torch.tensor([self._rows - 1])
        known = new != last
        share = self._values / self._total[new]
        return _RowMap(
            self._name,
            self._rows,
            torch.cat([new[known], last]),
            torch.cat([old[known], last]),
            torch.cat([share[known], torch.ones(1, dtype=torch.float64)]),
        )


def _plan_slot(
    name: str, slot: Slot, indexer: Indexer, pairs: list[_CatalogPair], traffic: ItemValues | None
) -> tuple[_TablePlan, int]:
    plain, nested, items = _Sums(name, slot.rows), _Sums(name, slot.rows), 0
    # Prefixes of which each has rows of its own, coarse to fine.
    prefixes = [j for j, column in enumerate(slot.columns) if column.exact and column.start == 0]
    parents = torch.zeros(2, 0, dtype=torch.int64)
    for pair in pairs:
        for ids, old, new in _common_items(pair):
            items += len(ids)
            weight = _item_weights(ids, traffic).unsqueeze(1)
            before, after, part, once = _rows_of_items(indexer, old, new)
            plain.add(after, before, weight * part)
            plain.count(after, weight * once)
            for j in range(after.shape[1]):
                depth = prefixes.index(j) + 1 if j in prefixes else 0
                sources = before[:, prefixes[:depth]] if depth else before[:, j : j + 1]
                nested.add(after[:, j : j + 1].expand_as(sources), sources, weight.expand(sources.shape))
                nested.count(after[:, j], weight)
                if depth > 1:
                    both = torch.stack([after[:, j], after[:, prefixes[depth - 2]]])
                    parents = torch.cat([parents, both], dim=1).unique(dim=1)
    if not items:
        raise SidError(f"table {name!r}", "no item is in both catalogs", "Pass catalogs of the same items.")
    mean = plain.mean()
    if len(prefixes) < 2:
        return _TablePlan(name, slot.rows, mean, None), items
    return _TablePlan(name, slot.rows, mean, (nested.mean(), _less_parents(mean, parents))), items


def _less_parents(mean: _RowMap, parents: Tensor) -> _RowMap:
    """Every row that started, less the row of its parent: ``[2, m]`` rows and their parents."""
    own = mean.new.unique()
    new, old = torch.cat([own, parents[0]]), torch.cat([own, parents[1]])
    share = torch.cat([torch.ones(len(own)), -torch.ones(parents.shape[1])]).double()
    order = new.argsort(stable=True)
    return _RowMap(mean.name, mean.rows, new[order], old[order], share[order])


def _common_items(pair: _CatalogPair) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Ids ``[n]`` of the items in both catalogs and their packed SIDs before and after, some at a time."""
    for ids in pair.after.item_ids().split(_ITEMS):
        ids = ids.clone()
        old, new = pair.before.lookup(ids, UNKNOWN), pair.after.lookup(ids, UNKNOWN)
        both = (old >= 0) & (new >= 0)
        yield ids[both], old[both], new[both]


def _item_weights(ids: Tensor, traffic: ItemValues | None) -> Tensor:
    if traffic is None:
        return torch.ones(len(ids), dtype=torch.float64)
    return traffic.of(ids, 0.0).double() + _UNSEEN * traffic.values.double().mean().clamp(min=1e-300)


def _rows_of_items(indexer: Indexer, old: Tensor, new: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows of items before and after, ``[n, j]`` each: what stands against what.

    Returns:
        Rows before, rows after, the part of the row before that goes over, and what the place counts of one
        occurrence of the row after (the places of one piece count 1 together).
    """
    if indexer.per_item == 0:
        if not isinstance(indexer, PieceIndexer):
            raise SidError(
                type(indexer).__name__,
                "rows whose number varies",
                "Move its tables by a program of your own.",
            )
        before, held = indexer.rows_by_level(old)
        after, size = indexer.rows_by_level(new)
        return before, after, 1 / held.double(), 1 / size.double()
    before, after = (indexer(s, s, None).rows.view(-1, indexer.per_item) for s in (old, new))
    one = torch.ones(before.shape, dtype=torch.float64)
    return before, after, one, one


def _states(
    optimizer: Any, key: str, parameters: Mapping[str, nn.Parameter], rows: int
) -> dict[str, Tensor]:
    """Tensors of a table's optimizer state that have a row for each of its rows, by name."""
    if optimizer is None:
        return {}
    if isinstance(optimizer, KeyedOptimizer):
        state = optimizer.state_dict()["state"].get(key, {})
    else:
        state = optimizer.state.get(parameters.get(key), {})
    return {
        name.rpartition(".")[2]: tensor
        for name, tensor in state.items()
        if isinstance(tensor, Tensor) and tensor.dim() and tensor.size(0) and tensor.size(0) % rows == 0
    }


def _names(states: Mapping[str, Tensor], ranks: Ranks) -> list[str]:
    """Names of the states on any rank: of a fused optimizer a process knows those of its shards alone."""
    known = ranks.all(lambda: list(states), where="optimizer state")
    return sorted({name for names in known for name in names})


def _move(tensor: Tensor | None, plan: _RowMap, ranks: Ranks) -> None:
    """Write the new rows of a table, or of a state of it, over the old ones; None: none is here."""
    blocks = [] if tensor is None else list(row_blocks(tensor, plan.rows))
    whole = type(tensor) in (Tensor, nn.Parameter)
    # Of a table that every process holds the first one speaks.
    old = [] if whole and ranks.rank else [b._replace(tensor=b.tensor.clone()) for b in blocks]
    columns = max([0, *(b.column + b.tensor.shape[1] for b in blocks)])
    columns = max(ranks.all(lambda: columns, where=plan.name))
    step = max(1, _NUMBERS // max(columns, 1))
    for first in range(0, plan.rows, step):
        count = min(step, plan.rows - first)
        begin, end = torch.searchsorted(plan.new, torch.tensor([first, first + count])).tolist()
        part = ranks.sum(_contribution(old, plan, slice(begin, end), first, count, columns))
        for block in blocks:
            low, high = max(first, block.row), min(first + count, block.row + len(block.tensor))
            if low < high:
                width = block.tensor.shape[1]
                piece = part[low - first : high - first, block.column : block.column + width]
                block.tensor[low - block.row : high - block.row].copy_(piece)


def _contribution(
    old: list[LocalShard], plan: _RowMap, chosen: slice, first: int, count: int, columns: int
) -> Tensor:
    """What this process's blocks add to ``count`` new rows from ``first`` on: ``[count, columns]``."""
    total = torch.zeros(count, columns)
    new, rows, share = plan.new[chosen] - first, plan.old[chosen], plan.share[chosen].float()
    for block in old:
        here = (rows >= block.row) & (rows < block.row + len(block.tensor))
        values = block.tensor.cpu().float()[rows[here] - block.row] * share[here].unsqueeze(1)
        width = values.shape[1]
        total[:, block.column : block.column + width].index_add_(0, new[here], values)
    return total


def _look_up_in(collection: SidCollection, after: Catalogs) -> None:
    """Let the features that carry raw ids read the new catalog."""
    maps = {id(m): (m, feature) for feature, m in collection.catalog_maps.items()}
    for lookup, feature in maps.values():
        lookup.replace(_catalog_of(after, feature))
    for module in collection.modules():
        if isinstance(module, PieceIndexer):
            module.cut_catalog()
