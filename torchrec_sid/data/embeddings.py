"""One content source of a log folder: embeddings of the items, aligned with them or keyed by item id."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from torchrec_sid.data.parquet import Array, integers, open_parquet, scan
from torchrec_sid.errors import ArtifactError, SidError
from torchrec_sid.streams import EmbeddingStream, check_batch, open_stream

_PREFIX = "item_emb"
_ROWS = "_rows"
_BATCH = 16_384


@dataclass(frozen=True)
class EmbeddingFile:
    """A file of embeddings, and the row in which each item's embedding stands."""

    name: str
    """The source's name: ``content`` for ``item_emb.*``, else the suffix of the file."""
    path: Path
    """``.npy`` or ``.parquet``."""
    dim: int
    """d."""
    rows: int
    """Rows in the file."""
    keys: Array | None
    """``[rows]`` int64: the item id of each row, or None where row i belongs to row i of items.parquet."""
    declared: bool
    """Whether a ``*_rows.parquet`` file says which items have content, so that others may lack it."""


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
        name = str(self.file.path)
        if self.order is None:
            return open_stream(self.file.path, batch_size=_BATCH)
        rows = self.order[self.order >= 0]

        def start() -> Iterator[Tensor]:
            values = self._whole_file
            for begin in range(0, len(rows), _BATCH):
                batch = torch.from_numpy(np.array(values[rows[begin : begin + _BATCH]]))
                yield check_batch(batch, self.file.dim, name, begin)

        return EmbeddingStream(start, self.file.dim, len(rows), name)

    @cached_property
    def _whole_file(self) -> Array:
        if self.file.path.suffix == ".npy":
            return _open_npy(self.file.path)
        batches = [batch.numpy() for batch in open_stream(self.file.path, batch_size=_BATCH)]
        return np.concatenate(batches)


def find_embeddings(folder: Path) -> tuple[EmbeddingFile, ...]:
    """Every embedding file of a folder, ``content`` first, then by name.

    Raises:
        SidError: none, two files for one source, a wrong rank or dtype, a duplicate item id.
        ArtifactError: a truncated file.
    """
    found: dict[str, EmbeddingFile] = {}
    for path in sorted(folder.glob(f"{_PREFIX}*")):
        if path.suffix not in (".npy", ".parquet") or path.stem.endswith(_ROWS):
            continue
        name = path.stem.removeprefix(_PREFIX).removeprefix("_") or "content"
        if name in found:
            raise SidError(
                str(path), f"source {name!r} also stands in {found[name].path.name}", "Keep one of the two."
            )
        found[name] = _open_npy_file(path, name) if path.suffix == ".npy" else _open_keyed(path, name)
    if not found:
        raise SidError(str(folder), "no embeddings", "Add item_emb.npy [N, d]; see docs/data.md.")
    return tuple(sorted(found.values(), key=lambda f: (f.name != "content", f.name)))


def _open_npy(path: Path) -> Array:
    try:
        values: Array = np.load(path, mmap_mode="r")
    except (ValueError, EOFError, OSError) as error:
        raise ArtifactError(
            str(path), f"not a complete .npy file ({error})", "Copy or write it again."
        ) from error
    return values


def _open_npy_file(path: Path, name: str) -> EmbeddingFile:
    values = _open_npy(path)
    if values.ndim != 2 or 0 in values.shape:
        raise SidError(str(path), f"shape {values.shape}", "Embeddings are [N, d], not empty.")
    if values.dtype.kind != "f":
        raise SidError(str(path), f"dtype {values.dtype}", "Embeddings are float16, float32 or float64.")
    rows, dim = values.shape
    keys_path = path.with_name(f"{path.stem}{_ROWS}.parquet")
    if not keys_path.is_file():
        return EmbeddingFile(name, path, dim, rows, None, declared=False)
    keys = _read_keys(keys_path)
    if len(keys) != rows:
        raise SidError(
            str(keys_path),
            f"{len(keys)} rows for {rows} embeddings in {path.name}",
            "Write one row for each.",
        )
    return EmbeddingFile(name, path, dim, rows, keys, declared=True)


def _open_keyed(path: Path, name: str) -> EmbeddingFile:
    open_parquet(path, {"item_id": "integer", "embedding": "list of float"})
    keys = _read_keys(path)
    return EmbeddingFile(name, path, open_stream(path).dim, len(keys), keys, declared=False)


def _read_keys(path: Path) -> Array:
    file = open_parquet(path, {"item_id": "integer"})
    begin, parts = 0, [np.empty(0, np.int64)]
    for batch in scan(file, path, ["item_id"]):
        parts.append(integers(batch, "item_id", path, begin))
        begin += len(batch)
    keys = np.concatenate(parts)
    refuse_duplicates(keys, path)
    return keys


def refuse_duplicates(ids: Array, path: Path) -> None:
    """Raise SidError if an item id occurs twice."""
    unique, counts = np.unique(ids, return_counts=True)
    if len(unique) < len(ids):
        twice = int(unique[counts > 1][0])
        raise SidError(
            str(path), f"item_id {twice} occurs {int(counts.max())} times", "Keep one row per item."
        )
