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

from torchrec_sid.artifact.place import Place, RemotePath
from torchrec_sid.data.embeddings import ContentSource, EmbeddingFile, find_embeddings
from torchrec_sid.data.event_columns import named_column
from torchrec_sid.data.lake import ParquetTable, exists, folder_at, keys_of, numbers_of, read_bytes
from torchrec_sid.data.parquet import Array, open_parquet
from torchrec_sid.data.specification import KeyColumns, Specification
from torchrec_sid.errors import SidError
from torchrec_sid.hashing import text_id
from torchrec_sid.streams import EmbeddingStream

ITEMS = "items.parquet"
EVENTS = "events.parquet"
HISTORIES = "histories.parquet"
SETTINGS = "dataset.json"
SPECIFICATION = "specification.yaml"

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
    offsets: Array
    """``[N + 1]`` int64: item i has the values ``offsets[i]`` to ``offsets[i + 1]``, or none."""
    classes: Array
    """``[values]`` int64: positions in ``names``, ascending within an item."""
    shares: Array
    """``[values]`` float32: those of an item sum to 1; several values share it equally."""


@dataclass(frozen=True)
class LogFolder:
    """What :meth:`open` returns: a folder whose parts fit together."""

    path: Place
    item_table: ParquetTable
    """items.parquet."""
    item_ids: Array
    """``[N]`` int64, in the order of items.parquet: items with an embedding in the default source (all,
    where the folder has no embeddings). Text ids stand here as :func:`~torchrec_sid.hashing.text_id`."""
    item_keys: pa.Array
    """``[N]`` the same as people write them: int64 or text."""
    item_rows: Array
    """``[N]`` int64: their rows in items.parquet."""
    bare_keys: pa.Array
    """Own ids of the items without an embedding in the default source."""
    drop_bare: bool
    """Whether events on those items are left out; if not, the first one is an error."""
    embedding_sources: dict[str, ContentSource]
    default_source: str | None
    """Source that is used where none is named; None: the folder has no embeddings."""

    @classmethod
    def open(
        cls,
        path: str | Path | RemotePath,
        *,
        source: str | None = None,
        missing_embedding: MissingEmbedding | None = None,
        events: bool = True,
        whole: bool = False,
        item_id: str | None = None,
        embeddings: str | Path | None = None,
    ) -> LogFolder:
        """Open a folder and check that its files fit together (cheap; see :meth:`validate` for the rest).

        Args:
            path: the folder, local or a URI.
            source: default source. Without it: ``default_source`` in dataset.json, else the source whose
                text column (``text`` for content, ``text_<source>``) holds most text, else the first.
            missing_embedding: ``"drop"`` leaves out events on items without an embedding in the default
                source, ``"error"`` refuses them. Without it: ``missing_embedding`` in dataset.json, else
                ``"drop"`` where an ``item_emb_rows.parquet`` declares which items have one, else
                ``"error"``.
            events: whether there must be an events.parquet; quantizers need none.
            whole: keep items without an embedding in the default source too.
            item_id: key of items.parquet; None: ``item_id`` or another name that people use.
            embeddings: folder of the ``item_emb`` files, where they do not lie in ``path``.

        Raises:
            SidError: a missing column, a wrong type, a duplicate item id, a row count mismatch.
            ArtifactError: a missing or truncated file.
        """
        path = folder_at(path)
        settings = _read_settings(path)
        table = ParquetTable.find(path, "items")
        key = named_column(table, "item_id", item_id or KeyColumns().item_id)
        keys = keys_of(table.column(key), table.where, key, "Keep one row per item.")
        if not len(keys):
            raise SidError(table.where, "no items", "Write one row per item.")
        ids = numbers_of(keys, table.where)
        if events:
            ParquetTable.find(path, "events")
        files = find_embeddings(path if embeddings is None else folder_at(embeddings), key)
        name = source or settings.get("default_source") or _richest(path, table, files)
        if name is not None and name not in {f.name for f in files}:
            raise SidError(
                str(path), f"no embedding source {name!r}", f"Choose from {[f.name for f in files]}."
            )
        index = ItemIndex(ids)
        orders = {f.name: _order_of(f, ids, index) for f in files}
        has = np.ones(len(ids), bool) if name is None else (orders[name] >= 0) | whole
        rows = np.flatnonzero(has)
        sources = {f.name: _source(f, orders[f.name][rows]) for f in files}
        declared = next((f.declared for f in files if f.name == name), False)
        policy = missing_embedding or settings.get("missing_embedding") or ("drop" if declared else "error")
        if policy not in ("error", "drop"):
            raise SidError("missing_embedding", f"{policy!r}", "Choose 'error' or 'drop'.")
        bare = keys.filter(pa.array(~has))
        chosen = keys.take(pa.array(rows))
        return cls(path, table, ids[rows], chosen, rows, bare, policy == "drop", sources, name)

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

    @property
    def text_ids(self) -> bool:
        """Whether items have text for ids."""
        return not pa.types.is_integer(self.item_keys.type)

    def index_of(self, ids: pa.Array) -> Array:
        """Own ids ``[n]``, of any type of id -> dense indices ``[n]`` int64, -1 for an unknown one."""
        if not self.text_ids:
            try:
                return self.index(ids.cast(pa.int64()).fill_null(-1).to_numpy(zero_copy_only=False))
            except pa.ArrowInvalid:
                return np.full(len(ids), -1, np.int64)
        coded = ids.cast(pa.large_string()).dictionary_encode()
        numbers = np.array([*map(text_id, coded.dictionary.to_pylist()), -1], np.int64)
        return self.index(numbers)[coded.indices.fill_null(-1).to_numpy(zero_copy_only=False)]

    def is_bare(self, ids: pa.Array) -> Array:
        """``[n]`` bool: whether these own ids are of items without an embedding."""
        return pc.is_in(ids.cast(self.bare_keys.type), value_set=self.bare_keys).to_numpy(
            zero_copy_only=False
        )

    def table(self, name: str) -> ParquetTable | None:
        """Another table of the folder (``events``, ``histories``, ``users``), None where it has none."""
        return ParquetTable.find(self.path, name) if exists(self.path, name) else None

    def source(self, name: str | None = None) -> ContentSource:
        """One embedding source; the default one without a name.

        Raises:
            SidError: there is none.
        """
        name = name or self.default_source
        if name is None:
            raise SidError(str(self.path), "no embeddings", "Add item_emb.npy [N, d]; see docs/data.md.")
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
        if name not in self.item_table.names:
            return None
        column = self.item_table.column(name)
        return column if len(column) == len(self) else column.take(pa.array(self.item_rows))

    def texts(self, rows: Sequence[int] | Array | None = None) -> list[str]:
        """What to call items in a report: ``title``, else ``text``, else the item id.

        Args:
            rows: dense item indices; None for all N.
        """
        column = next((c for c in map(self.item_column, ("title", "text")) if c is not None), None)
        if column is None:
            column = self.item_keys.cast(pa.large_string())
        chosen = column if rows is None else column.take(pa.array(np.asarray(rows, np.int64)))
        return [str(value or "") for value in chosen.to_pylist()]

    def category(self, name: str, separator: str | None = None) -> Category:
        """A category column as class distributions, without their zeros.

        Args:
            name: a column of items.parquet: text, integers, truth values, or lists of them.
            separator: what stands between several values of one item, e.g. ``", "``.

        Raises:
            SidError: no such column, or one of another type.
        """
        column = self.item_column(name)
        if column is None:
            raise SidError(self.item_table.where, f"no column {name!r}", "Name a category column.")
        flat, items = _category_values(column, separator, f"{self.item_table.where}, column {name!r}")
        encoded = flat.dictionary_encode()
        names = np.array(encoded.dictionary.to_pylist(), dtype=object)
        order = np.argsort(names)
        order = order[names[order] != ""]
        rank = np.full(len(names), -1)
        rank[order] = np.arange(len(order))
        codes = rank[encoded.indices.to_numpy()]
        known = codes >= 0
        pairs, counts = np.unique(items[known] * len(order) + codes[known], return_counts=True)
        owner, classes = np.divmod(pairs, max(len(order), 1))
        offsets = np.append(0, np.cumsum(np.bincount(owner, minlength=len(self))))
        totals = np.bincount(owner, counts, minlength=len(self))
        shares = (counts / totals[owner]).astype(np.float32)
        return Category(tuple(names[order].tolist()), offsets, classes, shares)

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
                self.item_table.where, "cold_holdout holds other values than 0, 1, 2", "See docs/data.md."
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


