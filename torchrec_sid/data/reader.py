"""`BatchReader`: ranking batches of a prepared log, for one rank of many."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_sid.ages import age_bucket
from torchrec_sid.data.batch import LOG_FIELDS, BatchConfig, RankingBatch
from torchrec_sid.data.blocks import BlockReader, Order
from torchrec_sid.data.parquet import Array
from torchrec_sid.data.prepared import PreparedLog
from torchrec_sid.errors import SidError


class BatchReader:
    """Yields the batches of one rank: a slice of the global batches, the same for every world size.

    A global batch is ``world_size * batch_size`` consecutive rows of the seeded sequence of blocks; rank
    r takes its r-th ``batch_size`` rows, and reads only the blocks that hold them. So one process with
    batch 2B sees in each step what two processes with batch B see together. Every rank yields the same
    number of batches: an incomplete last global batch is dropped (train) or padded with weight 0.

    Args:
        log: a prepared log.
        split: ``train``, ``valid`` or ``test``.
        config: what a batch holds.
        rank, world_size: of this process.
        order: ``time``, or ``shuffled`` blocks.
        seed: of the shuffle.
        epoch: of the shuffle; see also :meth:`set_epoch`.
        start_batch: batches to skip, by arithmetic, when a run resumes.
        drop_last: None drops in train and pads elsewhere.
        item_values: NAME -> ``[N, ...]``, a value of every dense item index, for the fields
            ``item_NAME`` and ``history_NAME``: ``[N]`` int64 rides in the KeyedJaggedTensor, ``[N, ...]``
            in ``rows``.
        workers: processes that read ahead; 0 reads in this one. The batches are the same.
        pin_memory: yield batches in page-locked memory.

    Raises:
        SidError: a rank outside the world, an unknown split, a field whose values are missing.

    Example:
        >>> reader = BatchReader(log, "train", BatchConfig(batch_size=512))  # doctest: +SKIP
        >>> for batch in reader: model(batch)  # doctest: +SKIP
    """

    def __init__(
        self,
        log: PreparedLog,
        split: str,
        config: BatchConfig,
        *,
        rank: int = 0,
        world_size: int = 1,
        order: Order = "time",
        seed: int = 0,
        epoch: int = 0,
        start_batch: int = 0,
        drop_last: bool | None = None,
        item_values: Mapping[str, Array | Tensor] | None = None,
        workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        if not 0 <= rank < world_size:
            raise SidError("rank", f"{rank} of {world_size}", "Ranks are 0..world_size-1.")
        self.config, self.start_batch = config, start_batch
        self.workers, self.pin_memory = workers, pin_memory
        self._order_args: tuple[Order, int] = (order, seed)
        drop = split == "train" if drop_last is None else drop_last
        self._source = _BatchSource(log, split, config, rank, world_size, drop, item_values or {})
        if not 0 <= start_batch <= len(self._source):
            raise SidError("start_batch", f"{start_batch}", f"The epoch has {len(self._source)} batches.")
        self.set_epoch(epoch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose shuffle the next iteration uses."""
        self._source.order = self._source.blocks.order(*self._order_args, epoch)

    @property
    def batches(self) -> int:
        """Batches of a whole epoch, the same on every rank."""
        return len(self._source)

    def __len__(self) -> int:
        """Batches that an iteration yields: those of the epoch from ``start_batch`` on."""
        return self.batches - self.start_batch

    def __iter__(self) -> Iterator[RankingBatch]:
        todo = range(self.start_batch, self.batches)
        parts: Any = map(self._source.__getitem__, todo)
        if self.workers:
            parts = DataLoader(self._source, batch_size=None, sampler=todo, num_workers=self.workers)
        for part in parts:
            if isinstance(part, SidError):
                raise part
            batch = self._batch(part)
            yield batch.pin_memory() if self.pin_memory else batch

    def _batch(self, part: dict[str, Tensor]) -> RankingBatch:
        keys = list(self._source.keys)
        features = KeyedJaggedTensor(keys=keys, values=part.pop("values"), lengths=part.pop("lengths"))
        rows = {name: part.pop(name) for name in self._source.rows}
        return RankingBatch(features=features, rows=rows, **part)


