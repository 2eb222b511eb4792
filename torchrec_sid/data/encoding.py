"""Columns of features as numbers: rows of tables, standardised floats, vectors, item indices."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pyarrow.types as kinds

from torchrec_sid.artifact import save_array
from torchrec_sid.data.event_columns import is_text
from torchrec_sid.data.parquet import Array
from torchrec_sid.data.specification import (
    FIRST_ROW,
    MISSING_ROW,
    UNKNOWN_ROW,
    CategoricalFeature,
    EmbeddingFeature,
    Feature,
    ItemIdFeature,
    NumericFeature,
    feature_key,
)
from torchrec_sid.errors import SidError
from torchrec_sid.hashing import text_id


class Jagged(NamedTuple):
    """Several values a row."""

    values: Array
    """``[sum of lengths]`` int64."""
    lengths: Array
    """``[n]`` int64."""


@dataclass
class ValueRows:
    """A categorical table: which value is which row."""

    hash_rows: int | None
    values: pa.Array = field(default_factory=lambda: pa.array([], pa.large_string()))
    """Of the vocabulary, in the order of their rows, from ``FIRST_ROW`` on."""
    counts: dict[str, int] = field(default_factory=dict)
    """Of the training period, while the vocabulary is learned."""

    @property
    def rows(self) -> int:
        """Rows of the table, missing and unknown included."""
        return FIRST_ROW + (len(self.values) if self.hash_rows is None else self.hash_rows)

    def count(self, values: pa.Array) -> None:
        """Take values of the training period."""
        found = pc.value_counts(values.drop_null())
        names, counts = found.field("values").to_pylist(), found.field("counts").to_pylist()
        for name, count in zip(names, counts, strict=True):
            self.counts[name] = self.counts.get(name, 0) + count

    def learn(self, feature: CategoricalFeature) -> None:
        """Fix the vocabulary: as given, else the counted values, the most frequent first."""
        if feature.vocabulary is not None:
            names = list(feature.vocabulary)
        else:
            kept = (item for item in self.counts.items() if item[1] >= feature.min_count)
            names = [name for name, _ in sorted(kept, key=lambda item: (-item[1], item[0]))]
        self.values = pa.array(names, pa.large_string())

    def encode(self, values: pa.Array) -> Array:
        """Texts ``[n]``, null where missing -> rows ``[n]`` int64."""
        if self.hash_rows is not None:
            coded = values.dictionary_encode()
            rows = [FIRST_ROW + text_id(text) % self.hash_rows for text in coded.dictionary.to_pylist()]
            at = coded.indices.fill_null(-1).to_numpy(zero_copy_only=False)
            return np.array([*rows, MISSING_ROW], np.int64)[at]
        at = pc.index_in(values, value_set=self.values, skip_nulls=True)
        rows = pc.add(at.cast(pa.int64()), FIRST_ROW).fill_null(UNKNOWN_ROW)
        found: Array = rows.to_numpy(zero_copy_only=False).copy()
        found[values.is_null().to_numpy(zero_copy_only=False)] = MISSING_ROW
        return found


@dataclass
class NumberScale:
    """How a number becomes an input."""

    log: bool
    mean: float = 0.0
    deviation: float = 1.0
    edges: list[float] | None = None
    """Inner boundaries of the buckets."""

    def learn(self, values: Array, feature: NumericFeature) -> None:
        """Measure the training period's values ``[n]`` float64, NaN where missing."""
        values = self._logged(values[np.isfinite(values)])
        if feature.buckets is not None:
            inner = np.linspace(0, 1, feature.buckets + 1)[1:-1]
            self.edges = sorted({float(v) for v in np.quantile(values, inner)}) if len(values) else []
        elif feature.standardise and len(values):
            self.mean = float(values.mean())
            self.deviation = float(values.std()) or 1.0

    def encode(self, values: Array) -> Array:
        """``[n]`` float64, NaN where missing -> ``[n]`` float32, or int64 rows of buckets."""
        known = np.isfinite(values)
        scaled = self._logged(np.where(known, values, 0))
        if self.edges is not None:
            rows = FIRST_ROW + np.searchsorted(np.array(self.edges), scaled, side="right")
            return np.where(known, rows, MISSING_ROW).astype(np.int64)
        return np.where(known, (scaled - self.mean) / self.deviation, 0).astype(np.float32)

    def _logged(self, values: Array) -> Array:
        return np.sign(values) * np.log1p(np.abs(values)) if self.log else values


