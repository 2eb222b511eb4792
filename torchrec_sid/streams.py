"""Embeddings as a stream of batches, whatever they come in: tensor, array, file or iterator.

A fit reads its data several times and never holds it all, so every source becomes a callable that
starts a new pass over float32 batches ``[n, d]``, each checked for shape and finite values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchrec_sid.errors import SidError

EmbeddingData = Tensor | np.ndarray[Any, Any] | str | Path | Callable[[], Iterable[Tensor]]
"""A tensor or array ``[N, d]``, a ``.npy`` or ``.parquet`` file, or a callable that starts a pass."""


@dataclass(frozen=True)
class EmbeddingStream:
    """A re-iterable source of embeddings: each ``iter()`` is one pass in the same order."""

    start: Callable[[], Iterator[Tensor]]
    """Starts a pass over float32 batches ``[n, d]``."""
    dim: int
    """d."""
    rows: int | None
    """N, where it is known without a pass."""
    name: str
    """What to call the source in an error."""

    def __iter__(self) -> Iterator[Tensor]:
        return self.start()


def open_stream(
    data: EmbeddingData | EmbeddingStream,
    *,
    batch_size: int = 16_384,
    column: str = "embedding",
    name: str = "embeddings",
) -> EmbeddingStream:
    """Open any source of embeddings as a stream.

    Args:
        data: see :data:`EmbeddingData`; a callable must return a fresh iterable at each call.
        batch_size: rows per batch; batches of a callable keep their own size.
        column: list column of a Parquet file that holds the vectors.
        name: what to call the source in errors; files use their path.

    Raises:
        SidError: unknown kind of source, no rows, wrong rank or dtype, a NaN or infinite value, or a
            dimension that changes from batch to batch.
    """
    if isinstance(data, EmbeddingStream):
        return data
    if isinstance(data, (str, Path)):
        path = Path(data)
        if not path.is_file():
            raise SidError(str(path), "no such file", "Pass a .npy or .parquet file of embeddings.")
        if path.suffix == ".npy":
            return open_stream(np.load(path, mmap_mode="r"), batch_size=batch_size, name=str(path))
        if path.suffix == ".parquet":
            return _open_parquet(path, batch_size, column)
        raise SidError(str(path), f"unknown suffix {path.suffix!r}", "Use .npy or .parquet.")
    if isinstance(data, (Tensor, np.ndarray)):
        return _open_array(data, batch_size, name)
    if callable(data):
        return _open_callable(data, name)
    raise SidError(
        name,
        f"a {type(data).__name__}",
        "Pass a tensor, an array, a file, or a callable that returns a fresh iterator.",
    )


def _open_array(data: Tensor | np.ndarray[Any, Any], batch_size: int, name: str) -> EmbeddingStream:
    if data.ndim != 2 or 0 in data.shape:
        raise SidError(name, f"shape {tuple(data.shape)}", "Embeddings are [N, d], not empty.")
    rows, dim = (int(n) for n in data.shape)

    def start() -> Iterator[Tensor]:
        for begin in range(0, rows, batch_size):
            piece = data[begin : begin + batch_size]
            batch = piece if isinstance(piece, Tensor) else torch.from_numpy(np.array(piece))
            yield check_batch(batch, dim, name, begin)

    return EmbeddingStream(start, dim, rows, name)


def _open_callable(make: Callable[[], Iterable[Tensor]], name: str) -> EmbeddingStream:
    first = next(iter(make()), None)
    if first is None:
        raise SidError(name, "no batch", "The callable must return a non-empty iterable.")
    dim = int(first.shape[-1])

    def start() -> Iterator[Tensor]:
        begin = 0
        for batch in make():
            yield check_batch(batch, dim, name, begin)
            begin += len(batch)

    return EmbeddingStream(start, dim, None, name)


def _open_parquet(path: Path, batch_size: int, column: str) -> EmbeddingStream:
    import pyarrow.parquet as pq  # optional: torch alone is enough for arrays

    with pq.ParquetFile(path) as file:
        rows = file.metadata.num_rows
        if column not in file.schema_arrow.names:
            raise SidError(str(path), f"no column {column!r}", f"Columns are {file.schema_arrow.names}.")
        head = next(file.iter_batches(batch_size=1, columns=[column]), None)
    if head is None:
        raise SidError(str(path), "no rows", "Embeddings must not be empty.")
    dim = len(head.column(0)[0])

    def start() -> Iterator[Tensor]:
        begin = 0
        with pq.ParquetFile(path) as file:
            for record in file.iter_batches(batch_size=batch_size, columns=[column]):
                values = record.column(0).flatten().to_numpy(zero_copy_only=False)
                if len(values) != len(record) * dim:
                    raise SidError(
                        str(path),
                        f"rows {begin}..{begin + len(record) - 1} are not all {dim} long",
                        "Every embedding needs the same dimension and no nulls.",
                    )
                batch = torch.from_numpy(np.array(values)).view(-1, dim)
                yield check_batch(batch, dim, str(path), begin)
                begin += len(record)

    return EmbeddingStream(start, dim, rows, str(path))


def check_batch(batch: Tensor, dim: int, name: str, begin: int = 0) -> Tensor:
    """The batch as float32 ``[n, dim]``, or an error that names its first bad row.

    Raises:
        SidError: wrong rank or dimension, an integer dtype, a NaN or an infinite value.
    """
    if batch.dim() != 2 or batch.shape[1] != dim:
        raise SidError(name, f"a batch of shape {tuple(batch.shape)}", f"Every batch must be [n, {dim}].")
    if not batch.dtype.is_floating_point:
        raise SidError(name, f"dtype {batch.dtype}", "Embeddings are floating point.")
    batch = batch.to(torch.float32)
    # A finite sum has finite terms; an infinite one of large terms is no proof, so rows are looked at.
    if bool(torch.isfinite(batch.sum(dim=1)).all()):
        return batch
    finite = torch.isfinite(batch).all(dim=1)
    if not bool(finite.all()):
        row = int((~finite).nonzero()[0])
        raise SidError(
            name, f"row {begin + row} holds a NaN or an infinity", "Drop or repair that embedding."
        )
    return batch