class _BatchSource(Dataset[Any]):
    """Batch number -> tensors; what a worker process runs."""

    def __init__(
        self,
        log: PreparedLog,
        split: str,
        config: BatchConfig,
        rank: int,
        world_size: int,
        drop_last: bool,
        item_values: Mapping[str, Array | Tensor],
    ) -> None:
        self.log, self.split, self.config = log, split, config
        self.blocks = BlockReader(log, split)
        self.order: Array = np.arange(self.blocks.blocks)
        self.rank, self.world_size = rank, world_size
        rows = world_size * config.batch_size
        self.batches = self.blocks.rows // rows if drop_last else -(-self.blocks.rows // rows)
        if not self.batches:
            raise SidError(
                f"batch_size of {split}",
                f"{config.batch_size} on {world_size} ranks, {self.blocks.rows} rows in all",
                "Choose a smaller batch.",
            )
        self.item_values = {name: _per_item(name, item_values, log) for name in config.item_values}
        self.rows = tuple(name for name in config.fields if self._is_row(name))
        self.keys = tuple(name for name in config.fields if name not in self.rows)
        if not self.keys:
            raise SidError("fields", f"{config.fields} are rows", f"Ask for one of {LOG_FIELDS} as well.")
        self.columns = ["item", "ts", "label", "hist_begin", "hist_end", "segment", *log.dense_names]
        self.columns += ["action"] if config.tasks else []
        self._process = os.getpid()

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, number: int) -> dict[str, Tensor] | SidError:
        if self._process != os.getpid():
            # A forked worker opens its own files.
            self.blocks, self._process = BlockReader(self.log, self.split), os.getpid()
        begin = (number * self.world_size + self.rank) * self.config.batch_size
        end = min(begin + self.config.batch_size, self.blocks.rows)
        try:
            rows = self.blocks.read(self.order, min(begin, end), end, self.columns)
            return self._tensors(rows)
        except SidError as error:
            if torch.utils.data.get_worker_info() is None:
                raise
            return error

    def _tensors(self, rows: dict[str, Array]) -> dict[str, Tensor]:
        size = self.config.batch_size
        dense = np.stack([rows[name] for name in self.log.dense_names], axis=1)
        item = _pad(rows["item"].astype(np.int64), size)
        begin, end = _pad(rows["hist_begin"], size), _pad(rows["hist_end"], size)
        if self.config.history_length is not None:
            begin = np.maximum(begin, end - self.config.history_length)
        lengths = end - begin
        out = {
            "dense": torch.from_numpy(_pad(dense, size)),
            "labels": torch.from_numpy(_pad(self._labels(rows), size)),
            "weights": torch.from_numpy(_pad(np.ones(len(rows["label"]), np.float32), size)),
            "segment": torch.from_numpy(_pad(rows["segment"].astype(np.int64), size, -1)),
            "history_lengths": torch.from_numpy(lengths),
        }
        wanted = {name for name in self.config.fields if name.startswith("history")}
        at = ranges(begin, lengths) if wanted else np.empty(0, np.int64)
        events = self.log.store.item[at] if wanted - {"history_action", "history_age"} else at
        values: dict[str, Array] = {}
        for name in self.keys:
            values[name] = self._values(name, item, events, at, _pad(rows["ts"], size), lengths)
        out["values"] = torch.from_numpy(np.concatenate(list(values.values())))
        one = np.ones(size, np.int64)
        all_lengths = [lengths if name.startswith("history") else one for name in values]
        out["lengths"] = torch.from_numpy(np.concatenate(all_lengths))
        for name in self.rows:
            index = item if name.startswith("item") else events
            out[name] = torch.from_numpy(np.ascontiguousarray(self.item_values[_value(name)][index]))
        return out

    def _labels(self, rows: dict[str, Array]) -> Array:
        label: Array = rows["label"].astype(np.float32)
        if not self.config.tasks:
            return label
        further = [(rows["action"] >= action).astype(np.float32) for action in self.config.tasks]
        return np.stack([label, *further], axis=1)

    def _values(self, name: str, item: Array, events: Array, at: Array, ts: Array, lengths: Array) -> Array:
        """int64 values of one KJT key."""
        store = self.log.store
        if name == "item":
            return item
        if name == "history":
            return events.astype(np.int64)
        if name == "history_action":
            return store.action[at].astype(np.int64)
        if name == "history_age":
            return age_bucket(np.repeat(ts, lengths), store.ts[at])
        return self.item_values[_value(name)][item if name.startswith("item") else events]

    def _is_row(self, name: str) -> bool:
        if name in LOG_FIELDS:
            return False
        return self.item_values[_value(name)].ndim > 1


def _value(field: str) -> str:
    """The item's value behind ``item_NAME`` or ``history_NAME``."""
    return field.partition("_")[2]


def ranges(begin: Array, lengths: Array) -> Array:
    """All positions ``begin[i] .. begin[i] + lengths[i]`` in turn: two ``[B]`` int64 -> ``[sum]`` int64."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(begin - before, lengths) + np.arange(int(lengths.sum()))


def _pad(values: Array, size: int, fill: int = 0) -> Array:
    if len(values) == size:
        return np.ascontiguousarray(values)
    out = np.full((size, *values.shape[1:]), fill, values.dtype)
    out[: len(values)] = values
    return out


def _per_item(name: str, values: Mapping[str, Array | Tensor], log: PreparedLog) -> Array:
    """The value of a name, one row per item of the log."""
    if name not in values:
        raise SidError(f"item value {name!r}", "missing, but fields ask for it", "Pass it in item_values.")
    found = values[name]
    array: Array = found.numpy() if isinstance(found, Tensor) else found
    if not array.ndim or len(array) != log.items or (array.ndim == 1 and array.dtype != np.int64):
        raise SidError(
            f"item value {name!r}",
            f"shape {array.shape}, dtype {array.dtype}",
            f"Pass {log.items} rows, one for each item of the log: int64 [N], or [N, ...] of any dtype.",
        )
    return array
