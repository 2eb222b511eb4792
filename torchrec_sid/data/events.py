"""The first pass over events.parquet: check every row, learn the splits, spill to buckets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from torchrec_sid.ages import NO_TIME
from torchrec_sid.data.parquet import Array, integers, open_parquet, scan, texts
from torchrec_sid.data.partition import EVENT, TimeSketch
from torchrec_sid.data.schema import EVENTS, HISTORIES, LogFolder
from torchrec_sid.errors import SidError

SPLITS = ("train", "valid", "test")

_SECONDS_LIMIT = 100_000_000_000
"""The year 5138: larger times are milliseconds."""


@dataclass
class EventStatistics:
    """What one pass over the events learns."""

    rows: int = 0
    """Events on items that have an embedding."""
    positives: int = 0
    """Those with label 1."""
    without_embedding: int = 0
    """Events left out because their item has no embedding."""
    actions: int = 0
    """Largest action + 1."""
    first: list[int] = field(default_factory=lambda: [2**62] * 3)
    """First time of each split, where the log names splits."""
    last: list[int] = field(default_factory=lambda: [-(2**62)] * 3)
    """Last time of each split."""
    sketch: TimeSketch = field(default_factory=TimeSketch)


class EventReader:
    """Streams events.parquet as checked :data:`~torchrec_sid.data.partition.EVENT` records.

    Args:
        folder: the log.
        action_column: ``label``, ``rating``, or any integer column of 0..127 that says what the user did.

    Raises:
        SidError: a missing column or a wrong type.
    """

    def __init__(self, folder: LogFolder, action_column: str | None) -> None:
        self.folder = folder
        self.path = folder.path / EVENTS
        required = dict.fromkeys(("user", "item", "ts", "label"), "integer")
        self.file = open_parquet(self.path, required)
        names = self.file.schema_arrow.names
        if not self.file.metadata.num_rows:
            raise SidError(str(self.path), "no events", "Write one row per event.")
        self.action = action_column or ("rating" if "rating" in names else "label")
        self.has_split = "split" in names
        self.key = _history_key(folder, names)
        self.clockless = self._is_clockless()
        more = {self.action: "integer"} | ({"split": "text"} if self.has_split else {})
        more |= {self.key: "integer"} if self.key else {}
        if self.clockless:
            more |= {"order": "integer", "split": "text"}
            more |= {"target_no": "integer"} if "target_no" in names else {}
        open_parquet(self.path, required | more)
        self.columns = sorted(required | more)
        self.statistics = EventStatistics()
        self._after_train = self._longest_order() if self.clockless else 0

    @property
    def rows(self) -> int:
        """Rows in the file."""
        return self.file.metadata.num_rows

    def __iter__(self) -> Iterator[Array]:
        """Batches of EVENT records, without those whose item has no embedding."""
        begin = 0
        for batch in scan(self.file, self.path, self.columns):
            events = self._records(batch, begin)
            begin += len(batch)
            kept = events["item"] >= 0
            if not kept.all():
                self.statistics.without_embedding += int((~kept).sum())
                events = events[kept]
            if len(events):
                self._learn(events)
                yield events
        if not self.statistics.rows:
            raise SidError(str(self.path), "no event on an item with an embedding", "Add embeddings.")
        if self.has_split:
            self._check_split_order()

    def _records(self, batch: pa.RecordBatch, begin: int) -> Array:
        events = np.empty(len(batch), EVENT)
        events["row"] = np.arange(begin, begin + len(batch))
        for name in ("user", "ts"):
            events[name] = integers(batch, name, self.path, begin)
        events["label"] = self._small(batch, "label", begin, 1)
        events["action"] = self._small(batch, self.action, begin, 127)
        events["item"] = self._items(integers(batch, "item", self.path, begin), begin)
        events["key"] = integers(batch, self.key, self.path, begin) if self.key else -1
        events["begin"] = events["end"] = -1
        events["last"] = NO_TIME
        events["split"] = self._splits(batch, begin) if self.has_split else -1
        if self.clockless:
            events["ts"] = self._logical_time(batch, begin, events["ts"])
        else:
            self._check_times(events["ts"], begin)
        return events

    def _learn(self, events: Array) -> None:
        s = self.statistics
        s.rows += len(events)
        s.positives += int(events["label"].sum())
        s.actions = max(s.actions, int(events["action"].max(initial=0)) + 1)
        s.sketch.add(events["ts"], events["row"])
        if self.has_split:
            for number in range(3):
                ts = events["ts"][events["split"] == number]
                s.first[number] = min(s.first[number], int(ts.min(initial=2**62)))
                s.last[number] = max(s.last[number], int(ts.max(initial=-(2**62))))

    def _small(self, batch: pa.RecordBatch, name: str, begin: int, largest: int) -> Array:
        values = integers(batch, name, self.path, begin)
        bad = (values < 0) | (values > largest)
        if bad.any():
            row = int(np.flatnonzero(bad)[0])
            raise SidError(
                str(self.path), f"{name} is {values[row]} at row {begin + row}", f"Use 0..{largest}."
            )
        return values

    def _items(self, ids: Array, begin: int) -> Array:
        index = self.folder.index(ids)
        unknown = index < 0
        if not unknown.any():
            return index
        bare = np.isin(ids, self.folder.bare_ids)
        refused = unknown if not self.folder.drop_bare else unknown & ~bare
        if refused.any():
            row = int(np.flatnonzero(refused)[0])
            why = "has no embedding" if bare[row] else "is not in items.parquet"
            remedy = (
                "Add it" if not bare[row] else "Add one, or open the folder with missing_embedding='drop'"
            )
            raise SidError(str(self.path), f"item {ids[row]} at row {begin + row} {why}", f"{remedy}.")
        return index

    def _splits(self, batch: pa.RecordBatch, begin: int) -> Array:
        encoded = texts(batch, "split", self.path, begin).dictionary_encode()
        names = encoded.dictionary.to_pylist()
        for name in names:
            if name not in SPLITS:
                raise SidError(str(self.path), f"split {name!r}", f"Use {', '.join(SPLITS)}.")
        return np.array([SPLITS.index(n) for n in names], np.int8)[encoded.indices.to_numpy()]

    def _check_times(self, ts: Array, begin: int) -> None:
        bad = (ts < 0) | (ts > _SECONDS_LIMIT)
        if bad.any():
            row = int(np.flatnonzero(bad)[0])
            raise SidError(
                str(self.path),
                f"ts is {ts[row]} at row {begin + row}",
                "Write int64 seconds since 1970, or -1 in every row where no time is known.",
            )

    def _check_split_order(self) -> None:
        s = self.statistics
        for a, b in ((0, 1), (1, 2), (0, 2)):
            if s.last[a] > s.first[b]:
                raise SidError(
                    str(self.path),
                    f"{SPLITS[a]} reaches to ts {s.last[a]}, {SPLITS[b]} begins at {s.first[b]}",
                    "Split by time, or a history shows labels of a later split; "
                    "without a split column the log is split by time quantiles.",
                )

    def _is_clockless(self) -> bool:
        first = next(scan(self.file, self.path, ["ts"], rows=1))
        return int(integers(first, "ts", self.path, 0)[0]) == -1

    def _longest_order(self) -> int:
        longest, begin = 0, 0
        for batch in scan(self.file, self.path, ["order"]):
            longest = max(longest, int(integers(batch, "order", self.path, begin).max(initial=0)))
            begin += len(batch)
        return longest + 1

    def _logical_time(self, batch: pa.RecordBatch, begin: int, ts: Array) -> Array:
        if (ts != -1).any():
            row = int(np.flatnonzero(ts != -1)[0])
            raise SidError(
                str(self.path),
                f"ts is {ts[row]} at row {begin + row}, -1 before",
                "Give all times or none.",
            )
        order = integers(batch, "order", self.path, begin)
        if "target_no" not in self.columns:
            return order
        target = integers(batch, "target_no", self.path, begin)
        return np.where(target < 0, order, self._after_train + target)


def _history_key(folder: LogFolder, names: list[str]) -> str | None:
    """The column that joins events with histories.parquet, None where there is no such file."""
    path: Path = folder.path / HISTORIES
    if not path.is_file():
        return None
    columns: list[Any] = open_parquet(path, {"history": "list of integer"}).schema_arrow.names
    for key in ("impression", "target_no"):
        if key in columns and key in names:
            return key
    raise SidError(
        str(path), f"columns {columns} share no key with {EVENTS}", "Give both impression or target_no."
    )
