"""Embeddings as a stream of batches, whatever they come in: tensor, array, file or iterator.

A fit reads its data several times and never holds it all, so every source becomes a callable that
starts a new pass over float32 batches ``[n, d]``, each checked for shape and finite values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchrec_sid.errors import ArtifactError, SidError

EmbeddingData = Tensor | np.ndarray[Any, Any] | str | Path | Callable[[], Iterable[Tensor]]
"""A tensor or array ``[N, d]``, a ``.npy`` or ``.parquet`` file, or a callable that starts a pass."""


_LARGEST = 1e15
"""Largest norm of an embedding: sums of squares over 10^7 rows stay within float32."""


@dataclass(frozen=True)
class EmbeddingStream:
    """A re-iterable source of embeddings: each ``iter()`` is one pass in the same order.

    A pass that ends with another number of rows than was declared, or than the first one had, is an error:
    half of the items must not pass for all of them.
    """

    start: Callable[[], Iterator[Tensor]]
    """Starts a pass over float32 batches ``[n, d]``."""
    dim: int
    """d."""
    rows: int | None
    """N, where it is known without a pass."""
    name: str
    """What to call the source in an error."""
    _first: list[int] = field(default_factory=list, init=False, repr=False, compare=False)

    def __iter__(self) -> Iterator[Tensor]:
        count = 0
        for batch in self.start():
            count += len(batch)
            yield batch
        if self.rows is not None:
            expected, what = self.rows, "it has"
        else:
            if not self._first:
                self._first.append(count)
            expected, what = self._first[0], "the first pass had"
        if count != expected:
            raise SidError(
                self.name,
                f"a pass over {count:,} rows, where {what} {expected:,}",
                "Every pass must start anew and give the same rows: return a fresh iterator at each call.",
            )


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
            return open_stream(_open_npy(path), batch_size=batch_size, name=str(path))
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


def _open_npy(path: Path) -> np.ndarray[Any, Any]:
    try:
        values = np.load(path, mmap_mode="r")
    except (ValueError, EOFError, OSError) as error:
        raise ArtifactError(
            str(path), f"no whole .npy file ({error})", "Copy or write it again."
        ) from error
    if not isinstance(values, np.ndarray):
        raise ArtifactError(str(path), "an archive, no array", "Save one array with numpy.save.")
    return values


def _open_array(data: Tensor | np.ndarray[Any, Any], batch_size: int, name: str) -> EmbeddingStream:
    if data.ndim != 2 or 0 in data.shape:
        raise SidError(name, f"shape {tuple(data.shape)}", "Embeddings are [N, d], not empty.")
    rows, dim = (int(n) for n in data.shape)
    as_tensor(data[:1], name)  # another type is refused before any pass

    def start() -> Iterator[Tensor]:
        for begin in range(0, rows, batch_size):
            yield check_batch(as_tensor(data[begin : begin + batch_size], name), dim, name, begin)

    return EmbeddingStream(start, dim, rows, name)


def as_tensor(data: Any, name: str) -> Tensor:
    """A tensor or an array, of any byte order, as a tensor of its own memory.

    Raises:
        SidError: neither of the two, or values that are no numbers.
    """
    if isinstance(data, Tensor):
        return data
    if not isinstance(data, np.ndarray):
        raise SidError(name, f"a {type(data).__name__}", "Batches are tensors or arrays [n, d].")
    if data.dtype.kind not in "fiub":
        raise SidError(name, f"dtype {data.dtype}", "Embeddings are floating point.")
    wide = data.dtype.kind == "f" and data.dtype.itemsize > 8
    kind = np.dtype(np.float64) if wide else data.dtype.newbyteorder("=")
    return torch.from_numpy(np.array(data, dtype=kind))


def _open_callable(make: Callable[[], Iterable[Any]], name: str) -> EmbeddingStream:
    first_pass = _iterate(make, name)
    first = next(first_pass, None)
    if first is None:
        raise SidError(name, "no batch", "The callable must return a non-empty iterable.")
    first = as_tensor(first, name)
    if first.dim() != 2 or not first.shape[1]:
        raise SidError(name, f"a batch of shape {tuple(first.shape)}", "Batches are [n, d].")
    dim = int(first.shape[1])
    # What was looked at is not lost: a callable that hands out one iterator serves one whole pass.
    opened = [chain([first], first_pass)]

    def start() -> Iterator[Tensor]:
        begin = 0
        for raw in opened.pop() if opened else _iterate(make, name):
            batch = as_tensor(raw, name)
            yield check_batch(batch, dim, name, begin)
            begin += len(batch)

    return EmbeddingStream(start, dim, None, name)


def _iterate(make: Callable[[], Iterable[Any]], name: str) -> Iterator[Any]:
    batches = make()
    if not isinstance(batches, Iterable):
        raise SidError(
            name, f"a callable that returns a {type(batches).__name__}", "Return an iterable of batches."
        )
    return iter(batches)


def _open_parquet(path: Path, batch_size: int, column: str) -> EmbeddingStream:
    import pyarrow as pa  # optional: torch alone is enough for arrays
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            rows, schema = file.metadata.num_rows, file.schema_arrow
    except (pa.ArrowException, OSError) as error:
        raise ArtifactError(
            str(path), f"no whole Parquet file ({error})", "Copy or write it again."
        ) from error
    if column not in schema.names:
        raise SidError(str(path), f"no column {column!r}", f"Columns are {schema.names}.")
    kind = schema.field(column).type
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not lists or not pa.types.is_floating(kind.value_type):
        raise SidError(
            str(path),
            f"column {column!r} has type {kind}",
            "Embeddings are lists of floating point numbers.",
        )
    if not rows:
        raise SidError(str(path), "no rows", "Embeddings must not be empty.")

    def vectors() -> Iterator[Tensor]:
        begin = 0
        width: int | None = None
        try:
            with pq.ParquetFile(path) as file:
                for record in file.iter_batches(batch_size=batch_size, columns=[column]):
                    batch = _vectors(record.column(0), width, str(path), begin)
                    width = batch.shape[1]
                    yield batch
                    begin += len(batch)
        except pa.ArrowException as error:
            raise ArtifactError(
                str(path), f"cannot be read from row {begin} on ({error})", "Copy or write it again."
            ) from error

    dim = next(vectors()).shape[1]

    def start() -> Iterator[Tensor]:
        begin = 0
        for batch in vectors():
            yield check_batch(batch, dim, str(path), begin)
            begin += len(batch)

    return EmbeddingStream(start, dim, rows, str(path))


def _vectors(column: Any, width: int | None, name: str, begin: int) -> Tensor:
    """A column of lists as ``[n, width]``, each row looked at; without a width the first row's."""
    import pyarrow.compute as pc

    lengths = pc.list_value_length(column).fill_null(-1).to_numpy(zero_copy_only=False)
    width = int(lengths[0]) if width is None else width
    remedy = "Every embedding needs the same dimension and no nulls."
    bad = np.flatnonzero(lengths != max(width, 1))
    if len(bad):
        found = int(lengths[bad[0]])
        what = "is null" if found < 0 else f"holds {found} numbers, the first one {width}"
        raise SidError(name, f"row {begin + int(bad[0])} {what}", remedy)
    values = column.flatten()
    if values.null_count:
        at = int(np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))[0]) // width
        raise SidError(name, f"row {begin + at} holds a null", remedy)
    return torch.from_numpy(np.array(values.to_numpy(zero_copy_only=False))).view(-1, width)


