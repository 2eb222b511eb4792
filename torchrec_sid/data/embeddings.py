"""One content source of a log folder: embeddings of the items, aligned with them or keyed by item id."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from torchrec_sid.artifact.place import Place, RemotePath
from torchrec_sid.data.lake import keys_of, numbers_of
from torchrec_sid.data.parquet import Array, open_parquet, scan
from torchrec_sid.errors import ArtifactError, SidError
from torchrec_sid.streams import EmbeddingStream, check_batch, open_stream

_PREFIX = "item_emb"
_ROWS = "_rows"
_BATCH = 16_384
_SHARD = re.compile(r"[-_.](?:part|shard)?[-_]?\d+(?:[-_]of[-_]\d+)?$")


@dataclass(frozen=True)
class EmbeddingFile:
    """A source's embeddings, in one file or in shards, and the row in which each item's embedding
    stands."""

    name: str
    """The source's name: ``content`` for ``item_emb.*``, else the suffix of the file."""
    paths: tuple[Place, ...]
    """``.npy`` or ``.parquet``; the rows of shards follow each other in the order of their names."""
    dim: int
    """d."""
    rows: int
    """Rows in all."""
    keys: Array | None
    """``[rows]`` int64: the item of each row, as in ``LogFolder.item_ids``, or None where row i belongs
    to row i of items.parquet."""
    declared: bool
    """Whether a ``*_rows.parquet`` file says which items have content, so that others may lack it."""

    @property
    def path(self) -> Place:
        """The first file, for errors."""
        return self.paths[0]


