"""Parquet in bounded memory: open, check columns, stream batches, append rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from torchrec_sid.artifact.place import Place, RemotePath
from torchrec_sid.errors import ArtifactError, SidError

Array = np.ndarray[Any, Any]

SCAN_ROWS = 65_536
"""Rows per batch of a streaming scan."""

_KINDS = {
    "integer": pa.types.is_integer,
    "text": lambda t: pa.types.is_string(t) or pa.types.is_large_string(t) or pa.types.is_dictionary(t),
    "list of integer": lambda t: _is_list(t) and pa.types.is_integer(t.value_type),
    "list of float": lambda t: _is_list(t) and pa.types.is_floating(t.value_type),
}


def _is_list(kind: Any) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def open_parquet(path: Place, columns: Mapping[str, str] | None = None) -> pq.ParquetFile:
    """Open a Parquet file and check that it has these columns.

    Args:
        path: the file.
        columns: name -> kind, one of ``integer``, ``text``, ``list of integer``, ``list of float``.

    Raises:
        ArtifactError: missing, empty, truncated or not Parquet at all.
        SidError: a column is missing or of another type.
    """
    if not path.is_file():
        raise ArtifactError(str(path), "no such file", "See docs/data.md for the files of a log folder.")
    try:
        # A buffered read keeps memory flat even where one row group holds the whole file.
        opened = path.open_bytes() if isinstance(path, RemotePath) else path
        file = pq.ParquetFile(opened, buffer_size=1 << 20, pre_buffer=False)
    except (pa.ArrowInvalid, OSError) as error:
        raise ArtifactError(
            str(path), f"not a complete Parquet file ({error})", "Copy or write it again."
        ) from error
    schema = file.schema_arrow
    for name, kind in (columns or {}).items():
        if name not in schema.names:
            raise SidError(
                str(path), f"no column {name!r} (it has {schema.names})", f"Add {name!r}, {kind}."
            )
        found = schema.field(name).type
        if not _KINDS[kind](found):
            raise SidError(
                str(path), f"column {name!r} has type {found}", f"Write it as {kind}; see docs/data.md."
            )
    return file


def scan(
    file: pq.ParquetFile, path: Place | str, columns: list[str] | None = None, rows: int = SCAN_ROWS
) -> Iterator[pa.RecordBatch]:
    """Stream record batches of these columns, or of all.

    Raises:
        ArtifactError: a page in the middle of the file cannot be read.
    """
    batches = file.iter_batches(batch_size=rows, columns=columns)
    while True:
        try:
            batch = next(batches, None)
        except (pa.ArrowException, OSError) as error:
            raise ArtifactError(
                str(path), f"damaged in the middle ({error})", "Copy or write it again."
            ) from error
        if batch is None:
            return
        yield batch


def integers(batch: pa.RecordBatch, name: str, path: Place, begin: int) -> Array:
    """One column of a batch as int64 ``[n]``; ``begin`` is the batch's first row in the file.

    Raises:
        SidError: a null, named by its row.
    """
    column = batch.column(name)
    _refuse_nulls(column, name, path, begin)
    return column.to_numpy(zero_copy_only=False).astype(np.int64, copy=False)


def texts(batch: pa.RecordBatch, name: str, path: Place, begin: int) -> pa.Array:
    """One text column of a batch, dictionary-encoded or not, as plain strings without nulls."""
    column = batch.column(name)
    _refuse_nulls(column, name, path, begin)
    return column.cast(pa.large_string())


def _refuse_nulls(column: pa.Array, name: str, path: Place, begin: int) -> None:
    if column.null_count:
        row = begin + int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
        raise SidError(
            str(path), f"column {name!r} is null at row {row}", "Fill or drop the rows without a value."
        )
