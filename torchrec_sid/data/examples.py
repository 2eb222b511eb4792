"""Write the examples of a split: Parquet in small row groups, so that a batch is a few of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from torchrec_sid.data.histories import DENSE
from torchrec_sid.data.parquet import Array
from torchrec_sid.data.partition import EXAMPLE

EXAMPLE_SCHEMA = pa.schema(
    [
        ("user", pa.int64()),
        ("item", pa.int32()),
        ("ts", pa.int64()),
        ("label", pa.int8()),
        ("action", pa.int8()),
        ("hist_begin", pa.int64()),
        ("hist_end", pa.int64()),
        ("segment", pa.int8()),
        *((name, pa.float32()) for name in DENSE),
        ("event", pa.int64()),
    ]
)
"""Columns of train/, valid/ and test/; see docs/data.md."""

SEGMENTS = ("head", "torso", "tail", "cold")
"""Popularity segments by training events; ``segment`` columns and tensors hold the position here."""

BLOCKS_PER_FILE = 1024
"""Row groups per file: enough that files are few, few enough that a footer is small."""


def part_path(folder: Path, file: int) -> Path:
    """The file that holds blocks ``file * BLOCKS_PER_FILE ..`` of a split."""
    return folder / f"part-{file:05d}.parquet"


class ExampleWriter:
    """Writes one split, block by block.

    Args:
        folder: of the split.
        block_rows: rows per row group; only the split's last one may be smaller.
        shuffle_window: permute the rows within windows of this many; 0 keeps their order.
        seed: of the permutation.
    """

    def __init__(self, folder: Path, block_rows: int, shuffle_window: int = 0, seed: int = 0) -> None:
        folder.mkdir(parents=True)
        self.folder, self.block_rows = folder, block_rows
        self.shuffle_window = shuffle_window
        self.rows = self.positives = self.first_ts = self.last_ts = 0
        self.segments = np.zeros((2, 4), np.int64)  # rows, positives
        self._random = np.random.default_rng([seed, 0x73687566])
        self._window = np.empty(0, EXAMPLE)
        self._rest = np.empty(0, EXAMPLE)
        self._blocks = 0
        self._file: pq.ParquetWriter | None = None

    def add(self, examples: Array) -> None:
        """Append EXAMPLE records ``[n]`` in order of time."""
        if not len(examples):
            return
        self.first_ts = self.first_ts if self.rows else int(examples["ts"][0])
        self.last_ts = int(examples["ts"][-1])
        self.rows += len(examples)
        self.positives += int(examples["label"].sum())
        self.segments[0] += np.bincount(examples["segment"], minlength=4)
        self.segments[1] += np.bincount(examples["segment"][examples["label"] == 1], minlength=4)
        if not self.shuffle_window:
            self._write(examples)
            return
        self._window = np.concatenate([self._window, examples])
        while len(self._window) >= self.shuffle_window:
            self._flush_window(self.shuffle_window)

    def summary(self) -> dict[str, Any]:
        """Counts for the manifest."""
        segments = {
            name: {"rows": int(rows), "positives": int(positives)}
            for name, rows, positives in zip(SEGMENTS, *self.segments, strict=True)
        }
        own = ("rows", "positives", "first_ts", "last_ts")
        return {name: getattr(self, name) for name in own} | {"segments": segments}

    def close(self) -> None:
        """Write what is left."""
        self._flush_window(len(self._window))
        if len(self._rest):
            self._write_blocks(self._rest)
        if self._file is not None:
            self._file.close()

    def _flush_window(self, rows: int) -> None:
        window, self._window = self._window[:rows], self._window[rows:]
        self._write(window[self._random.permutation(len(window))])

    def _write(self, examples: Array) -> None:
        examples = np.concatenate([self._rest, examples])
        whole = len(examples) // self.block_rows * self.block_rows
        self._write_blocks(examples[:whole])
        self._rest = examples[whole:].copy()

    def _write_blocks(self, examples: Array) -> None:
        while len(examples):
            if self._blocks % BLOCKS_PER_FILE == 0:
                self._next_file()
            room = (BLOCKS_PER_FILE - self._blocks % BLOCKS_PER_FILE) * self.block_rows
            piece, examples = examples[:room], examples[room:]
            assert self._file is not None
            self._file.write_table(_table(piece), row_group_size=self.block_rows)
            self._blocks += -(-len(piece) // self.block_rows)

    def _next_file(self) -> None:
        if self._file is not None:
            self._file.close()
        path = part_path(self.folder, self._blocks // BLOCKS_PER_FILE)
        # Checksums let a reader refuse a damaged block; encodings and statistics would only cost time.
        self._file = pq.ParquetWriter(
            path,
            EXAMPLE_SCHEMA,
            compression="none",
            use_dictionary=False,
            write_statistics=False,
            write_page_checksum=True,
        )


def _table(examples: Array) -> pa.Table:
    dense = {name: examples["dense"][:, i] for i, name in enumerate(DENSE)}
    columns = [
        np.ascontiguousarray(dense[field.name] if field.name in dense else examples[field.name])
        for field in EXAMPLE_SCHEMA
    ]
    return pa.table([pa.array(c) for c in columns], schema=EXAMPLE_SCHEMA)
