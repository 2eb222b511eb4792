"""Engines that run the queries of a preparation: DuckDB inside this process, Spark on a cluster.

A query is one Ibis expression; an engine compiles it to its own SQL. What differs between engines is here:
how a table is opened, where a result is kept, how one is streamed.
"""

from __future__ import annotations

import os
import shutil
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import ibis
import pyarrow as pa
import pyarrow.parquet as pq

from torchrec_sid.artifact.place import RemotePath
from torchrec_sid.data.lake import ParquetTable
from torchrec_sid.data.prepare_config import EngineName
from torchrec_sid.errors import SidError

Table = Any
"""An Ibis table expression."""

ROW = "row_in_source"
"""Column of :meth:`Engine.read`: position of a row in its table."""

STREAM_ROWS = 1 << 16
"""Rows per batch of a result."""


class Engine(Protocol):
    """Where queries run."""

    def read(self, name: str, source: ParquetTable) -> Table:
        """Open Parquet files; the column :data:`ROW` is a row's position among them."""

    def keep(self, name: str, query: Table) -> Table:
        """Run a query now and keep its rows, on disk where they do not fit in memory."""

    def stream(self, query: Table) -> Iterator[pa.RecordBatch]:
        """Run a query and yield its rows in order."""

    def microseconds(self, column: Any) -> Any:
        """A timestamp or date column as int64 microseconds since 1970."""

    def close(self) -> None:
        """Free what the engine holds."""


def open_engine(name: EngineName, scratch: Path, memory: str) -> Engine:
    """Start an engine.

    Args:
        name: ``duckdb`` or ``spark``.
        scratch: an empty folder for what does not fit in memory.
        memory: how much DuckDB may use, as in ``2GB``; Spark's own configuration says that of Spark.

    Raises:
        SidError: an unknown name, or Spark is not installed.
    """
    if name == "duckdb":
        return DuckEngine(scratch, memory)
    if name != "spark":
        raise SidError("engine", repr(name), "Choose duckdb or spark.")
    return SparkEngine(scratch)


def one_row(engine: Engine, query: Table) -> dict[str, Any]:
    """The only row of a query, by column."""
    (row,) = [row for batch in engine.stream(query) for row in batch.to_pylist()]
    return row


