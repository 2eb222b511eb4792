"""A table of a log as people keep it: one Parquet file, several, a folder of parts, hive partitions; a
path or a URI."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from torchrec_sid.artifact.place import Place, RemotePath, locate
from torchrec_sid.data.parquet import open_parquet, scan
from torchrec_sid.errors import ArtifactError, SidError
from torchrec_sid.hashing import text_id

Array = np.ndarray[Any, Any]

_LARGEST = 2**63 - 1
_HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"


@dataclass(frozen=True)
class ParquetTable:
    """Parquet files that are one table; a row's position counts through the files in order of their
    names."""

    where: str
    """What errors call it: the file, or the folder with its table's name."""
    files: tuple[Place, ...]
    """In the order of their rows."""
    rows: tuple[int, ...]
    """Of each file."""
    schema: pa.Schema
    """Columns, those of hive partitions included."""
    partitions: tuple[str, ...]
    """Columns that folders name, as in ``day=2026-01-01``."""

    @classmethod
    def find(cls, folder: Place, name: str) -> ParquetTable:
        """The table ``name`` of a log folder: ``NAME.parquet`` or ``NAME``, each a file or a folder of
        parts, else all files ``NAME-*.parquet`` and ``NAME_*.parquet``.

        Raises:
            ArtifactError: nothing there, or a file that is no complete Parquet file.
            SidError: files whose columns differ in type.
        """
        files = _candidates(folder, name)
        if not files:
            raise ArtifactError(
                f"{folder}/{name}.parquet",
                "no such file",
                "See docs/data.md for the files of a log folder.",
            )
        where = str(files[0]) if len(files) == 1 else f"{folder}/{name}"
        opened = [open_parquet(file) for file in files]
        partitions = _partition_columns(folder, files, where)
        schema = _merged([f.schema_arrow for f in opened], files)
        for column in partitions:
            if column not in schema.names:
                values = [_partition_values(folder, file)[column] for file in files]
                whole = all(v.lstrip("-").isdigit() for v in values if v is not None)
                schema = schema.append(pa.field(column, pa.int64() if whole else pa.string()))
        return cls(where, tuple(files), tuple(f.metadata.num_rows for f in opened), schema, partitions)

    def __len__(self) -> int:
        return sum(self.rows)

    @property
    def names(self) -> list[str]:
        """Its columns."""
        return list(self.schema.names)

    @property
    def first_rows(self) -> list[int]:
        """Position of the first row of each file."""
        return [int(n) for n in np.cumsum((0, *self.rows))[:-1]]

    def column(self, name: str) -> pa.Array:
        """One column of all rows, as it stands (dictionaries decoded)."""
        kind = _plain(self.schema.field(name).type)
        parts = [pa.array([], kind)]
        for file in self.files:
            own = _partition_values(file.parent, file, deep=True) if name in self.partitions else {}
            parquet = open_parquet(file)
            if name not in parquet.schema_arrow.names:
                parts.append(pa.array([own.get(name)] * parquet.metadata.num_rows).cast(kind))
                continue
            for batch in scan(parquet, file, [name]):
                parts.append(_decoded(batch.column(0)).cast(kind))
        return pa.concat_arrays(parts)

    def check_pages(self) -> None:
        """Read every page.

        Raises:
            ArtifactError: naming a file that is damaged in the middle.
        """
        for file in self.files:
            for _ in scan(open_parquet(file), file):
                pass

    def position(self, row: int) -> str:
        """How an error names the row at a position: the row, and where there are several, its file."""
        if len(self.files) == 1:
            return f"row {row}"
        number = int(np.searchsorted(self.first_rows, row, side="right")) - 1
        # Partitions give their files one name: it takes the path below the table to tell them apart.
        file = str(self.files[number]).removeprefix(f"{self.where}/").rsplit(f"{self.where}.parquet/")[-1]
        return f"row {row - self.first_rows[number]} of {file}"


def exists(folder: Place, name: str) -> bool:
    """Whether a log folder has a table of this name."""
    return bool(_candidates(folder, name))


def file_hash(file: Place) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with file.open_bytes() if isinstance(file, RemotePath) else file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]


def read_bytes(file: Place) -> bytes:
    """A small file."""
    with file.open_bytes() if isinstance(file, RemotePath) else file.open("rb") as stream:
        return stream.read()


def key_kind(kind: pa.DataType) -> str | None:
    """How ids of an Arrow type are kept: ``integer`` or ``text``; None for a type that is no id."""
    kind = _plain(kind)
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return "integer"
    if pa.types.is_decimal(kind):
        return "integer" if kind.scale == 0 else None
    return "text" if pa.types.is_string(kind) or pa.types.is_large_string(kind) else None