@dataclass
class FeatureEncoding:
    """All features of a specification; learned once, then applied batch by batch."""

    features: tuple[Feature, ...]
    index: Callable[[pa.Array], Array]
    """Own ids of items -> dense indices, -1 where unknown."""
    tables: dict[str, ValueRows] = field(default_factory=dict)
    scales: dict[str, NumberScale] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    """Item ids that are in no items.parquet, by feature."""

    def __post_init__(self) -> None:
        for feature in self.features:
            if isinstance(feature, CategoricalFeature):
                self.tables.setdefault(table_of(feature), ValueRows(feature.hash_rows))
            elif isinstance(feature, NumericFeature):
                self.scales[feature_key(feature)] = NumberScale(feature.log)

    def count(self, feature: CategoricalFeature, column: pa.Array) -> None:
        """Count a categorical column of the training period, if its vocabulary is to be learned."""
        if feature.vocabulary is None and feature.hash_rows is None:
            self.tables[table_of(feature)].count(_values(feature, column)[0])

    def measure(self, feature: NumericFeature, column: pa.Array) -> None:
        """Measure a numeric column of the training period."""
        self.scales[feature_key(feature)].learn(_numbers(feature, column), feature)

    def learn(self) -> None:
        """Fix the vocabularies, when everything has been counted."""
        for feature in self.features:
            if isinstance(feature, CategoricalFeature) and feature.hash_rows is None:
                self.tables[table_of(feature)].learn(feature)

    def rows(self, feature: Feature) -> int | None:
        """Rows of a feature's table; None for one that has none."""
        if isinstance(feature, CategoricalFeature):
            return self.tables[table_of(feature)].rows
        if isinstance(feature, NumericFeature) and feature.buckets is not None:
            return FIRST_ROW + len(self.scales[feature_key(feature)].edges or []) + 1
        return None

    def encode(self, feature: Feature, column: pa.Array) -> Array | Jagged:
        """A column ``[n]`` as ``[n]`` int64 rows or float32, ``[n, d]`` float32, or several values a row.

        Raises:
            SidError: values that are no numbers, vectors of unequal length.
        """
        if isinstance(feature, CategoricalFeature):
            values, lengths = _values(feature, column)
            rows = self.tables[table_of(feature)].encode(values)
            return rows if lengths is None else Jagged(rows, lengths)
        if isinstance(feature, NumericFeature):
            return self.scales[feature_key(feature)].encode(_numbers(feature, column))
        if isinstance(feature, ItemIdFeature):
            return self._items(feature, column)
        return _vectors(feature, column)

    def _items(self, feature: ItemIdFeature, column: pa.Array) -> Array | Jagged:
        flat, lengths = _flattened(column) if feature.multi else (column, None)
        found = np.where(flat.is_null().to_numpy(zero_copy_only=False), -1, self.index(flat))
        if lengths is None:
            return found
        known = found >= 0
        key = feature_key(feature)
        self.left_out[key] = self.left_out.get(key, 0) + int((~known).sum())
        owner = np.repeat(np.arange(len(lengths)), lengths)[known]
        return Jagged(found[known], np.bincount(owner, minlength=len(lengths)).astype(np.int64))

    def write(self, folder: Path) -> dict[str, Any]:
        """Write the vocabularies; returns what the manifest says of every table and scale."""
        folder.mkdir()
        said: dict[str, Any] = {"tables": {}, "scales": {}}
        for name, table in self.tables.items():
            said["tables"][name] = {"rows": table.rows, "hash_rows": table.hash_rows}
            if table.hash_rows is None:
                rows = np.arange(FIRST_ROW, FIRST_ROW + len(table.values))
                pq.write_table(pa.table({"value": table.values, "row": rows}), folder / f"{name}.parquet")
        for name, scale in self.scales.items():
            said["scales"][name] = {
                "log": scale.log,
                "mean": scale.mean,
                "deviation": scale.deviation,
                "edges": scale.edges,
            }
        return said


def table_of(feature: CategoricalFeature | NumericFeature) -> str:
    """Name of a feature's table: one that is shared, else its own."""
    return feature.table or feature_key(feature)


def save_feature(folder: Path, key: str, found: Array | Jagged) -> None:
    """Write a feature of all items or users as ``KEY.npy``, or ``KEY.values.npy`` and
    ``KEY.offsets.npy``."""
    if isinstance(found, Jagged):
        save_array(folder / f"{key}.values.npy", found.values)
        save_array(folder / f"{key}.offsets.npy", np.append(0, np.cumsum(found.lengths)))
    else:
        save_array(folder / f"{key}.npy", found)