class DuckEngine:
    """DuckDB: bounded memory, every core, files in ``scratch``."""

    def __init__(self, scratch: Path, memory: str) -> None:
        import duckdb

        self._scratch, self._errors = scratch, duckdb.Error
        self._sources: list[ParquetTable] = []
        self._connection = duckdb.connect(":memory:")
        for setting in (
            f"SET memory_limit='{memory}'",
            f"SET temp_directory='{scratch / 'spill'}'",
            f"SET threads={len(os.sched_getaffinity(0))}",
            "SET TimeZone='UTC'",
            "SET enable_progress_bar=false",
        ):
            self._connection.execute(setting)

    def read(self, name: str, source: ParquetTable) -> Table:
        """See :class:`Engine`."""
        self._sources.append(source)
        for file in source.files:
            if isinstance(file, RemotePath):
                self._reach(file)
        paths = ", ".join(
            _quoted(str(file if isinstance(file, RemotePath) else file.absolute())) for file in source.files
        )
        options = "filename=true, file_row_number=true, union_by_name=true, hive_types_autocast=false"
        options += f", hive_partitioning={'true' if source.partitions else 'false'}"
        columns = ", ".join(
            _typed(source, column, f'r."{column}"', f'"{column}"', "VARCHAR") for column in source.names
        )
        whole = f"read_parquet([{paths}], {options}) r"
        if len(source.files) == 1:
            select = f"SELECT {columns}, r.file_row_number AS {ROW} FROM {whole}"
        else:
            found = [
                row[0] for row in self._connection.sql(f"SELECT DISTINCT filename FROM {whole}").fetchall()
            ]
            first = _first_rows(source, found)
            values = ", ".join(f"({_quoted(path)}, {row})" for path, row in first.items())
            select = (
                f"SELECT {columns}, f.first_row + r.file_row_number AS {ROW} FROM {whole} "
                f"JOIN (VALUES {values}) f(path, first_row) ON f.path = r.filename"
            )
        with self._named_errors():
            self._connection.execute(f'CREATE OR REPLACE VIEW "{name}" AS {select}')
        return ibis.table(ibis.Schema.from_pyarrow(self._schema(f'SELECT * FROM "{name}"')), name=name)

    def keep(self, name: str, query: Table) -> Table:
        """See :class:`Engine`."""
        with self._named_errors():
            self._connection.execute(f'CREATE OR REPLACE TABLE "{name}" AS {_sql(query, "duckdb")}')
        return ibis.table(query.schema(), name=name)

    def stream(self, query: Table) -> Iterator[pa.RecordBatch]:
        """See :class:`Engine`."""
        schema = query.schema().to_pyarrow()
        # A cursor of its own: several results may be read in turn.
        with self._connection.cursor() as cursor:
            with self._named_errors():
                batches = cursor.sql(_sql(query, "duckdb")).to_arrow_reader(STREAM_ROWS)
            while True:
                with self._named_errors():
                    batch = next(batches, None)
                if batch is None:
                    return
                columns = zip(batch.columns, schema, strict=True)
                yield pa.RecordBatch.from_arrays(
                    [c if c.type == f.type else c.cast(f.type) for c, f in columns], schema=schema
                )

    def microseconds(self, column: Any) -> Any:
        """See :class:`Engine`."""
        kind = column.type()
        if kind.is_timestamp() and kind.scale == 9 and kind.timezone:
            # Nanoseconds with a zone are no argument of epoch_us; the session's zone is UTC.
            column = column.cast("timestamp(9)")
        return _epoch_us(column)

    def close(self) -> None:
        """See :class:`Engine`."""
        self._connection.close()

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        """A full disk or a damaged file as an error of ours; anything else is a mistake in a query."""
        try:
            yield
        except (self._errors, pa.ArrowException, OSError) as error:
            text = str(error).splitlines()[0]
            if str(self._scratch) in text or "No space left" in text:
                reason = text.rsplit(": ", 1)[-1]
                raise SidError(
                    str(self._scratch),
                    f"cannot be written ({reason})",
                    "Free space, or choose another folder.",
                ) from error
            for source in self._sources:
                source.check_pages()
            raise

    def _schema(self, sql: str) -> pa.Schema:
        return self._connection.sql(f"{sql} LIMIT 0").to_arrow_table().schema

    def _reach(self, file: RemotePath) -> None:
        protocol = file.filesystem.protocol
        name = protocol if isinstance(protocol, str) else protocol[0]
        if not self._connection.filesystem_is_registered(name):
            self._connection.register_filesystem(file.filesystem)


