"""A log folder: items, their embeddings, events and histories, in the documented format (docs/data.md)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from torchrec_sid.data.embeddings import ContentSource, EmbeddingFile, find_embeddings, refuse_duplicates
from torchrec_sid.data.parquet import Array, integers, open_parquet, scan
from torchrec_sid.errors import SidError
from torchrec_sid.streams import EmbeddingStream

ITEMS = "items.parquet"
EVENTS = "events.parquet"
HISTORIES = "histories.parquet"
SETTINGS = "dataset.json"

MissingEmbedding = Literal["error", "drop"]


class ItemIndex:
    """Maps item ids, any int64, to their dense index 0..N-1.

    Args:
        item_ids: ``[N]`` int64, unique, in the order of the index.
    """

    def __init__(self, item_ids: Array) -> None:
        self.item_ids = item_ids
        steps = np.diff(item_ids)
        # Ids that count up by one need no search.
        self._first = int(item_ids[0]) if bool((steps == 1).all()) else None
        self._order = None if self._first is not None else np.argsort(item_ids, kind="stable")
        self._sorted = item_ids if self._order is None else item_ids[self._order]

    def __call__(self, ids: Array) -> Array:
        """Ids ``[n]`` int64 -> indices ``[n]`` int64, -1 for an unknown id."""
        if self._order is None:
            position = ids - self._first
            return np.where((position >= 0) & (position < len(self.item_ids)), position, -1)
        position = np.minimum(np.searchsorted(self._sorted, ids), len(self._sorted) - 1)
        return np.where(self._sorted[position] == ids, self._order[position], -1)


class Category(NamedTuple):
    """One category column of the items, for a quantizer that fuses it in."""

    names: tuple[str, ...]
    """The C values, sorted."""
    probabilities: Array
    """``[N, C]`` float32: rows sum to 1; several values share it equally; all 0 where there is none."""


@dataclass(frozen=True)
class LogFolder:
    """What :meth:`open` returns: a folder whose parts fit together."""

    path: Path
    item_ids: Array
    """``[N]`` int64, in the order of items.parquet: items with an embedding in the default source."""
    item_rows: Array
    """``[N]`` int64: their rows in items.parquet."""
    bare_ids: Array
    """Sorted int64 ids of the items without an embedding in the default source."""
    drop_bare: bool
    """Whether events on those items are left out; if not, the first one is an error."""
    embedding_sources: dict[str, ContentSource]
    default_source: str
    """Source that is used where none is named."""

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        source: str | None = None,
        missing_embedding: MissingEmbedding | None = None,
        events: bool = True,
        whole: bool = False,
    ) -> LogFolder:
        """Open a folder and check that its files fit together (cheap; see :meth:`validate` for the rest).

        Args:
            path: the folder.
            source: default source. Without it: ``default_source`` in dataset.json, else the source whose
                text column (``text`` for content, ``text_<source>``) holds most text, else the first.
            missing_embedding: ``"drop"`` leaves out events on items without an embedding in the default
                source, ``"error"`` refuses them. Without it: ``missing_embedding`` in dataset.json, else
                ``"drop"`` where an ``item_emb_rows.parquet`` declares which items have one, else
                ``"error"``.
            events: whether there must be an events.parquet; quantizers need none.
            whole: keep items without an embedding in the default source too.

        Raises:
            SidError: a missing column, a wrong type, a duplicate item id, a row count mismatch.
            ArtifactError: a missing or truncated file.
        """
        path = Path(path)
        if not path.is_dir():
            raise SidError(str(path), "no such folder", "Pass a folder as docs/data.md describes it.")
        settings = _read_settings(path)
        ids = _read_item_ids(path)
        if events:
            open_parquet(path / EVENTS)
        files = find_embeddings(path)
        name = source or settings.get("default_source") or _richest(path, files)
        if name not in {f.name for f in files}:
            raise SidError(
                str(path), f"no embedding source {name!r}", f"Choose from {[f.name for f in files]}."
            )
        index = ItemIndex(ids)
        orders = {f.name: _order_of(f, ids, index) for f in files}
        has = (orders[name] >= 0) | whole
        rows = np.flatnonzero(has)
        sources = {f.name: _source(f, orders[f.name][rows]) for f in files}
        declared = next(f.declared for f in files if f.name == name)
        policy = missing_embedding or settings.get("missing_embedding") or ("drop" if declared else "error")
        if policy not in ("error", "drop"):
            raise SidError("missing_embedding", f"{policy!r}", "Choose 'error' or 'drop'.")
        return cls(path, ids[rows], rows, np.sort(ids[~has]), policy == "drop", sources, name)

    def __len__(self) -> int:
        return len(self.item_ids)

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the embedding sources, ``content`` first."""
        return tuple(self.embedding_sources)

    @cached_property
    def index(self) -> ItemIndex:
        """Item id -> dense index."""
        return ItemIndex(self.item_ids)

    def source(self, name: str | None = None) -> ContentSource:
        """One embedding source; the default one without a name."""
        name = name or self.default_source
        if name not in self.embedding_sources:
            raise SidError(str(self.path), f"no embedding source {name!r}", f"Choose from {self.sources}.")
        return self.embedding_sources[name]

    def embeddings(self, source: str | None = None) -> EmbeddingStream:
        """The embeddings of a source as a stream, in the order of :attr:`item_ids`."""
        return self.source(source).stream()

    def embedding_matrix(self, source: str | None = None) -> Array:
        """``[N, d]`` embeddings, memory-mapped where the file is ``.npy`` in item order."""
        return self.source(source).matrix

    def item_column(self, name: str) -> pa.Array | None:
        """One column of items.parquet for the N items, or None if there is no such column."""
        file = open_parquet(self.path / ITEMS)
        if name not in file.schema_arrow.names:
            return None
        column = file.read(columns=[name]).column(0).combine_chunks()
        return column if len(column) == len(self) else column.take(pa.array(self.item_rows))

    def texts(self, rows: Sequence[int] | Array | None = None) -> list[str]:
        """What to call items in a report: ``title``, else ``text``, else the item id.

        Args:
            rows: dense item indices; None for all N.
        """
        column = next((c for c in map(self.item_column, ("title", "text")) if c is not None), None)
        if column is None:
            column = pa.array(self.item_ids.astype(str))
        chosen = column if rows is None else column.take(pa.array(np.asarray(rows, np.int64)))
        return [str(value or "") for value in chosen.to_pylist()]

    def category(self, name: str, separator: str | None = None) -> Category:
        """A category column as class distributions.

        Args:
            name: a text or integer column of items.parquet.
            separator: what stands between several values of one item, e.g. ``", "``.

        Raises:
            SidError: no such column, or one of another type.
        """
        column = self.item_column(name)
        if column is None:
            raise SidError(str(self.path / ITEMS), f"no column {name!r}", "Name a category column.")
        try:
            values = column.cast(pa.large_string()).fill_null("")
        except pa.ArrowNotImplementedError as error:
            raise SidError(
                str(self.path / ITEMS), f"column {name!r} has type {column.type}", "Use text or integers."
            ) from error
        lists = pc.split_pattern(values, separator) if separator else None
        flat = values if lists is None else lists.flatten()
        items = np.arange(len(self)) if lists is None else pc.list_parent_indices(lists).to_numpy()
        encoded = flat.dictionary_encode()
        names = np.array(encoded.dictionary.to_pylist(), dtype=object)
        order = np.argsort(names)
        order = order[names[order] != ""]
        rank = np.full(len(names), -1)
        rank[order] = np.arange(len(order))
        codes = rank[encoded.indices.to_numpy()]
        out = np.zeros((len(self), len(order)), np.float32)
        np.add.at(out, (items[codes >= 0], codes[codes >= 0]), 1.0)
        out /= np.maximum(out.sum(1, keepdims=True), 1.0)
        return Category(tuple(names[order].tolist()), out)

    def cold_holdout(self) -> Array | None:
        """``[N]`` int8 hold-out group (0 none, 1 released with valid, 2 with test), or None without one.

        Raises:
            SidError: a value outside 0..2.
        """
        column = self.item_column("cold_holdout")
        if column is None:
            return None
        groups = column.to_numpy(zero_copy_only=False)
        if groups.dtype.kind not in "iu" or not bool(np.isin(groups, (0, 1, 2)).all()):
            raise SidError(
                str(self.path / ITEMS), "cold_holdout holds other values than 0, 1, 2", "See docs/data.md."
            )
        return groups.astype(np.int8)

    def validate(self) -> None:
        """Read every embedding once and check it: no NaN, no infinity.

        Raises:
            SidError: naming the file and its first bad row.
        """
        for source in self.embedding_sources.values():
            for _ in source.stream():
                pass