def check_batch(batch: Tensor, dim: int, name: str, begin: int = 0) -> Tensor:
    """The batch as float32 ``[n, dim]``, or an error that names its first bad row.

    Raises:
        SidError: wrong rank or dimension, an integer dtype, a NaN, an infinite or a huge value.
    """
    if batch.dim() != 2 or batch.shape[1] != dim:
        raise SidError(name, f"a batch of shape {tuple(batch.shape)}", f"Every batch must be [n, {dim}].")
    if not batch.dtype.is_floating_point:
        raise SidError(name, f"dtype {batch.dtype}", "Embeddings are floating point.")
    given, batch = batch, batch.to(torch.float32)
    # A small sum of squares has small and finite terms.
    square = batch.square().sum(dim=1)
    if bool((square <= _LARGEST**2).all()):
        return batch
    finite = torch.isfinite(given).all(dim=1)
    if not bool(finite.all()):
        row = int((~finite).nonzero()[0])
        raise SidError(
            name, f"row {begin + row} holds a NaN or an infinity", "Drop or repair that embedding."
        )
    row = int((~(square <= _LARGEST**2)).nonzero()[0])
    norm = float(given[row].double().norm())
    raise SidError(
        name,
        f"row {begin + row} has norm {norm:.3g}, beyond {_LARGEST:.0g}",
        "Scale the embeddings: sums of their squares would overflow.",
    )
