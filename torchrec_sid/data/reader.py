"""`BatchReader`: ranking batches of a prepared log, for one rank of many."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_sid.ages import age_bucket
from torchrec_sid.data.batch import LOG_FIELDS, BatchConfig, RankingBatch
from torchrec_sid.data.blocks import BlockReader, Order
from torchrec_sid.data.encoding import Jagged, concatenated
from torchrec_sid.data.example_features import (
    Gathered,
    columns_of,
    gather,
    log_features,
    looks_up,
    number_keys,
    ranges,
    weighs_examples,
)
from torchrec_sid.data.parquet import Array
from torchrec_sid.data.prepared import PreparedLog
from torchrec_sid.errors import ArtifactError, SidError
from torchrec_sid.hashing import uniform


class BatchReader:
    """Yields the batches of one rank: a slice of the global batches, the same for every world size.

    A global batch of ``world_size * batch_size`` rows holds as many consecutive rows of every bucket of
    users, in the seeded order of its blocks, bucket by bucket; rank r takes its r-th ``batch_size`` rows,
    and reads only the buckets and blocks that hold them. So one process with batch 2B sees in each step
    what two processes with batch B see together. Every rank yields as many batches: an incomplete
    last global batch is dropped (train) or padded with weight 0, as is a bucket that ends before others.

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
        self._source.set_epoch(*self._order_args, epoch)

    @property
    def batches(self) -> int:
        """Batches of a whole epoch, the same on every rank."""
        return len(self._source)

    def __len__(self) -> int:
        """Batches that an iteration yields: those of the epoch from ``start_batch`` on."""
        return self.batches - self.start_batch

    def users(self) -> Tensor:
        """``[batches * batch_size]`` int64: the dense user index of every row that an iteration yields,
        in its order; -1 for padding."""
        return torch.from_numpy(
            np.concatenate([self._source.users(n) for n in range(self.start_batch, self.batches)])
        )

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
        further = ("request", "request_row") if self.config.by_request else ()
        rows = {name: part.pop(name) for name in (*self._source.rows, *further)}
        return RankingBatch(features=features, rows=rows, **part)


