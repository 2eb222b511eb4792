"""histories.parquet: a history per impression (or target) that is taken as it stands."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as kinds

from torchrec_sid.ages import NO_TIME
from torchrec_sid.data.engines import ROW, Engine, Table
from torchrec_sid.data.event_columns import is_text
from torchrec_sid.data.event_queries import whole_number
from torchrec_sid.data.lake import ParquetTable, key_kind
from torchrec_sid.data.parquet import Array
from torchrec_sid.data.schema import LogFolder
from torchrec_sid.errors import SidError

KEYS = ("impression", "target_no")
"""Columns that join events with their histories, the first that both tables have."""


@dataclass
class JoinCounts:
    """How many given histories were read, and how many events found theirs."""

    histories: int = 0
    events: int = 0
    entries_without_embedding: int = 0
    entries_held_out: int = 0


class GivenBatch(NamedTuple):
    """Some histories of one bucket."""

    bucket: int
    key: pa.Array
    """``[n]`` of the histories."""
    lengths: Array
    """``[n]`` int64 entries that stay."""
    items: Array
    """``[sum of lengths]`` dense."""
    ts: Array
    """Likewise; ``NO_TIME`` where only the order is known."""
    last: Array
    """``[n]`` int64 time of the last entry of each, ``NO_TIME`` without one."""


@dataclass
class GivenHistories:
    """The table, checked as it is read."""

    folder: LogFolder
    table: ParquetTable
    key: str
    """``impression`` or ``target_no``."""
    held_out: Array
    """``[N]`` bool: items that are dropped from every history, as its entries may predate their release."""
    counts: JoinCounts

    @classmethod
    def of(cls, folder: LogFolder, events: ParquetTable, held_out: Array) -> GivenHistories | None:
        """The given histories of a folder; None where it has none.

        Raises:
            SidError: no key in common with the events, or a wrong type.
        """
        table = folder.table("histories")
        if table is None:
            return None
        key = next((k for k in KEYS if k in table.names and k in events.names), None)
        if key is None:
            raise SidError(
                table.where,
                f"columns {table.names} share no key with events.parquet",
                "Give both impression or target_no.",
            )
        for name in ("history", *(["history_ts"] if "history_ts" in table.names else [])):
            _check_list(table, name, folder.text_ids)
        return cls(folder, table, key, held_out, JoinCounts())

    def typed(self, raw: Table) -> Table:
        """Columns ``given`` (position), ``key``, ``history`` and ``history_ts`` of the raw rows."""
        whole = key_kind(self.table.schema.field(self.key).type) == "integer"
        columns = {"given": raw[ROW], "key": whole_number(raw[self.key]) if whole else raw[self.key]}
        columns["history"] = raw.history
        if "history_ts" in self.table.names:
            columns["history_ts"] = raw.history_ts
        return raw.select(**columns)

    def check(self, engine: Engine, typed: Table) -> None:
        """Refuse a key that occurs twice, and any bad list.

        Raises:
            SidError: naming the key, or the row.
        """
        twice = typed.group_by("key").aggregate(times=typed.given.count(), first=typed.given.min())
        twice = twice.filter(twice.times > 1).order_by("first").limit(1)
        for batch in engine.stream(twice):
            for row in batch.to_pylist():
                found = f"{self.key} {row['key']} occurs twice"
                raise SidError(self.table.where, found, "Keep one history each.")
        for batch in engine.stream(typed.order_by("given")):
            self.counts.histories += batch.num_rows
            self._check_batch(batch)

    def wanted(self, past: Table, typed: Table) -> Table:
        """The histories that events ask for, one each bucket, in order."""
        pairs = past.select("bucket", "key").distinct()
        joined = typed.join(pairs, typed.key == pairs.key)
        return joined.select(pairs.bucket, *[typed[n] for n in typed.columns]).order_by("bucket", "given")

    def read(self, batches: Iterator[pa.RecordBatch]) -> Iterator[GivenBatch]:
        """Histories as item indices, without those held out or without an embedding."""
        for batch in batches:
            buckets = batch.column("bucket").to_numpy()
            cuts = np.flatnonzero(np.diff(buckets)) + 1
            for begin, end in zip((0, *cuts), (*cuts, len(buckets)), strict=True):
                if end > begin:
                    yield self._read(int(buckets[begin]), batch.slice(begin, end - begin))

    def _read(self, bucket: int, batch: pa.RecordBatch) -> GivenBatch:
        history = batch.column("history")
        items = self.folder.index_of(history.flatten())
        row_of = pc.list_parent_indices(history).to_numpy(zero_copy_only=False)
        ts = np.full(len(items), NO_TIME)
        if "history_ts" in batch.schema.names:
            ts = batch.column("history_ts").flatten().to_numpy(zero_copy_only=False).astype(np.int64)
        known = items >= 0
        kept = known & ~self.held_out[items]
        self.counts.entries_without_embedding += int((~known).sum())
        self.counts.entries_held_out += int((known & ~kept).sum())
        lengths = np.bincount(row_of[kept], minlength=batch.num_rows).astype(np.int64)
        ends = np.cumsum(lengths)
        last = np.full(batch.num_rows, NO_TIME)
        some = lengths > 0
        last[some] = ts[kept][ends[some] - 1]
        return GivenBatch(bucket, batch.column("key"), lengths, items[kept], ts[kept], last)

    def _check_batch(self, batch: pa.RecordBatch) -> None:
        history, first = batch.column("history"), int(batch.column("given")[0].as_py())
        where = self.table.where
        for name in ("key", "history"):
            column = batch.column(name)
            nested = name == "history" and column.flatten().null_count
            if column.null_count or nested:
                at = pc.index(column.is_null(), True).as_py()
                called = self.key if name == "key" else name
                found = f"a null in column {called!r} after row {first + max(at, 0)}"
                raise SidError(where, found, "Use an empty list for no history, and no null within one.")
        ids = history.flatten()
        row_of = pc.list_parent_indices(history).to_numpy(zero_copy_only=False)
        unknown = self.folder.index_of(ids) < 0
        bad = unknown & ~self.folder.is_bare(ids) if self.folder.drop_bare else unknown
        if bad.any():
            raise self._unknown_item(ids, bad, row_of, first)
        if "history_ts" in batch.schema.names:
            self._check_times(batch, history, row_of, first)

    def _unknown_item(self, ids: pa.Array, bad: Array, row_of: Array, first: int) -> SidError:
        at = int(np.flatnonzero(bad)[0])
        item, where = ids[at].as_py(), f"the history of row {first + int(row_of[at])}"
        same = pc.equal(ids, ids[at]).to_numpy(zero_copy_only=False)
        if item in (0, -1, "", "0") and bad.sum() == same.sum() and same.sum() > 1:
            found = f"item {item!r}, in no items.parquet, stands {int(same.sum())} times, first in {where}"
            return SidError(
                self.table.where, found, "Histories are lists of their own length: drop the padding."
            )
        return SidError(
            self.table.where,
            f"item {item} in {where} has no embedding",
            "Add one, or open the folder with missing_embedding='drop' if items.parquet knows it.",
        )

    def _check_times(self, batch: pa.RecordBatch, history: pa.Array, row_of: Array, first: int) -> None:
        ts = batch.column("history_ts")
        lengths = pc.list_value_length(history).to_numpy(zero_copy_only=False)
        where = self.table.where
        if ts.null_count or (lengths != pc.list_value_length(ts).to_numpy(zero_copy_only=False)).any():
            found = f"history_ts and history differ in length after row {first}"
            raise SidError(where, found, "Give one time an item.")
        times = ts.flatten().to_numpy(zero_copy_only=False)
        falls = (np.diff(times) < 0) & (np.diff(row_of) == 0)
        if falls.any():
            row = first + int(row_of[int(np.flatnonzero(falls)[0])])
            raise SidError(
                where, f"the history of row {row} is not sorted by time", "Order it oldest first."
            )


def refuse_future(engine: Engine, joined: Table, given: GivenHistories) -> None:
    """Refuse a given history that reaches to its event.

    Raises:
        SidError: naming it.
    """
    future = joined.filter(joined.given_last >= joined.ts).order_by("event").limit(1)
    for batch in engine.stream(future.select("key", "given_last", "ts")):
        for row in batch.to_pylist():
            raise SidError(
                given.table.where,
                f"the history of {given.key} {row['key']} reaches to ts {row['given_last']}, "
                f"its event is at {row['ts']}",
                "A history ends strictly before its event.",
            )


def _check_list(table: ParquetTable, name: str, texts: bool) -> None:
    if name not in table.names:
        raise SidError(
            table.where, f"no column {name!r} (it has {table.names})", f"Add {name!r}, a list of ids."
        )
    kind: Any = table.schema.field(name).type
    inner = kind.value_type if hasattr(kind, "value_type") else None
    wanted = is_text if texts and name == "history" else kinds.is_integer
    fits = inner is not None and (wanted(inner) or kinds.is_null(inner))
    if not fits:
        raise SidError(
            table.where, f"column {name!r} has type {kind}", "Write it as a list; see docs/data.md."
        )