@dataclass(frozen=True)
class ContentSource:
    """The embeddings of one source in item order: N rows, whatever the order of the file."""

    file: EmbeddingFile
    order: Array | None
    """``[N]`` int64: row of the file for each item, -1 without one; None: file in item order."""
    items: int
    """N."""

    @property
    def present(self) -> Array:
        """``[N]`` bool: whether the item has an embedding in this source."""
        return np.ones(self.items, bool) if self.order is None else self.order >= 0

    @cached_property
    def matrix(self) -> Array:
        """``[N, d]`` in the dtype of the file; memory-mapped where the file is ``.npy`` in item order.

        Items without an embedding are rows of zeros.
        """
        values = self._whole_file
        if self.order is None:
            return values
        out = np.zeros((self.items, self.file.dim), values.dtype)
        present = self.present
        out[present] = values[self.order[present]]
        return out

    def stream(self) -> EmbeddingStream:
        """The embeddings that exist, in item order, as checked float32 batches."""
        name, path = str(self.file.path), self.file.path
        if self.order is None and len(self.file.paths) == 1 and isinstance(path, Path):
            return open_stream(path, batch_size=_BATCH)
        rows = np.arange(self.file.rows) if self.order is None else self.order[self.order >= 0]

        def start() -> Iterator[Tensor]:
            values = self._whole_file
            for begin in range(0, len(rows), _BATCH):
                batch = torch.from_numpy(np.array(values[rows[begin : begin + _BATCH]]))
                yield check_batch(batch, self.file.dim, name, begin)

        return EmbeddingStream(start, self.file.dim, len(rows), name)

    @cached_property
    def _whole_file(self) -> Array:
        parts = []
        for path in self.file.paths:
            if path.name.endswith(".npy"):
                parts.append(_open_npy(path))
            else:
                parts += [_vectors(batch, self.file.dim, path, begin) for begin, batch in _records(path)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def find_embeddings(folder: Place, key: str = "item_id") -> tuple[EmbeddingFile, ...]:
    """Every embedding source of a folder, ``content`` first, then by name; none where it has no file.

    Args:
        folder: of the log.
        key: column that names the item of a row, in Parquet files.

    Raises:
        SidError: one source as ``.npy`` and as Parquet, a wrong rank or dtype, a duplicate item id.
        ArtifactError: a truncated file.
    """
    found: dict[str, list[Place]] = {}
    for path in _in_order(folder):
        stem, _, suffix = path.name.rpartition(".")
        if not stem.startswith(_PREFIX) or suffix not in ("npy", "parquet") or stem.endswith(_ROWS):
            continue
        files = [path] if path.is_file() else _in_order(path)
        rest = stem.removeprefix(_PREFIX)
        name = _SHARD.sub("", rest).removeprefix("_") or "content"
        found.setdefault(name, []).extend(f for f in files if not f.name.startswith((".", "_")))
    sources = []
    for name, paths in found.items():
        kinds = {path.name.rpartition(".")[2]: path for path in paths}
        if len(kinds) > 1 or (len(paths) > 1 and any(not _SHARD.search(_stem(p)) for p in paths)):
            a, b = paths[0], next(p for p in paths[1:])
            raise SidError(str(b), f"source {name!r} also stands in {a.name}", "Keep one of the two.")
        opened = _open_npy_files if "npy" in kinds else _open_keyed
        sources.append(opened(tuple(paths), name, key))
    return tuple(sorted(sources, key=lambda f: (f.name != "content", f.name)))


def _in_order(folder: Place) -> list[Place]:
    found: list[Place] = list(folder.iterdir())
    return sorted(found, key=lambda path: _natural(path.name))


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Names in the order of the numbers within: shard 10 follows shard 9."""
    return [(1, int(p), "") if p.isdigit() else (0, 0, p) for p in re.split(r"(\d+)", name)]


def _stem(path: Place) -> str:
    return path.name.rpartition(".")[0]


def _open_npy(path: Place) -> Array:
    try:
        if isinstance(path, RemotePath):
            with path.open_bytes() as file:
                return np.asarray(np.load(file))
        values: Array = np.load(path, mmap_mode="r")
    except (ValueError, EOFError, OSError) as error:
        raise ArtifactError(
            str(path), f"not a complete .npy file ({error})", "Copy or write it again."
        ) from error
    return values


def _open_npy_files(paths: tuple[Place, ...], name: str, key: str) -> EmbeddingFile:
    rows, dim = 0, 0
    for path in paths:
        values = _open_npy(path)
        if values.ndim != 2 or 0 in values.shape:
            raise SidError(str(path), f"shape {values.shape}", "Embeddings are [N, d], not empty.")
        if values.dtype.kind != "f":
            raise SidError(
                str(path), f"dtype {values.dtype}", "Embeddings are float16, float32 or float64."
            )
        if dim and values.shape[1] != dim:
            raise SidError(
                str(path), f"{values.shape[1]} dimensions, {paths[0].name} has {dim}", "Write equal shards."
            )
        rows, dim = rows + values.shape[0], values.shape[1]
    keys_path = paths[0].with_name(f"{_PREFIX}{'' if name == 'content' else '_' + name}{_ROWS}.parquet")
    if not keys_path.is_file():
        return EmbeddingFile(name, paths, dim, rows, None, declared=False)
    keys = _read_keys((keys_path,), key)
    if len(keys) != rows:
        raise SidError(
            str(keys_path),
            f"{len(keys)} rows for {rows} embeddings in {paths[0].name}",
            "Write one row for each.",
        )
    return EmbeddingFile(name, paths, dim, rows, keys, declared=True)


def _open_keyed(paths: tuple[Place, ...], name: str, key: str) -> EmbeddingFile:
    dim = 0
    for path in paths:
        open_parquet(path, {"embedding": "list of float"})
        first = next(_records(path), None)
        dim = dim or (0 if first is None else len(first[1].column(0)[0].as_py() or ()))
    if not dim:
        raise SidError(str(paths[0]), "no embedding", "Write one row per item.")
    keys = _read_keys(paths, key)
    return EmbeddingFile(name, paths, dim, len(keys), keys, declared=False)


def _records(path: Place) -> Iterator[tuple[int, pa.RecordBatch]]:
    begin = 0
    for batch in scan(open_parquet(path), path, ["embedding"], _BATCH):
        yield begin, batch
        begin += len(batch)


def _vectors(batch: pa.RecordBatch, dim: int, path: Place, begin: int) -> Array:
    """A list column as ``[n, dim]``, every row's own length checked."""
    column = batch.column(0)
    lengths = pc.list_value_length(column).fill_null(-1).to_numpy(zero_copy_only=False)
    bad = np.flatnonzero(lengths != dim)
    if len(bad):
        length = lengths[bad[0]]
        found = "is null" if length < 0 else f"has {length} numbers"
        raise SidError(
            str(path),
            f"row {begin + bad[0]} {found}, the first row {dim}: rows are not all {dim} long",
            "Every embedding needs the same dimension and no nulls.",
        )
    flat = column.flatten()
    if flat.null_count:
        row = begin + int(np.flatnonzero(flat.is_null().to_numpy(zero_copy_only=False))[0]) // dim
        raise SidError(str(path), f"row {row} holds a null", "Drop or repair that embedding.")
    values: Array = flat.to_numpy(zero_copy_only=False).reshape(-1, dim)
    return values


def _read_keys(paths: tuple[Place, ...], key: str) -> Array:
    parts = []
    for path in paths:
        file = open_parquet(path)
        names = file.schema_arrow.names
        name = key if key in names else "item_id"
        if name not in names:
            raise SidError(str(path), f"no column {key!r} (it has {names})", f"Add {key!r}, the item's id.")
        parts += [batch.column(0) for batch in scan(file, path, [name])]
    where = str(paths[0])
    kind = parts[0].type if parts else pa.int64()
    keys = pa.concat_arrays([p.cast(kind) for p in parts]) if parts else pa.array([], kind)
    return numbers_of(keys_of(keys, where, "item_id", "Keep one row per item."), where)
