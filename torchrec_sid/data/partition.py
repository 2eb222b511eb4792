"""External partitioning: records spill to one file per bucket, and a bucket fits in memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from torchrec_sid.data.parquet import Array
from torchrec_sid.hashing import hash64

EVENT = np.dtype(
    [
        ("user", "<i8"),
        ("ts", "<i8"),
        ("row", "<i8"),  # row in events.parquet: breaks ties, and traces an example back
        ("key", "<i8"),  # impression or target_no, -1 without one
        ("begin", "<i8"),  # explicit history in the store, -1 without one
        ("end", "<i8"),
        ("last", "<i8"),  # time of the explicit history's last entry, NO_TIME if unknown
        ("item", "<i4"),
        ("label", "i1"),
        ("action", "i1"),
        ("split", "i1"),
    ]
)
"""One event of the log on its way to an example."""

EXAMPLE = np.dtype(
    [
        ("user", "<i8"),
        ("ts", "<i8"),
        ("event", "<i8"),
        ("hist_begin", "<i8"),
        ("hist_end", "<i8"),
        ("item", "<i4"),
        ("dense", "<f4", (3,)),
        ("label", "i1"),
        ("action", "i1"),
        ("split", "i1"),
        ("segment", "i1"),
    ]
)
"""One row of train/, valid/ or test/."""


class Spill:
    """One append-only file of records per bucket.

    Args:
        folder: made if it is not there.
        dtype: structured dtype of the records.
        buckets: how many.
        pending_rows: records held back, so that small batches do not open a file for a few rows each.
    """

    def __init__(self, folder: Path, dtype: np.dtype[np.void], buckets: int, pending_rows: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.dtype = dtype
        self.paths = [folder / f"{bucket:05d}.bin" for bucket in range(buckets)]
        self.pending_rows = pending_rows
        self._pending: list[tuple[Array, Array]] = []
        self._held = 0

    def add(self, records: Array, bucket: Array) -> None:
        """Append ``records [n]`` to their buckets ``[n]``, keeping their order within each."""
        self._pending.append((records, bucket))
        self._held += len(records)
        if self._held >= self.pending_rows:
            self.flush()

    def flush(self) -> None:
        """Write what is pending."""
        if not self._pending:
            return
        records = np.concatenate([r for r, _ in self._pending])
        bucket = np.concatenate([b for _, b in self._pending])
        self._pending, self._held = [], 0
        order = np.argsort(bucket, kind="stable")
        ends = np.cumsum(np.bincount(bucket, minlength=len(self.paths)))
        for path, begin, end in zip(self.paths, np.append(0, ends[:-1]), ends, strict=True):
            if end > begin:
                with path.open("ab") as file:
                    file.write(records[order[begin:end]].tobytes())

    def drain(self) -> Iterator[Array]:
        """The records of each bucket in turn, empty ones too; a file is deleted once it has been read."""
        self.flush()
        for path in self.paths:
            yield np.fromfile(path, self.dtype) if path.exists() else np.empty(0, self.dtype)
            path.unlink(missing_ok=True)


def hash_bucket(keys: Array, buckets: int) -> Array:
    """Keys ``[n]`` int64 -> buckets ``[n]`` int64, hashed so that runs of ids spread evenly."""
    return (hash64(0, keys) % np.uint64(buckets)).astype(np.int64)


class TimeSketch:
    """Quantiles of the events' times in bounded memory: exact up to ``capacity`` events.

    Beyond that it keeps every 2nd, 4th, 8th, ... event of the file, always between half of
    ``capacity`` and ``capacity`` of them.
    """

    def __init__(self, capacity: int = 1 << 18) -> None:
        self.capacity = capacity
        self.stride = 1
        self._seen = 0
        self._held = 0
        self._parts: list[Array] = []

    def add(self, ts: Array, row: Array) -> None:
        """Take ``ts [n]`` and ``row [n]``, the events' rows in the file."""
        first = -self._seen % self.stride
        self._parts.append(np.stack([ts, row])[:, first :: self.stride])
        self._held += self._parts[-1].shape[1]
        self._seen += len(ts)
        while self._held > self.capacity:
            # Whole multiples of the stride stay, whatever the batches were.
            kept = np.concatenate(self._parts, axis=1)[:, ::2]
            self._parts, self._held, self.stride = [kept], kept.shape[1], 2 * self.stride

    def times(self, quantiles: list[float]) -> list[int]:
        """The time at each quantile in [0, 1)."""
        ts = np.sort(np.concatenate(self._parts, axis=1)[0])
        return [int(ts[int(q * len(ts))]) for q in quantiles]

    def boundaries(self, buckets: int) -> TimeBuckets:
        """Split the log by (time, row) into about equal buckets."""
        ts, row = np.concatenate(self._parts, axis=1)
        key = TimeKey(int(ts.min()), int(ts.max()), int(row.max()) + self.stride)
        keys = np.sort(key(ts, row))
        cuts = keys[[len(keys) * b // buckets for b in range(1, buckets)]]
        return TimeBuckets(key, cuts)


class TimeKey:
    """A (time, row) pair as one int64 that sorts the same way."""

    def __init__(self, first: int, last: int, rows: int) -> None:
        # A sketch may have missed the first and the last events: they count as one second outside.
        self.first, self.last, self.shift = first - 1, last + 1, 0
        span = self.last - self.first + 1
        while span * ((rows >> self.shift) + 1) >= 2**63:
            self.shift += 1
        self.rows = (rows >> self.shift) + 1

    def __call__(self, ts: Array, row: Array) -> Array:
        """``ts [n]``, ``row [n]`` -> keys ``[n]`` int64."""
        return (np.clip(ts, self.first, self.last) - self.first) * self.rows + (row >> self.shift)


class TimeBuckets:
    """Assigns events to buckets in order of (time, row)."""

    def __init__(self, key: TimeKey, cuts: Array) -> None:
        self.key, self.cuts = key, cuts

    def __len__(self) -> int:
        return len(self.cuts) + 1

    def __call__(self, ts: Array, row: Array) -> Array:
        """``ts [n]``, ``row [n]`` -> buckets ``[n]``, non-decreasing in (ts, row)."""
        return np.searchsorted(self.cuts, self.key(ts, row), side="right")