def find_specification(data: str | Path, named: str | None) -> Specification | None:
    """What describes a log: a file that is named, else specification.yaml in its folder.

    Args:
        data: folder of the log.
        named: a file, a name of :func:`ready_specifications`, or ``none`` for a log without features.

    Raises:
        SidError: no such folder or file, or one that is no specification.
    """
    if named == "none":
        return None
    if named is not None:
        ready = ready_specifications()
        return Specification.read(ready[named] if named in ready and not Path(named).exists() else named)
    file = folder_at(data) / SPECIFICATION
    return Specification.read(file) if file.is_file() else None


def ready_specifications() -> dict[str, Path]:
    """Specifications of public logs that come with the package, by name."""
    return {file.stem: file for file in sorted((Path(__file__).parent / "specifications").glob("*.yaml"))}


def _read_settings(path: Place) -> dict[str, Any]:
    file = path / SETTINGS
    if not file.is_file():
        return {}
    try:
        settings = json.loads(read_bytes(file))
    except json.JSONDecodeError as error:
        raise SidError(str(file), f"not JSON ({error})", "Mend or remove it.") from error
    known = {"default_source", "missing_embedding"}
    if not isinstance(settings, dict) or set(settings) - known:
        raise SidError(str(file), f"holds {settings!r}", f"Give an object with any of {sorted(known)}.")
    return settings


def _category_values(column: pa.Array, separator: str | None, where: str) -> tuple[pa.Array, Array]:
    """Texts of a category column and the item of each: trimmed, without missing ones."""
    items = np.arange(len(column))
    kind = column.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        items, column = pc.list_parent_indices(column).to_numpy(), column.flatten()
    try:
        if pa.types.is_floating(column.type):
            column = pc.if_else(pc.is_nan(column), pa.scalar(None, column.type), column)
        values = column.cast(pa.large_string()).fill_null("")
    except pa.ArrowNotImplementedError as error:
        raise SidError(where, f"has type {kind}", "Use text, integers, or lists of them.") from error
    if separator:
        lists = pc.split_pattern(values, separator)
        items, values = items[pc.list_parent_indices(lists).to_numpy()], lists.flatten()
    return pc.utf8_trim_whitespace(values), items


def _richest(path: Place, table: ParquetTable, files: tuple[EmbeddingFile, ...]) -> str | None:
    """The source with most text behind it, by the uncompressed bytes that the Parquet footers state."""
    if not files:
        return None
    sizes: dict[str, int] = {}
    for metadata in (open_parquet(file).metadata for file in table.files):
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
                f"Write one row per row of {ITEMS}, or name the items in "
                f"{file.path.name.rpartition('.')[0]}_rows.parquet.",
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
