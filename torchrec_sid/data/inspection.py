"""What is in the files of a log folder: rows, columns, types, different values, missing ones."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.types as kinds

from torchrec_sid.artifact.place import RemotePath
from torchrec_sid.data.engines import ROW, Engine, Table, one_row, open_engine
from torchrec_sid.data.lake import ParquetTable, exists, folder_at
from torchrec_sid.errors import SidError

TABLES = ("events", "items", "users")
"""Tables that are looked into."""

SAMPLE_ROWS = 1 << 16
"""Rows that are looked at one by one, spread evenly over a table."""
_EXACT_ROWS = 1 << 22
"""Different values of longer tables are counted approximately (HyperLogLog, about 2%)."""


@dataclass(frozen=True)
class ColumnProfile:
    """A column, measured over all rows."""

    name: str
    type: pa.DataType
    """Dictionaries decoded."""
    values: int
    """Different values, missing ones not counted; of a list column those of its elements."""
    missing: int
    """Rows that are null, NaN, blank text or an empty list."""
    low: float | None
    """Least value of a column of numbers."""
    high: float | None
    """Greatest value of a column of numbers."""

    @property
    def is_list(self) -> bool:
        """Whether a row holds several values."""
        return is_list(self.type)

    @property
    def is_number(self) -> bool:
        """Whether a row is one number; truth values are none."""
        return is_number(self.type)


@dataclass(frozen=True)
class TableProfile:
    """One table of a folder."""

    name: str
    rows: int
    files: int
    columns: tuple[ColumnProfile, ...]
    sample: pa.Table
    """At most about :data:`SAMPLE_ROWS` rows, every n-th in the order of the files."""

    def column(self, name: str) -> ColumnProfile:
        """By name."""
        return next(c for c in self.columns if c.name == name)


def profile_folder(folder: str | Path | RemotePath) -> dict[str, TableProfile]:
    """Measure the tables of a log folder, each in one pass of DuckDB.

    Args:
        folder: local or a URI; it need not be a whole log.

    Raises:
        SidError: no such folder, or none of :data:`TABLES` in it.
    """
    place = folder_at(folder)
    found = [name for name in TABLES if exists(place, name)]
    if not found:
        raise SidError(
            str(folder),
            "no events.parquet and no items.parquet",
            "See docs/data.md for the files of a log.",
        )
    with _scratch_engine() as engine:
        return {name: _profile(engine, name, ParquetTable.find(place, name)) for name in found}


def is_list(kind: pa.DataType) -> bool:
    """Whether an Arrow type holds several values a row."""
    return bool(kinds.is_list(kind) or kinds.is_large_list(kind) or kinds.is_fixed_size_list(kind))


def is_number(kind: pa.DataType) -> bool:
    """Whether an Arrow type is a number; truth values are none."""
    return bool(kinds.is_integer(kind) or kinds.is_floating(kind) or kinds.is_decimal(kind))


@contextmanager
def _scratch_engine() -> Iterator[Engine]:
    with tempfile.TemporaryDirectory() as scratch:
        engine = open_engine("duckdb", Path(scratch), "1GB")
        try:
            yield engine
        finally:
            engine.close()


def _profile(engine: Engine, name: str, source: ParquetTable) -> TableProfile:
    raw = engine.read(name, source)
    plain = [c for c in source.schema if not is_list(c.type) and not kinds.is_nested(c.type)]
    rows = len(source)
    measured = _measure(engine, raw, plain, rows)
    columns = []
    for column in source.schema:
        if column in plain:
            columns.append(ColumnProfile(column.name, column.type, *measured[column.name]))
        else:
            columns.append(_nested(engine, raw, column, rows))
    step = max(1, -(-rows // SAMPLE_ROWS))
    few = raw.filter(raw[ROW] % step == 0).order_by(ROW).drop(ROW)
    sample = pa.Table.from_batches(engine.stream(few), few.schema().to_pyarrow())
    return TableProfile(name, rows, len(source.files), tuple(columns), sample)


def _measure(
    engine: Engine, raw: Table, columns: list[pa.Field], rows: int
) -> dict[str, tuple[int, int, float | None, float | None]]:
    """Of every plain column: different values, missing rows, least and greatest number."""
    if not columns:
        return {}
    wanted: dict[str, Any] = {}
    for number, column in enumerate(columns):
        known = _known(raw[column.name], column.type)
        wanted[f"n{number}"] = _different(known, rows)
        wanted[f"k{number}"] = known.count()
        if is_number(column.type):
            wanted[f"low{number}"] = known.min().cast("float64")
            wanted[f"high{number}"] = known.max().cast("float64")
    found = one_row(engine, raw.aggregate(**wanted))
    return {
        column.name: (
            int(found[f"n{number}"]),
            rows - int(found[f"k{number}"]),
            found.get(f"low{number}"),
            found.get(f"high{number}"),
        )
        for number, column in enumerate(columns)
    }


def _nested(engine: Engine, raw: Table, column: pa.Field, rows: int) -> ColumnProfile:
    """A list column; what else is nested has no values that a feature could read."""
    if not is_list(column.type) or kinds.is_nested(column.type.value_type):
        return ColumnProfile(column.name, column.type, 0, 0, None, None)
    filled = raw[column.name].length() > 0
    full = one_row(engine, raw.filter(filled).count().name("n").as_table())["n"]
    if kinds.is_floating(column.type.value_type):
        return ColumnProfile(column.name, column.type, 0, rows - full, None, None)  # a vector
    flat = raw.select(value=raw[column.name].unnest())
    values = one_row(engine, flat.aggregate(n=_different(flat.value, rows)))["n"]
    return ColumnProfile(column.name, column.type, values, rows - full, None, None)


def _known(column: Any, kind: pa.DataType) -> Any:
    """The column, null where a value is missing."""
    if kinds.is_floating(kind):
        return column.isnan().ifelse(None, column)
    if kinds.is_string(kind) or kinds.is_large_string(kind):
        return column.strip().nullif("")
    return column


def _different(column: Any, rows: int) -> Any:
    return column.nunique() if rows <= _EXACT_ROWS else column.approx_nunique()