class SparkEngine:
    """Spark: the running session, or one of this machine; results pass through Parquet files in
    ``scratch``, which has to be a folder that all machines see."""

    def __init__(self, scratch: Path) -> None:
        try:
            from pyspark.sql import SparkSession
        except ImportError as error:
            raise SidError("engine", "pyspark is not installed", "Install torchrec-sid[spark].") from error
        _ = ibis.pyspark  # registers the options that its compiler reads
        ibis.options.pyspark.treat_nan_as_null = False
        self._scratch, self._results = scratch, 0
        active = SparkSession.getActiveSession()
        self._owned = active is None
        settings = {
            "spark.sql.session.timeZone": "UTC",
            "spark.sql.legacy.parquet.nanosAsLong": "true",
            "spark.sql.sources.partitionColumnTypeInference.enabled": "false",
            "spark.sql.ansi.enabled": "true",
        }
        if active is None:
            builder = SparkSession.builder.appName("torchrec-sid prepare").config(
                "spark.ui.enabled", "false"
            )
            if "SPARK_MASTER" not in os.environ:
                builder = builder.master(f"local[{len(os.sched_getaffinity(0))}]").config(
                    "spark.driver.bindAddress", "127.0.0.1"
                )
                builder = builder.config("spark.sql.shuffle.partitions", "8")
            active = builder.config("spark.log.level", "ERROR").getOrCreate()
        self._session = active
        for key, value in settings.items():
            self._session.conf.set(key, value)

    def read(self, name: str, source: ParquetTable) -> Table:
        """See :class:`Engine`."""
        frame = self._session.read.option("mergeSchema", "true")
        if source.partitions:
            frame = frame.option("basePath", _base_path(source))
        frame = frame.parquet(*[_spark_path(file) for file in source.files])
        columns = [f"`{column}`" for column in source.names]
        typed = [
            _typed(source, name, column, column, "STRING")
            for name, column in zip(source.names, columns, strict=True)
        ]
        whole = frame.selectExpr(*typed, "_metadata.row_index AS _row", "_metadata.file_path AS _file")
        found = [row[0] for row in whole.selectExpr("_file").distinct().collect()]
        first = _first_rows(source, found)
        files = self._session.createDataFrame(
            [(p, n) for p, n in first.items()], "_file string, _first long"
        )
        whole.join(files.hint("broadcast"), "_file").selectExpr(
            *columns, f"_first + _row AS {ROW}"
        ).createOrReplaceTempView(name)
        return self._view(name)

    def keep(self, name: str, query: Table) -> Table:
        """See :class:`Engine`."""
        folder = self._write(query)
        frame = self._session.read.parquet(folder)
        frame.createOrReplaceTempView(name)
        return ibis.table(query.schema(), name=name)

    def stream(self, query: Table) -> Iterator[pa.RecordBatch]:
        """See :class:`Engine`."""
        folder = Path(self._write(query))
        schema = query.schema().to_pyarrow()
        # An ordered result is a file per range of the order, named in that order.
        for file in sorted(folder.glob("part-*.parquet")):
            for batch in pq.ParquetFile(file).iter_batches(STREAM_ROWS):
                yield pa.RecordBatch.from_arrays(
                    [c.cast(f.type) for c, f in zip(batch.columns, schema, strict=True)], schema=schema
                )
        shutil.rmtree(folder)

    def microseconds(self, column: Any) -> Any:
        """See :class:`Engine`."""
        if column.type().is_integer():
            return column // 1000  # nanoseconds, which Spark has no type for
        return _unix_micros(column.cast("timestamp"))

    def close(self) -> None:
        """See :class:`Engine`."""
        if self._owned:
            self._session.stop()

    def _write(self, query: Table) -> str:
        self._results += 1
        folder = str(self._scratch / f"result-{self._results:04d}")
        self._session.sql(_sql(query, "pyspark")).write.parquet(folder)
        return folder

    def _view(self, name: str) -> Table:
        from pyspark.sql.pandas.types import to_arrow_schema

        return ibis.table(
            ibis.Schema.from_pyarrow(to_arrow_schema(self._session.table(name).schema)), name=name
        )


@ibis.udf.scalar.builtin(name="epoch_us", signature=((ibis.dtype("timestamp"),), ibis.dtype("int64")))
def _epoch_us(moment: Any) -> Any: ...


@ibis.udf.scalar.builtin(name="unix_micros", signature=((ibis.dtype("timestamp"),), ibis.dtype("int64")))
def _unix_micros(moment: Any) -> Any: ...


def _sql(query: Table, dialect: str) -> str:
    return str(ibis.to_sql(query, dialect=dialect, pretty=False))


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _typed(source: ParquetTable, name: str, column: str, called: str, text: str) -> str:
    """A column; one of hive partitions in the type that the table gives it, not in an engine's own."""
    if name not in source.partitions:
        return column
    kind = "BIGINT" if pa.types.is_integer(source.schema.field(name).type) else text
    return f"CAST({column} AS {kind}) AS {called}"


def _spark_path(file: Any) -> str:
    # Hadoop escapes what it is given: the path goes there as it is.
    return str(file) if isinstance(file, RemotePath) else f"file://{Path(file).absolute()}"


def _base_path(source: ParquetTable) -> str:
    """The folder above the first partition."""
    parts = _spark_path(source.files[0]).split("/")
    first = next(i for i, part in enumerate(parts) if "=" in part)
    return "/".join(parts[:first])


def _first_rows(source: ParquetTable, found: list[str]) -> dict[str, int]:
    """Position of the first row of each file, by the path that the engine gives it."""

    def plain(path: str) -> str:
        scheme, colon, rest = path.partition(":")
        return (path if not colon or "/" in scheme else rest).strip("/")

    ours = {
        plain(_spark_path(file)): row for file, row in zip(source.files, source.first_rows, strict=True)
    }
    first = {}
    for path in found:
        name = plain(path)
        # Spark reports escaped paths, DuckDB those that it was given.
        first[path] = ours[name] if name in ours else ours[urllib.parse.unquote(name)]
    return first