def keys_of(column: pa.Array, where: str, name: str, remedy: str = "Keep one row each.") -> pa.Array:
    """A column of ids as int64 or text.

    Args:
        column: of any type that :func:`key_kind` takes.
        where: the table, for errors.
        name: of the column.
        remedy: for an id that occurs twice.

    Raises:
        SidError: another type, a null, an integer above 2^63 - 1, a fraction, an id that occurs twice.
    """
    kind = key_kind(column.type)
    if kind is None:
        raise SidError(where, f"column {name!r} has type {column.type}", "Write ids as integers or text.")
    if column.null_count:
        row = int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
        raise SidError(where, f"column {name!r} is null at row {row}", "Fill or drop the rows without one.")
    text = kind == "text"
    keys = _decoded(column).cast(pa.large_string()) if text else _whole(column, where, name)
    counts = pc.value_counts(keys)
    if len(counts) < len(keys):
        times = counts.field("counts")
        at = pc.index(pc.greater(times, 1), True).as_py()
        found = f"{name} {counts.field('values')[at]} occurs {times[at]} times"
        raise SidError(where, found, remedy)
    return keys


def numbers_of(keys: pa.Array, where: str) -> Array:
    """Ids ``[n]`` as int64: integers as they are, texts by :func:`~torchrec_sid.hashing.text_id`.

    Raises:
        SidError: two texts with one number.
    """
    if pa.types.is_integer(keys.type):
        return keys.to_numpy(zero_copy_only=False).astype(np.int64, copy=False)
    numbers = np.fromiter((text_id(t) for t in keys.to_pylist()), np.int64, len(keys))
    order = np.argsort(numbers, kind="stable")
    same = np.flatnonzero(np.diff(numbers[order]) == 0)
    if len(same):
        a, b = (keys[int(order[same[0] + i])].as_py() for i in (0, 1))
        raise SidError(where, f"ids {a!r} and {b!r} have one number", "Change one of the two.")
    return numbers


def _whole(column: pa.Array, where: str, name: str) -> pa.Array:
    try:
        return column.cast(pa.int64())
    except pa.ArrowInvalid:
        for row, value in enumerate(column.to_pylist()):
            if value != int(value) or not -(2**63) <= value <= _LARGEST:
                raise SidError(
                    where, f"{name} is {value} at row {row}", "Use integers up to 2^63 - 1, or text."
                ) from None
        raise


def _plain(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _decoded(column: pa.Array) -> pa.Array:
    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column


def _candidates(folder: Place, name: str) -> list[Place]:
    for path in (folder / f"{name}.parquet", folder / name):
        if path.is_file():
            return [path]
        if path.is_dir():
            return sorted(_parts(path), key=str)
    if not folder.is_dir():
        return []
    several = [p for p in folder.iterdir() if _is_part(p, name)]
    return sorted(several, key=lambda p: p.name)


def _is_part(path: Place, name: str) -> bool:
    return (
        path.name.endswith(".parquet") and path.name.startswith((f"{name}-", f"{name}_")) and path.is_file()
    )


def _parts(folder: Place) -> Iterator[Place]:
    """The Parquet files below a folder; names that begin with ``.`` or ``_`` are other systems' marks."""
    for path in folder.iterdir():
        if path.name.startswith((".", "_")):
            continue
        if path.is_dir():
            yield from _parts(path)
        elif path.name.endswith((".parquet", ".pq")):
            yield path


def _partition_values(folder: Place, file: Place, deep: bool = False) -> dict[str, str | None]:
    names = str(file).removeprefix("" if deep else str(folder)).split("/")[:-1]
    found = dict(name.split("=", 1) for name in names if "=" in name)
    return {name: None if value == _HIVE_NULL else unquote(value) for name, value in found.items()}


def _partition_columns(folder: Place, files: list[Place], where: str) -> tuple[str, ...]:
    columns = [tuple(_partition_values(folder, file)) for file in files]
    if len(set(columns)) > 1:
        raise SidError(
            where, f"partitions {sorted(set(columns))}", "Partition all files by the same columns."
        )
    return columns[0]


def _merged(schemas: list[pa.Schema], files: list[Place]) -> pa.Schema:
    first: dict[str, tuple[pa.DataType, Place]] = {}
    for schema, file in zip(schemas, files, strict=True):
        for column in schema:
            kind = _plain(column.type)
            seen, earlier = first.setdefault(column.name, (kind, file))
            if seen != kind and not (pa.types.is_integer(seen) and pa.types.is_integer(kind)):
                found = f"column {column.name!r} is {kind}, in {earlier.name} {seen}"
                raise SidError(str(file), found, "Write all parts with one schema.")
    return pa.schema([(name, kind) for name, (kind, _) in first.items()])


def folder_at(path: str | Path | RemotePath) -> Place:
    """A log folder, local or a URI.

    Raises:
        SidError: there is no such folder.
    """
    place = path if isinstance(path, RemotePath) else locate(path)
    if not place.is_dir():
        raise SidError(str(path), "no such folder", "Pass a folder as docs/data.md describes it.")
    return place
