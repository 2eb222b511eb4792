"""From events to examples: which past each event may see, and nothing later."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from torchrec_sid.ages import NO_TIME
from torchrec_sid.data.history_store import StoreWriter
from torchrec_sid.data.parquet import Array, integers, open_parquet, scan
from torchrec_sid.data.partition import EXAMPLE, Spill, hash_bucket
from torchrec_sid.data.schema import HISTORIES, LogFolder
from torchrec_sid.errors import SidError

DENSE = ("log_history_length", "past_positive_rate", "log_seconds_since_last")
"""The dense features of an example, all of the user's past strictly before it."""


@dataclass
class JoinCounts:
    """How many explicit histories were read, and how many events found theirs."""

    histories: int = 0
    events: int = 0
    entries_without_embedding: int = 0
    entries_held_out: int = 0


@dataclass(frozen=True)
class ExplicitHistories:
    """histories.parquet: a history per impression (or target) that is taken as it stands."""

    folder: LogFolder
    key: str
    """``impression`` or ``target_no``."""
    held_out: Array
    """``[N]`` bool: items that are dropped from every history, as its entries may predate their release."""

    @property
    def path(self) -> Path:
        """The file."""
        return self.folder.path / HISTORIES

    def partition(self, keyed: Spill, spill_rows: Path) -> Path:
        """Spill the histories by key, one Arrow file per bucket of ``keyed``.

        Raises:
            SidError: a wrong type, a null, an unknown item, ``history_ts`` of another length or unsorted.
        """
        file = open_parquet(self.path, {self.key: "integer", "history": "list of integer"})
        timed = "history_ts" in file.schema_arrow.names
        if timed:
            open_parquet(self.path, {"history_ts": "list of integer"})
        columns = [self.key, "history", *(["history_ts"] if timed else [])]
        spill_rows.mkdir()
        schema = pa.schema(
            [("key", pa.int64()), ("history", pa.list_(pa.int64())), ("ts", pa.list_(pa.int64()))]
        )
        writers = [
            pa.ipc.new_file(str(spill_rows / f"{b:05d}.arrow"), schema) for b in range(len(keyed.paths))
        ]
        begin = 0
        for batch in scan(file, self.path, columns, rows=4096):
            keys = integers(batch, self.key, self.path, begin)
            history = batch.column("history").cast(pa.list_(pa.int64()))
            ts = batch.column("history_ts").cast(pa.list_(pa.int64())) if timed else None
            self._check(history, ts, begin)
            ts = ts if ts is not None else pa.nulls(len(batch), pa.list_(pa.int64()))
            table = pa.RecordBatch.from_arrays([pa.array(keys), history, ts], schema=schema)
            bucket = hash_bucket(keys, len(writers))
            for b in np.unique(bucket):
                writers[b].write(table.take(pa.array(np.flatnonzero(bucket == b))))
            begin += len(batch)
        for writer in writers:
            writer.close()
        return spill_rows

    def _check(self, history: pa.Array, ts: pa.Array | None, begin: int) -> None:
        if history.null_count or history.values.null_count:
            raise SidError(
                str(self.path), f"a null in column 'history' after row {begin}", "Use an empty list."
            )
        ids = history.flatten().to_numpy(zero_copy_only=False)
        row_of = pc.list_parent_indices(history).to_numpy(zero_copy_only=False)
        unknown = self.folder.index(ids) < 0
        bad = unknown & ~np.isin(ids, self.folder.bare_ids) if self.folder.drop_bare else unknown
        if bad.any():
            at = int(np.flatnonzero(bad)[0])
            raise SidError(
                str(self.path),
                f"item {ids[at]} in the history of row {begin + int(row_of[at])} has no embedding",
                "Add one, or open the folder with missing_embedding='drop' if items.parquet knows it.",
            )
        if ts is None:
            return
        lengths = pc.list_value_length(history).to_numpy(zero_copy_only=False)
        if ts.null_count or (lengths != pc.list_value_length(ts).to_numpy(zero_copy_only=False)).any():
            raise SidError(
                str(self.path),
                f"history_ts and history differ in length after row {begin}",
                "Give one time an item.",
            )
        times = ts.flatten().to_numpy(zero_copy_only=False)
        falls = (np.diff(times) < 0) & (np.diff(row_of) == 0)
        if falls.any():
            row = begin + int(row_of[int(np.flatnonzero(falls)[0])])
            raise SidError(
                str(self.path), f"the history of row {row} is not sorted by time", "Order it oldest first."
            )

    def join(self, keyed: Spill, histories: Path, out: Spill, store: StoreWriter) -> JoinCounts:
        """Give the keyed events their ranges in the store and pass all events on, by user.

        Raises:
            SidError: a key twice in histories.parquet, or a history that reaches to its event or beyond.
        """
        counts = JoinCounts()
        for path, events in zip(keyed.paths, keyed.drain(), strict=True):
            table = pa.ipc.open_file(str(histories / f"{path.stem}.arrow")).read_all().combine_chunks()
            if len(table):
                self._attach(events, table, store, counts)
            out.add(events, hash_bucket(events["user"], len(out.paths)))
        return counts

    def _attach(self, events: Array, table: pa.Table, store: StoreWriter, counts: JoinCounts) -> None:
        keys = table.column("key").to_numpy()
        order = np.argsort(keys, kind="stable")
        twice = np.flatnonzero(np.diff(keys[order]) == 0)
        if len(twice):
            raise SidError(
                str(self.path), f"{self.key} {keys[order][twice[0]]} occurs twice", "Keep one history each."
            )
        history = table.column("history").combine_chunks()
        items = self.folder.index(history.flatten().to_numpy(zero_copy_only=False))
        row_of = pc.list_parent_indices(history).to_numpy(zero_copy_only=False)
        ts_lists = table.column("ts").combine_chunks()
        timed = ts_lists.null_count == 0
        ts = ts_lists.flatten().to_numpy(zero_copy_only=False) if timed else np.full(len(items), NO_TIME)
        known = items >= 0
        kept = known & ~self.held_out[items]
        counts.histories += len(keys)
        counts.entries_without_embedding += int((~known).sum())
        counts.entries_held_out += int((known & ~kept).sum())
        items, row_of, ts = items[kept], row_of[kept], ts[kept]
        begin = store.append(items, ts, np.ones(len(items), np.int8))
        ends = np.cumsum(np.bincount(row_of, minlength=len(keys)))
        starts = np.append(0, ends[:-1])

        at = order[np.minimum(np.searchsorted(keys[order], events["key"]), len(keys) - 1)]
        found = (keys[at] == events["key"]) & (events["key"] >= 0)
        counts.events += int(found.sum())
        events["begin"] = np.where(found, begin + starts[at], -1)
        events["end"] = np.where(found, begin + ends[at], -1)
        if timed and len(ts):
            filled = found & (ends[at] > starts[at])
            last = np.where(filled, ts[np.maximum(ends[at] - 1, 0)], NO_TIME)
            events["last"] = last
            future = last >= events["ts"]
            if future.any():
                bad = int(np.flatnonzero(future)[0])
                raise SidError(
                    str(self.path),
                    f"the history of {self.key} {events['key'][bad]} reaches to ts {last[bad]}, "
                    f"its event is at {events['ts'][bad]}",
                    "A history ends strictly before its event.",
                )