def example_column(found: Array | Jagged) -> pa.Array:
    """A feature of examples as a column: numbers, or lists of them."""
    if isinstance(found, Jagged):
        offsets = np.append(0, np.cumsum(found.lengths)).astype(np.int32)
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(found.values))
    if found.ndim == 2:
        flat = pa.array(np.ascontiguousarray(found).ravel())
        return pa.FixedSizeListArray.from_arrays(flat, found.shape[1])
    return pa.array(found)


def _text(column: pa.Array) -> pa.Array:
    """Any plain column as text; blanks trimmed; empty and NaN are missing."""
    if kinds.is_dictionary(column.type):
        column = column.dictionary_decode()
    if kinds.is_floating(column.type):
        column = pc.if_else(pc.is_nan(column), pa.scalar(None, column.type), column)
    text = pc.utf8_trim_whitespace(column.cast(pa.large_string()))
    return pc.if_else(pc.equal(text, ""), pa.scalar(None, pa.large_string()), text)


def _values(feature: CategoricalFeature, column: pa.Array) -> tuple[pa.Array, Array | None]:
    """Texts of a categorical column, and how many each row has; None: one."""
    if not feature.multi:
        if _is_list(column.type):
            raise SidError(
                f"features.{feature.source}.{feature.name}", "its column is a list", "Set multi: true."
            )
        text = _text(column)
        return (text if feature.extract is None else _extracted(feature.extract, text)), None
    if _is_list(column.type):
        flat, lengths = _flattened(column)
    else:
        text = _text(column)
        lists = pc.split_pattern(text.fill_null(""), feature.separator or ",")
        flat, lengths = _flattened(lists)
    flat = _text(flat)
    # A missing value within a list is no value.
    known = ~flat.is_null().to_numpy(zero_copy_only=False)
    owner = np.repeat(np.arange(len(lengths)), lengths)[known]
    return flat.drop_null(), np.bincount(owner, minlength=len(lengths)).astype(np.int64)


def _numbers(feature: NumericFeature, column: pa.Array) -> Array:
    """A numeric column as float64, NaN where missing."""
    at = f"features.{feature.source}.{feature.name}"
    if kinds.is_dictionary(column.type):
        column = column.dictionary_decode()
    if feature.extract is not None:
        column = _extracted(feature.extract, _text(column))
    if is_text(column.type):
        column = _text(column)
    elif kinds.is_timestamp(column.type) or kinds.is_date(column.type):
        column = column.cast(pa.timestamp("s")).cast(pa.int64())
    try:
        number = column.cast(pa.float64(), safe=False)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise SidError(at, f"holds values that are no numbers ({error})", "Make it categorical.") from error
    found: Array = number.to_numpy(zero_copy_only=False).astype(np.float64)
    return found


def _vectors(feature: EmbeddingFeature, column: pa.Array) -> Array:
    at = f"features.{feature.source}.{feature.name}"
    flat, lengths = _flattened(column)
    width = int(lengths.max(initial=0))
    bad = np.flatnonzero((lengths != width) & (lengths != 0))
    if len(bad) or flat.null_count:
        row = int(bad[0]) if len(bad) else 0
        raise SidError(
            at, f"row {row} holds {lengths[row]} numbers of {width}", "Write vectors of one length."
        )
    out = np.zeros((len(lengths), width), np.float32)
    out[lengths > 0] = flat.to_numpy(zero_copy_only=False).reshape(-1, width) if width else 0
    return out


def _extracted(pattern: str, text: pa.Array) -> pa.Array:
    """The first group of the first match, missing where none matches."""
    coded, search = text.dictionary_encode(), re.compile(pattern).search
    found = [match.group(1) if (match := search(value)) else None for value in coded.dictionary.to_pylist()]
    return _text(pa.array(found, pa.large_string()).take(coded.indices))


def _flattened(column: pa.Array) -> tuple[pa.Array, Array]:
    lengths: Array = (
        pc.list_value_length(column).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    )
    return column.flatten(), lengths


def _is_list(kind: pa.DataType) -> bool:
    return bool(kinds.is_list(kind) or kinds.is_large_list(kind) or kinds.is_fixed_size_list(kind))


def concatenated(parts: Iterable[Array | Jagged]) -> Array | Jagged:
    """Batches of one feature, one after the other."""
    whole = list(parts)
    if whole and isinstance(whole[0], Jagged):
        both = [p for p in whole if isinstance(p, Jagged)]
        return Jagged(*(np.concatenate([p[i] for p in both]) for i in (0, 1)))
    return np.concatenate([p for p in whole if not isinstance(p, Jagged)])