class _Piece(NamedTuple):
    """Rows of one bucket of users in a batch."""

    bucket: int
    begin: int
    """Position in the bucket's order of rows; those from the bucket's end on are padding."""
    rows: int
    """Padding included."""


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
        self.rank, self.world_size = rank, world_size
        self.seed = self.epoch = 0
        self._open()
        rows, buckets = world_size * config.batch_size, log.buckets
        if rows % buckets:
            raise SidError(
                "batch_size",
                f"{rows} over all ranks, the log has {buckets} buckets of users",
                "Choose a multiple of them.",
            )
        self.per_bucket = rows // buckets
        longest = max(log.rows(split, bucket) for bucket in range(buckets))
        self.batches = longest // self.per_bucket if drop_last else -(-longest // self.per_bucket)
        if not self.batches:
            raise SidError(
                f"batch_size of {split}",
                f"{config.batch_size} on {world_size} ranks, {log.rows(split)} rows in all",
                "Choose a smaller batch.",
            )
        self.features = tuple(name for name in config.fields if name in log_features(log))
        for name in config.fields:
            if name not in (*LOG_FIELDS, *self.features) and not name.startswith(("item_", "history_")):
                known = ", ".join((*LOG_FIELDS, *log_features(log), "item_NAME", "history_NAME"))
                raise SidError("fields", f"{name!r}", f"Choose from {known}.")
        own = {_value(name) for name in config.fields if name not in (*LOG_FIELDS, *self.features)}
        self.item_values = {name: _per_item(name, item_values, log) for name in sorted(own)}
        self.rows = tuple(name for name in config.fields if self._is_row(name))
        self.keys = tuple(name for name in config.fields if name not in self.rows)
        if not self.keys:
            raise SidError("fields", f"{config.fields} are rows", f"Ask for one of {LOG_FIELDS} as well.")
        self.numbers = number_keys(log)
        self.columns = ["item", "ts", "label", "hist_begin", "hist_end", "segment", *log.dense_names]
        self.columns += [f"label_{name}" for name in config.labels]
        self.columns += ["action"] if config.tasks else []
        self.columns += ["weight"] if weighs_examples(log) else []
        self.columns += columns_of(log, (*self.features, *self.numbers))

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, number: int) -> dict[str, Tensor] | SidError:
        if self._process != os.getpid():
            self._open()  # a forked worker opens its own files
        try:
            return _joined([self._tensors(piece) for piece in self._pieces(number)], self)
        except SidError as error:
            if torch.utils.data.get_worker_info() is None:
                raise
            return error

    def set_epoch(self, order: Order, seed: int, epoch: int) -> None:
        """Choose the shuffle, and the stream of what is dropped."""
        self.seed, self.epoch = seed, epoch
        self.order = {
            bucket: BlockReader(self.log, self.split, bucket).order(order, seed, epoch)
            for bucket in range(self.log.buckets)
        }

    def users(self, number: int) -> Array:
        """The user of each row of a batch, -1 for padding."""
        parts = []
        for piece in self._pieces(number):
            blocks = self.blocks.setdefault(piece.bucket, BlockReader(self.log, self.split, piece.bucket))
            end = min(piece.begin + piece.rows, blocks.rows)
            rows = blocks.read(self.order[piece.bucket], min(piece.begin, end), end, ["user"])
            part = np.full(piece.rows, -1, np.int64)
            part[: max(0, end - piece.begin)] = _plain(rows["user"])
            parts.append(part)
        return np.concatenate(parts)

    def _open(self) -> None:
        self.blocks: dict[int, BlockReader] = {}
        self._process = os.getpid()

    def _pieces(self, number: int) -> Iterator[_Piece]:
        """This rank's part of a global batch, which holds as many rows of every bucket, in turn."""
        size, per = self.config.batch_size, self.per_bucket
        begin, end = self.rank * size, (self.rank + 1) * size
        for bucket in range(begin // per, -(-end // per)):
            low, high = max(begin, bucket * per), min(end, (bucket + 1) * per)
            yield _Piece(bucket, number * per + low - bucket * per, high - low)

    def _tensors(self, piece: _Piece) -> dict[str, Array | Jagged]:
        """Everything of one piece by name; KJT keys as values, or with their lengths."""
        bucket, size, config = piece.bucket, piece.rows, self.config
        blocks = self.blocks.setdefault(bucket, BlockReader(self.log, self.split, bucket))
        end = min(piece.begin + size, blocks.rows)
        rows = blocks.read(self.order[bucket], min(piece.begin, end), end, self.columns)
        count = max(0, end - piece.begin)
        padded = {name: _pad(values, size) for name, values in rows.items()}
        begin, stop = _plain(padded["hist_begin"]), _plain(padded["hist_end"])
        if config.history_length is not None:
            begin = np.maximum(begin, stop - config.history_length)
        store = self.log.bucket_store(bucket)
        self._check("hist_begin", begin, 0, stop)
        self._check("hist_end", stop, 0, len(store.item))
        seen = lengths = stop - begin
        requests = None
        if config.by_request:
            requests = shared_histories(begin, stop, _plain(padded["ts"]))
            lengths = np.zeros_like(seen)
            lengths[requests.request_row] = seen[requests.request_row]
        wanted = {name for name in config.fields if name.startswith("history")}
        at = ranges(begin, lengths) if wanted else np.empty(0, np.int64)
        events = store.item[at] if wanted - {"history_action", "history_age"} else at
        if events is not at:
            self._check("history", events, 0, self.log.items - 1)
        item = _plain(padded["item"]).astype(np.int64)
        self._check("item", item, 0, self.log.items - 1)
        where = Gathered(padded, item, at, events, store)
        weights = np.zeros(size, np.float32)
        weights[:count] = _plain(rows["weight"]) if "weight" in rows else 1
        segment = np.full(size, -1, np.int64)
        segment[:count] = rows["segment"]
        out: dict[str, Array | Jagged] = {
            "dense": self._dense(where),
            "labels": self._labels(padded),
            "weights": weights,
            "segment": segment,
            "history_lengths": seen,
        }
        if requests is not None:
            out |= requests._asdict()
        ages = np.repeat(_plain(padded["ts"]), lengths)
        slots = np.arange(piece.begin, piece.begin + size)
        for name in config.fields:
            found = self._field(name, where, ages, slots, lengths)
            if name in self.keys and not isinstance(found, Jagged):
                one = lengths if name.startswith("history") else np.ones(size, np.int64)
                found = Jagged(found, one)
            out[f"field_{name}"] = found
        return out

    def _check(self, name: str, values: Array, low: Any, high: Any) -> None:
        """Refuse what would read rows of others, or none, if the log were damaged."""
        if len(values) and bool(((values < low) | (values > high)).any()):
            raise ArtifactError(
                f"{self.log.path}, {self.split}", f"{name} outside its bounds", "Prepare the log again."
            )

    def _dense(self, where: Gathered) -> Array:
        numbers = [_plain(where.columns[name]) for name in self.log.dense_names]
        numbers += [_plain(gather(self.log, key, where)) for key in self.numbers]
        return np.stack(numbers, axis=1).astype(np.float32, copy=False)

    def _labels(self, rows: dict[str, Array | Jagged]) -> Array:
        label = _plain(rows["label"]).astype(np.float32)
        further = [_plain(rows[f"label_{name}"]).astype(np.float32) for name in self.config.labels]
        further += [(_plain(rows["action"]) >= action).astype(np.float32) for action in self.config.tasks]
        return np.stack([label, *further], axis=1) if further else label

    def _field(
        self, name: str, where: Gathered, ages: Array, slots: Array, lengths: Array
    ) -> Array | Jagged:
        if name in self.features:
            found = gather(self.log, name, where)
            return _plain(found)[:, None] if name in self.rows and not _is_wide(found) else found
        if name == "item":
            return where.item
        if name == "history":
            return where.events.astype(np.int64)
        if name == "history_action":
            actions = where.store.action[where.at].astype(np.int64)
            self._check(name, actions, 0, self.log.actions - 1)
            return actions
        if name == "history_age":
            return age_bucket(ages, where.store.ts[where.at])
        of_item = name.startswith("item")
        found = self.item_values[_value(name)][where.item if of_item else where.events]
        rate, instead = self.config.dropped.get(_value(name), (0.0, 0))
        if rate:
            key = (slots, 0) if of_item else (np.repeat(slots, lengths), _positions(lengths) + 1)
            found = np.where(uniform(self.seed, self.epoch, *key) < rate, instead, found)
        return np.ascontiguousarray(found)

    def _is_row(self, name: str) -> bool:
        if name in LOG_FIELDS:
            return False
        if name in self.features:
            return not looks_up(log_features(self.log)[name])
        return self.item_values[_value(name)].ndim > 1


class SharedHistories(NamedTuple):
    """Which rows read the same history."""

    request: Array
    """``[B]`` int64: number of the history of each row, in order of its first row."""
    request_row: Array
    """``[U]`` int64: that first row."""


def shared_histories(begin: Array, end: Array, ts: Array) -> SharedHistories:
    """Rows that read the same events ``begin .. end`` at the same time ``ts``, ``[B]`` int64 each.

    Impressions of one request do. Ages of events count from the time of the row, so that rows of one user
    at two times do not share, though one history holds the other.
    """
    keys = np.stack([begin, end, ts], axis=1) * (end > begin)[:, None]  # nothing is nothing at any time
    _, first, number = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    rank = np.empty_like(first)
    rank[first.argsort()] = np.arange(len(first))
    return SharedHistories(rank[number.reshape(-1)], np.sort(first))


def _joined(pieces: list[dict[str, Array | Jagged]], source: _BatchSource) -> dict[str, Tensor]:
    """The pieces of a batch, one after the other."""
    if source.config.by_request:
        _number_on(pieces)
    whole = {name: concatenated([piece[name] for piece in pieces]) for name in pieces[0]}
    fields = {name: whole.pop(f"field_{name}") for name in source.config.fields}
    bags = [fields[name] for name in source.keys]
    out = {name: torch.from_numpy(_plain(values)) for name, values in whole.items()}
    jagged = [bag for bag in bags if isinstance(bag, Jagged)]
    out["values"] = torch.from_numpy(np.concatenate([bag.values for bag in jagged]))
    out["lengths"] = torch.from_numpy(np.concatenate([bag.lengths for bag in jagged]))
    rows = {name: torch.from_numpy(np.ascontiguousarray(_plain(fields[name]))) for name in source.rows}
    return out | rows


def _number_on(pieces: list[dict[str, Array | Jagged]]) -> None:
    """Number requests and rows of each piece after those before it."""
    requests = rows = 0
    for piece in pieces:
        of_rows, row = _plain(piece["request"]), _plain(piece["request_row"])
        piece["request"], piece["request_row"] = of_rows + requests, row + rows
        requests, rows = requests + len(row), rows + len(of_rows)


def _plain(values: Array | Jagged) -> Array:
    assert not isinstance(values, Jagged)
    return values


def _is_wide(values: Array | Jagged) -> bool:
    return not isinstance(values, Jagged) and values.ndim > 1


def _positions(lengths: Array) -> Array:
    """Place of each event in its history, the newest 0."""
    return np.repeat(np.cumsum(lengths), lengths) - np.arange(int(lengths.sum())) - 1


def _value(field: str) -> str:
    """The item's value behind ``item_NAME`` or ``history_NAME``."""
    return field.partition("_")[2]


def _pad(values: Array | Jagged, size: int) -> Array | Jagged:
    if isinstance(values, Jagged):
        return Jagged(values.values, _plain(_pad(values.lengths, size)))
    if len(values) == size:
        return np.ascontiguousarray(values)
    out = np.zeros((size, *values.shape[1:]), values.dtype)
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