def past_of(events: Array, store: StoreWriter, positives_only: bool) -> Array:
    """Examples of all events of some users, with what each may know; their events join the store.

    An event's past is every event of its user strictly before its time: events at the same time are
    not history. An event with an explicit history keeps that one.

    Args:
        events: ``[n]`` EVENT records, all events of their users, in any order.
        store: takes the events, by (user, ts, row).
        positives_only: keep only events with label 1 in the store.

    Returns:
        ``[n]`` EXAMPLE records ordered by (user, ts, row).
    """
    events = events[np.lexsort((events["row"], events["ts"], events["user"]))]
    n = len(events)
    position = np.arange(n)
    new_user = np.append(True, events["user"][1:] != events["user"][:-1])
    new_time = new_user | np.append(True, events["ts"][1:] != events["ts"][:-1])
    first = np.maximum.accumulate(np.where(new_user, position, 0))
    now = np.maximum.accumulate(np.where(new_time, position, 0))

    stored = events["label"] == 1 if positives_only else np.ones(n, bool)
    base = store.append(events["item"][stored], events["ts"][stored], events["action"][stored])
    before = base + np.append(0, np.cumsum(stored))
    store.users(events["user"][new_user], before[:-1][new_user])

    positive = np.append(0, np.cumsum(events["label"]))
    seen, liked = now - first, positive[now] - positive[first]
    last = np.where(seen > 0, events["ts"][np.maximum(now - 1, 0)], NO_TIME)
    given = events["begin"] >= 0
    length = events["end"] - events["begin"]
    seen, liked = np.where(given, length, seen), np.where(given, length, liked)
    last = np.where(given, events["last"], last)

    examples = np.zeros(n, EXAMPLE)
    for name in ("user", "ts", "item", "label", "action", "split"):
        examples[name] = events[name]
    examples["event"] = events["row"]
    examples["hist_begin"] = np.where(given, events["begin"], before[first])
    examples["hist_end"] = np.where(given, events["end"], before[now])
    gap = np.where(last == NO_TIME, 0, events["ts"] - np.where(last == NO_TIME, 0, last))
    examples["dense"][:, 0] = np.log1p(seen)
    examples["dense"][:, 1] = (liked + 1) / (seen + 2)
    examples["dense"][:, 2] = np.log1p(gap)
    return examples
