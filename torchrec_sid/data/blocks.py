"""Read the examples of a split by position in a seeded order of blocks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from torchrec_sid.data.encoding import Jagged
from torchrec_sid.data.examples import BLOCKS_PER_FILE, part_path
from torchrec_sid.data.parquet import Array
from torchrec_sid.data.prepared import PreparedLog, bucket_name
from torchrec_sid.errors import ArtifactError, SidError

Order = Literal["time", "shuffled"]

_OPEN_FILES = 8


class BlockReader:
    """Reads rows of a split, block by block; a block is one Parquet row group.

    Args:
        log: the prepared log.
        split: ``train``, ``valid`` or ``test``.
        bucket: of users.
    """

    def __init__(self, log: PreparedLog, split: str, bucket: int = 0) -> None:
        self.folder: Path = log.path / log.check_split(split) / bucket_name(bucket)
        self.rows = log.rows(split, bucket)
        self.floats = log.dense_names
        self.block_rows = log.block_rows
        self.blocks = -(-self.rows // self.block_rows)
        self._open: OrderedDict[int, pq.ParquetFile] = OrderedDict()

    def order(self, order: Order, seed: int, epoch: int) -> Array:
        """``[blocks]`` int64: the blocks of an epoch in the order in which they are read.

        ``shuffled`` permutes the files and then the blocks within each run of 8 files, so that a file is
        opened once an epoch. A last block that is not full stays last, so that every position in the
        order is known by arithmetic.
        """
        if order == "time":
            return np.arange(self.blocks)
        if order != "shuffled":
            raise SidError("order", f"{order!r}", "Choose 'time' or 'shuffled'.")
        random = np.random.default_rng([seed, epoch, 0x626C6F])
        full = self.rows // self.block_rows
        files = random.permutation(-(-full // BLOCKS_PER_FILE))
        parts = [np.empty(0, np.int64)]
        for begin in range(0, len(files), _OPEN_FILES):
            starts = files[begin : begin + _OPEN_FILES] * BLOCKS_PER_FILE
            blocks = (starts[:, None] + np.arange(BLOCKS_PER_FILE)).ravel()
            parts.append(random.permutation(blocks[blocks < full]))
        return np.concatenate([*parts, np.arange(full, self.blocks)])

    def read(self, order: Array, begin: int, end: int, columns: Sequence[str]) -> dict[str, Array | Jagged]:
        """Rows ``begin .. end`` of the sequence of blocks ``order``, column by column.

        Raises:
            ArtifactError: a block is missing or damaged.
        """
        first, last = begin // self.block_rows, -(-end // self.block_rows)
        tables = [self._block(int(block), columns) for block in order[first:last]]
        if not tables and not self.blocks:
            return {name: np.empty(0, np.float32 if name in self.floats else np.int64) for name in columns}
        table = pa.concat_tables(tables) if tables else self._block(0, columns)
        table = table.slice(begin - first * self.block_rows, end - begin)
        return {name: column_values(table.column(name)) for name in columns}

    def _block(self, block: int, columns: Sequence[str]) -> pa.Table:
        number, group = divmod(block, BLOCKS_PER_FILE)
        path = part_path(self.folder, number)
        try:
            table = self._file(number, path).read_row_group(group, columns=columns, use_threads=False)
        except (pa.ArrowException, OSError, IndexError) as error:
            raise ArtifactError(
                str(path), f"block {group} cannot be read ({error})", "Prepare the log again."
            ) from error
        missing = [name for name in columns if name not in table.column_names]
        if missing:
            raise ArtifactError(str(path), f"has no column {missing[0]!r}", "Prepare the log again.")
        return table

    def _file(self, number: int, path: Path) -> pq.ParquetFile:
        if number in self._open:
            self._open.move_to_end(number)
        else:
            self._open[number] = pq.ParquetFile(path, page_checksum_verification=True, pre_buffer=False)
            if len(self._open) > _OPEN_FILES:
                self._open.popitem(last=False)[1].close()
        return self._open[number]


def column_values(column: pa.ChunkedArray) -> Array | Jagged:
    """A column of examples: numbers, vectors ``[n, d]``, or several values a row."""
    if pa.types.is_fixed_size_list(column.type):
        flat = column.combine_chunks().flatten().to_numpy()
        return np.asarray(flat).reshape(len(column), column.type.list_size)
    if pa.types.is_list(column.type):
        whole = column.combine_chunks()
        return Jagged(whole.flatten().to_numpy(), pc.list_value_length(whole).to_numpy().astype(np.int64))
    return np.asarray(column.to_numpy())
