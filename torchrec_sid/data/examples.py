"""Write the examples of a split: Parquet in small row groups, so that a batch is a few of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from torchrec_sid.data.parquet import Array

SEGMENTS = ("head", "torso", "tail", "cold")
"""Popularity segments by training events; ``segment`` columns and tensors hold the position here."""

SPLITS = ("train", "valid", "test")

BLOCKS_PER_FILE = 1024
"""Row groups per file: enough that files are few, few enough that a footer is small."""


def part_path(folder: Path, file: int) -> Path:
    """The file that holds blocks ``file * BLOCKS_PER_FILE ..`` of a split."""
    return folder / f"part-{file:05d}.parquet"


class ExampleWriter:
    """Writes one bucket of one split, block by block.

    Args:
        folder: of the bucket in the split.
        block_rows: rows per row group; only the last one may be smaller.
        shuffle_window: permute the rows within windows of this many, those of one ``request`` together; 0
            keeps their order.
        seed: of the permutation.
    """

    def __init__(
        self, folder: Path, block_rows: int, shuffle_window: int = 0, seed: tuple[int, ...] = (0,)
    ) -> None:
        folder.mkdir(parents=True)
        self.folder, self.block_rows = folder, block_rows
        self.shuffle_window = shuffle_window
        self.rows = 0
        self._random = np.random.default_rng(seed)
        self._window: list[pa.Table] = []
        self._held = 0
        self._rest: pa.Table | None = None
        self._blocks = 0
        self._file: pq.ParquetWriter | None = None

    def add(self, examples: pa.Table) -> None:
        """Append examples in order of time."""
        if not examples.num_rows:
            return
        self.rows += examples.num_rows
        if not self.shuffle_window:
            self._write(examples)
            return
        self._window.append(examples)
        self._held += examples.num_rows
        while self._held >= self.shuffle_window:
            self._flush_window(self.shuffle_window)

    def close(self) -> None:
        """Write what is left."""
        if self._held:
            self._flush_window(self._held)
        if self._rest is not None and self._rest.num_rows:
            self._write_blocks(self._rest)
        if self._file is not None:
            self._file.close()

    def _flush_window(self, rows: int) -> None:
        whole = pa.concat_tables(self._window)
        rest = whole.slice(rows)
        self._window, self._held = ([rest] if rest.num_rows else []), rest.num_rows
        window = whole.slice(0, rows)
        self._write(window.take(pa.array(_shuffled(window, self._random))))

    def _write(self, examples: pa.Table) -> None:
        if self._rest is not None:
            examples = pa.concat_tables([self._rest, examples])
        whole = examples.num_rows // self.block_rows * self.block_rows
        self._write_blocks(examples.slice(0, whole))
        self._rest = examples.slice(whole)

    def _write_blocks(self, examples: pa.Table) -> None:
        while examples.num_rows:
            if self._blocks % BLOCKS_PER_FILE == 0:
                self._next_file(examples.schema)
            room = (BLOCKS_PER_FILE - self._blocks % BLOCKS_PER_FILE) * self.block_rows
            piece, examples = examples.slice(0, room), examples.slice(room)
            assert self._file is not None
            self._file.write_table(piece.combine_chunks(), row_group_size=self.block_rows)
            self._blocks += -(-piece.num_rows // self.block_rows)

    def _next_file(self, schema: pa.Schema) -> None:
        if self._file is not None:
            self._file.close()
        path = part_path(self.folder, self._blocks // BLOCKS_PER_FILE)
        # Checksums let a reader refuse a damaged block; encodings and statistics would only cost time.
        self._file = pq.ParquetWriter(
            path,
            schema,
            compression="none",
            use_dictionary=False,
            write_statistics=False,
            write_page_checksum=True,
        )


def _shuffled(rows: pa.Table, random: np.random.Generator) -> Array:
    """A permutation of rows in which those of one request follow each other, as time has them."""
    if "request" not in rows.column_names:
        return random.permutation(rows.num_rows)
    user, request = (rows.column(name).to_numpy() for name in ("user", "request"))
    alone = -1 - np.arange(rows.num_rows)  # rows without a request are none together
    keys = np.stack([user, np.where(request < 0, alone, request)], axis=1)
    _, group = np.unique(keys, axis=0, return_inverse=True)
    place = random.permutation(int(group.max()) + 1)
    return np.argsort(place[group.reshape(-1)], kind="stable")


class SplitCounts:
    """Counts of one split for the manifest, over all its buckets."""

    def __init__(self) -> None:
        self.rows = self.positives = 0
        self.first_ts: int | None = None
        self.last_ts: int | None = None
        self.segments = np.zeros((2, 4), np.int64)
        self.buckets: list[int] = []

    def add(self, ts: Array, label: Array, segment: Array) -> None:
        """Take rows ``[n]``."""
        if not len(ts):
            return
        self.rows += len(ts)
        self.positives += int(label.sum())
        first, last = int(ts.min()), int(ts.max())
        self.first_ts = first if self.first_ts is None else min(self.first_ts, first)
        self.last_ts = last if self.last_ts is None else max(self.last_ts, last)
        self.segments[0] += np.bincount(segment, minlength=4)
        self.segments[1] += np.bincount(segment, label, minlength=4).astype(np.int64)

    def summary(self) -> dict[str, Any]:
        """For the manifest; ``buckets`` are the rows of each bucket."""
        segments = {
            name: {"rows": int(rows), "positives": int(positives)}
            for name, rows, positives in zip(SEGMENTS, *self.segments, strict=True)
        }
        own = {"rows": self.rows, "positives": self.positives}
        span = {"first_ts": self.first_ts or 0, "last_ts": self.last_ts or 0}
        return own | span | {"buckets": self.buckets, "segments": segments}


def popularity_segments(train_events: Array) -> Array:
    """Training events per item ``[N]`` -> segment ``[N]`` int8, a position in ``SEGMENTS``.

    Items in order of popularity: those that the first third of the events falls on are head (0), the
    second third torso (1), the last third tail (2); items without a training event are cold (3).
    """
    order = np.argsort(-train_events, kind="stable")
    counts = train_events[order]
    before = np.cumsum(counts) - counts
    segment = np.empty(len(train_events), np.int8)
    segment[order] = np.minimum(3 * before // max(int(counts.sum()), 1), 2)
    segment[train_events == 0] = 3
    return segment
