"""Indexers: modules without parameters that turn the packed SIDs of a feature into rows of a table."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torchrec_sid.devices import FrozenState
from torchrec_sid.hashing import hash_rows_
from torchrec_sid.spec import SidSpec
from torchrec_sid.tables.slots import LevelRange, Slot


class ItemRows(NamedTuple):
    """Rows that some items read from one table."""

    rows: Tensor
    """``[m]`` int64, item by item."""
    counts: Tensor | None
    """``[n]`` int64: rows of each item; None where all have the same number."""


class Indexer(FrozenState):
    """Packed SIDs ``[n]`` -> the rows of one table that they address; buffers only."""

    per_item: int
    """Rows of each item; 0 where their number varies."""

    def forward(self, packed: Tensor, raw: Tensor, unknown: Tensor | None) -> ItemRows:
        """Rows of a feature's items.

        Args:
            packed: ``[n]`` int64, SIDs within their alphabet; -1 marks the unknown item.
            raw: ``[n]`` int64, what the feature carried before a catalog.
            unknown: ``[n]`` bool, where ``packed`` is -1; None where no item is unknown.
        """
        raise NotImplementedError


class LevelIndexer(Indexer):
    """One row for every range of levels of a :class:`~torchrec_sid.tables.slots.Slot`."""

    def __init__(self, slot: Slot, spec: SidSpec) -> None:
        super().__init__()
        self.per_item: int = len(slot.columns)
        self._unknown_row: int = slot.rows - 1
        self._bases: list[int] = [c.base for c in slot.columns]
        self._rows: list[int] = [c.rows for c in slot.columns]
        self._salts: list[int] = [c.salt for c in slot.columns]
        self._exact: list[bool] = [c.exact for c in slot.columns]
        runs = [_runs(c, spec) for c in slot.columns]
        self._shifts: list[list[int]] = [[spec.shifts[stop - 1] for _, stop in r] for r in runs]
        # Above the first level there is nothing to mask away; 0 stands for that.
        self._masks: list[list[int]] = [[_mask(spec, *run) if run[0] else 0 for run in r] for r in runs]
        self._sizes: list[list[int]] = [[_size(spec, *run) for run in r] for r in runs]

    def forward(self, packed: Tensor, raw: Tensor, unknown: Tensor | None) -> ItemRows:
        """Rows ``[n * per_item]`` int64, item-major and contiguous; ``raw`` is not read."""
        columns: list[Tensor] = []
        for j in range(self.per_item):
            # Each column is computed in place in one fresh tensor: page faults cost more than arithmetic.
            column = packed.bitwise_right_shift(self._shifts[j][0])
            if self._masks[j][0] != 0:
                column = column.bitwise_and_(self._masks[j][0])
            for run in range(1, len(self._shifts[j])):
                digit = packed.bitwise_right_shift(self._shifts[j][run]).bitwise_and_(self._masks[j][run])
                column = column.mul_(self._sizes[j][run]).add_(digit)
            if not self._exact[j]:
                column = hash_rows_(column, self._salts[j], self._rows[j])
            if self._bases[j] != 0:
                column = column.add_(self._bases[j])
            if unknown is not None:
                column = column.masked_fill_(unknown, self._unknown_row)
            columns.append(column)
        return ItemRows(columns[0] if len(columns) == 1 else torch.stack(columns, dim=1).view(-1), None)


class IdIndexer(Indexer):
    """One hashed row per item, from the value as it came in: raw id, or packed SID without a catalog."""

    def __init__(self, slot: Slot, *, raw_ids: bool) -> None:
        super().__init__()
        (column,) = slot.columns
        self.per_item: int = 1
        self._rows: int = column.rows
        self._salt: int = column.salt
        self._raw_ids = raw_ids

    def forward(self, packed: Tensor, raw: Tensor, unknown: Tensor | None) -> ItemRows:
        """``raw`` ``[n]`` int64 -> rows ``[n]`` int64.

        A raw id has a row of its own whether or not the catalog knows it; a packed -1 has the last one.
        """
        rows = hash_rows_(raw.clone(), self._salt, self._rows)
        if unknown is not None and not self._raw_ids:
            rows = rows.masked_fill_(unknown, self._rows)
        return ItemRows(rows, None)


class PassThrough(Indexer):
    """The value as it came in, for raw ids; or the packed SID, for vectors without a table."""

    def __init__(self, *, packed: bool = False) -> None:
        super().__init__()
        self.per_item: int = 1
        self._packed = packed

    def forward(self, packed: Tensor, raw: Tensor, unknown: Tensor | None) -> ItemRows:
        """``[n]`` -> ``[n]``, not copied."""
        return ItemRows(packed if self._packed else raw, None)


def _runs(column: LevelRange, spec: SidSpec) -> list[tuple[int, int]]:
    """Split a column's levels so that the packed bits of each run are its mixed-radix rank.

    They are where every level but the run's first has a power of two of codes. A hash takes the bits of
    all levels at once: they tell combinations apart, and need not be a rank.
    """
    if not column.exact:
        return [(column.start, column.stop)]
    breaks = [column.start]
    for level in range(column.start + 1, column.stop):
        if spec.cardinalities[level] != 1 << spec.level_bits[level]:
            breaks.append(level)
    return list(zip(breaks, [*breaks[1:], column.stop], strict=True))


def _mask(spec: SidSpec, start: int, stop: int) -> int:
    return (1 << sum(spec.level_bits[start:stop])) - 1


def _size(spec: SidSpec, start: int, stop: int) -> int:
    size = 1
    for k in spec.cardinalities[start:stop]:
        size *= k
    return size
