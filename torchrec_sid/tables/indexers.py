"""Indexers: modules without parameters that turn the packed SIDs of a feature into rows of a table.

All take ``(packed, raw, unknown)`` and return rows, and how many each item has where that varies, so that a
transform can hold a list of them; their attributes are plain integers and lists, so that they script.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from torchrec_sid.hashing import hash_rows_
from torchrec_sid.spec import SidSpec
from torchrec_sid.tables.catalog_map import CatalogMap
from torchrec_sid.tables.pieces import SidPieces
from torchrec_sid.tables.slots import Column, Slot
from torchrec_sid.tables.tokenizer import SidTokenizer, Tokens


class Rows(NamedTuple):
    """What an indexer returns."""

    rows: Tensor
    """``[m]`` int64, item by item."""
    counts: Tensor | None
    """``[n]`` int64: rows of each item; None where all have the same number."""


class LevelIndexer(nn.Module):
    """Rows of one table for every column of a :class:`~torchrec_sid.tables.schemes.Slot`."""

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

    def forward(self, packed: Tensor, raw: Tensor, unknown: Tensor | None) -> Rows:
        """Packed SIDs ``[n]`` int64 -> rows ``[n * per_item]`` int64, item-major and contiguous.

        Args:
            packed: SIDs within their alphabet; -1 marks the unknown item.
            raw: not used here; what the feature carried before a catalog.
            unknown: ``[n]`` bool, where ``packed`` is -1; None where no item is unknown.
        """
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
        return Rows(columns[0] if len(columns) == 1 else torch.stack(columns, dim=1).view(-1), None)


class IdIndexer(nn.Module):
    """One hashed row per item, from the value as it came in: raw id, or packed SID without a catalog."""

    def __init__(self, slot: Slot, *, raw_ids: bool) -> None:
        super().__init__()
        (column,) = slot.columns
        self.per_item: int = 1
        self._rows: int = column.rows
        self._salt: int = column.salt
        self._raw_ids = raw_ids

    def forward(self, packed: Tensor, raw: Tensor, unknown: Tensor | None) -> Rows:
        """``raw`` ``[n]`` int64 -> rows ``[n]`` int64.

        A raw id has a row of its own whether or not the catalog knows it; a packed -1 has the last one.
        """
        rows = hash_rows_(raw.clone(), self._salt, self._rows)
        if unknown is not None and not self._raw_ids:
            rows = rows.masked_fill_(unknown, self._rows)
        return Rows(rows, None)


class PassThrough(nn.Module):
    """The value as it came in, for raw ids; or the packed SID, for parameter-free features."""

    def __init__(self, *, packed: bool = False) -> None:
        super().__init__()
        self.per_item: int = 1
        self._packed = packed

    def forward(self, packed: Tensor, raw: Tensor, unknown: Tensor | None) -> Rows:
        """``[n]`` -> ``[n]``, not copied."""
        return Rows(packed if self._packed else raw, None)


class PieceIndexer(nn.Module):
    """One row per piece: cut from each batch, or read from a buffer with those of every catalog item."""

    table: Tensor
    counts: Tensor

    def __init__(
        self, pieces: SidPieces, catalog: CatalogMap | None, device: torch.device | str | None
    ) -> None:
        super().__init__()
        self.per_item: int = 0
        self._unknown_row: int = len(pieces)
        self.tokenizer = SidTokenizer(pieces, device)
        self.catalog = catalog
        if catalog is not None:
            tokens = self._cut(catalog.packed, catalog.packed < 0)
            self.register_buffer("table", tokens.ids.contiguous(), persistent=False)
            self.register_buffer("counts", tokens.counts, persistent=False)

    def forward(self, packed: Tensor, raw: Tensor, unknown: Tensor | None) -> Rows:
        """Packed SIDs ``[n]`` int64 -> rows ``[sum of counts]`` and counts ``[n]``, int64."""
        if self.catalog is not None:
            place = self.catalog.place(raw)
            tokens = Tokens(self.table.index_select(0, place), self.counts.index_select(0, place))
        else:
            tokens = self._cut(packed, unknown)
        return Rows(tokens.flat(), tokens.counts)

    def _cut(self, packed: Tensor, unknown: Tensor | None) -> Tokens:
        if unknown is None:
            tokens: Tokens = self.tokenizer(packed)
            return tokens
        tokens = self.tokenizer(packed.clamp(min=0))
        ids = tokens.ids.masked_fill(unknown.unsqueeze(1), -1)
        ids[:, 0].masked_fill_(unknown, self._unknown_row)
        return Tokens(ids, tokens.counts.masked_fill(unknown, 1))


Indexer = LevelIndexer | IdIndexer | PieceIndexer | PassThrough
"""Every indexer."""


def _runs(column: Column, spec: SidSpec) -> list[tuple[int, int]]:
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