def _read_settings(path: Path) -> dict[str, Any]:
    file = path / SETTINGS
    if not file.is_file():
        return {}
    try:
        settings = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise SidError(str(file), f"not JSON ({error})", "Mend or remove it.") from error
    known = {"default_source", "missing_embedding"}
    if not isinstance(settings, dict) or set(settings) - known:
        raise SidError(str(file), f"holds {settings!r}", f"Give an object with any of {sorted(known)}.")
    return settings


def _read_item_ids(path: Path) -> Array:
    file = path / ITEMS
    parquet = open_parquet(file, {"item_id": "integer"})
    begin, parts = 0, [np.empty(0, np.int64)]
    for batch in scan(parquet, file, ["item_id"]):
        parts.append(integers(batch, "item_id", file, begin))
        begin += len(batch)
    ids = np.concatenate(parts)
    if not len(ids):
        raise SidError(str(file), "no items", "Write one row per item.")
    refuse_duplicates(ids, file)
    return ids


def _richest(path: Path, files: tuple[EmbeddingFile, ...]) -> str:
    """The source with most text behind it, by the uncompressed bytes that the Parquet footer states."""
    metadata = open_parquet(path / ITEMS).metadata
    sizes: dict[str, int] = {}
    for group in range(metadata.num_row_groups):
        for column in range(metadata.num_columns):
            chunk = metadata.row_group(group).column(column)
            name = chunk.path_in_schema
            sizes[name] = sizes.get(name, 0) + chunk.total_uncompressed_size
    column_of = {f.name: "text" if f.name == "content" else f"text_{f.name}" for f in files}
    return max(files, key=lambda f: sizes.get(column_of[f.name], 0)).name


def _order_of(file: EmbeddingFile, ids: Array, index: ItemIndex) -> Array:
    """``[len(ids)]`` int64: row of the file for each row of items.parquet, -1 without one."""
    if file.keys is None:
        if file.rows != len(ids):
            raise SidError(
                str(file.path),
                f"{file.rows} rows for {len(ids)} items",
                f"Write one row per row of {ITEMS}, or name the items in {file.path.stem}_rows.parquet.",
            )
        return np.arange(len(ids))
    at = index(file.keys)
    if bool((at < 0).any()):
        unknown = int(file.keys[at < 0][0])
        raise SidError(
            str(file.path), f"item_id {unknown} is not in {ITEMS}", "Add it there or drop it here."
        )
    order = np.full(len(ids), -1, np.int64)
    order[at] = np.arange(file.rows)
    return order


def _source(file: EmbeddingFile, order: Array) -> ContentSource:
    in_order = len(order) == file.rows and bool((order == np.arange(file.rows)).all())
    return ContentSource(file, None if in_order else order, len(order))
