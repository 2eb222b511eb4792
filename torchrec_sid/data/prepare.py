"""From a log folder to a prepared log: histories, examples in order of time, slices, negatives.

Memory is bounded by ``bucket_rows`` and the number of items, whatever the number of events: events are
partitioned by user on disk, each bucket becomes examples, examples are partitioned by time on disk, and
each time bucket is sorted and written.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from torchrec_sid.artifact import folder_lock, whole_folder, write_json
from torchrec_sid.data.appender import NpyAppender
from torchrec_sid.data.events import SPLITS, EventReader
from torchrec_sid.data.examples import BLOCKS_PER_FILE, ExampleWriter
from torchrec_sid.data.fingerprint import InputFiles
from torchrec_sid.data.histories import DENSE, ExplicitHistories, past_of
from torchrec_sid.data.history_store import StoreWriter
from torchrec_sid.data.negatives import NegativeSampler, NegativeSampling
from torchrec_sid.data.parquet import Array
from torchrec_sid.data.partition import EVENT, EXAMPLE, Spill, TimeBuckets, hash_bucket
from torchrec_sid.data.prepared import LAYOUT_VERSION, MANIFEST, PreparedLog
from torchrec_sid.data.schema import LogFolder
from torchrec_sid.errors import SidError

SPILL = ".spill"
"""Scratch files of a preparation, inside the folder that it fills."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PrepareConfig:
    """How a log becomes examples."""

    holdout: bool = True
    """Remove the events of items with ``cold_holdout`` 1 before valid, 2 before test, where given."""
    history: Literal["all", "positives"] = "all"
    """Which past events are history: all with their action, or those with label 1."""
    action_column: str | None = None
    """Integer column that says what the user did; None: ``rating`` where there is one, else ``label``."""
    train_share: float = 0.8
    """Share of the events in train, by time, where the log names no splits."""
    valid_share: float = 0.1
    """Share in valid; the rest is test."""
    negatives: NegativeSampling | None = field(default_factory=NegativeSampling)
    """How negatives are drawn if the log has none of its own; None refuses such a log."""
    shuffle_window: int = 1 << 17
    """Training rows are permuted within windows of this many; 0 keeps the order of time."""
    block_rows: int = 256
    """Rows per block, the unit that readers read."""
    bucket_rows: int = 1 << 19
    """Events that are sorted in memory at a time (about 500 bytes each)."""
    seed: int = 0
    """Of the shuffle and the negatives."""

    def __post_init__(self) -> None:
        if not (0 < self.train_share < 1 and 0 < self.valid_share < 1 - self.train_share):
            raise SidError(
                "train_share, valid_share",
                f"{self.train_share}, {self.valid_share}",
                "Leave a share for each.",
            )
        if self.block_rows < 1 or self.bucket_rows < 1 or self.shuffle_window < 0:
            raise SidError(
                "PrepareConfig",
                f"block_rows {self.block_rows}, bucket_rows {self.bucket_rows}, "
                f"shuffle_window {self.shuffle_window}",
                "Rows are positive; a shuffle window of 0 turns it off.",
            )
        if self.history not in ("all", "positives"):
            raise SidError("history", f"{self.history!r}", "Choose 'all' or 'positives'.")


def prepare(
    folder: LogFolder | str | Path, out: str | Path, config: PrepareConfig | None = None
) -> PreparedLog:
    """Prepare a log, or reuse what is in ``out`` if it was made of the same files and configuration.

    Args:
        folder: a log in the documented format.
        out: folder to write; replaced as a whole once the new one is complete.
        config: how.

    Raises:
        SidError: the log breaks the format (each way is named in docs/data.md), or ``out`` holds
            something else.
    """
    folder = folder if isinstance(folder, LogFolder) else LogFolder.open(folder)
    config = config or PrepareConfig()
    out = Path(out)
    files = InputFiles.of(folder, out / MANIFEST)
    mark = files.fingerprint(LAYOUT_VERSION, asdict(config), folder)
    found = _reusable(out, mark)
    if found is not None:
        return found
    with folder_lock(out):
        # Another process may have made it while this one waited.
        found = _reusable(out, mark)
        if found is not None:
            return found
        with whole_folder(out, "prepared_log") as work:
            manifest = _Preparation(folder, config, work).run()
            shutil.rmtree(work / SPILL)
            write_json(work / MANIFEST, {"fingerprint": mark, **manifest, "inputs": files.entries})
    return PreparedLog.open(out)


def _reusable(out: Path, mark: str) -> PreparedLog | None:
    if not (out / MANIFEST).is_file():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise SidError(str(out), "holds something that is not a prepared log", "Choose another folder.")
        return None
    found = PreparedLog.open(out)
    if found.manifest["version"] != LAYOUT_VERSION or found.fingerprint != mark:
        return None
    _log.info("reusing the prepared log in %s", out)
    return found


class _Preparation:
    """One run: state that the passes share."""

    def __init__(self, folder: LogFolder, config: PrepareConfig, work: Path) -> None:
        self.folder, self.config = folder, config
        self.spill, self.done = work / SPILL, work
        groups = folder.cold_holdout() if config.holdout else None
        self.release = np.zeros(len(folder), np.int8) if groups is None else groups
        self.reader = EventReader(folder, config.action_column)
        self.buckets = -(-self.reader.rows // config.bucket_rows)
        self.train_events = np.zeros(len(folder), np.int64)
        self.held_out = 0
        self.store_rows = self.users = 0

    def run(self) -> dict[str, Any]:
        """All passes; returns the manifest."""
        self.folder.validate()
        with StoreWriter(self.done / "history") as store:
            events, joined = self._partition_by_user(store)
            statistics = self.reader.statistics
            sampled = statistics.positives == statistics.rows
            if sampled and self.config.negatives is None:
                raise SidError(
                    str(self.reader.path), "every label is 1", "Set negatives to a NegativeSampling."
                )
            starts = statistics.sketch.times(
                [self.config.train_share, self.config.train_share + self.config.valid_share]
            )
            buckets = statistics.sketch.boundaries(self.buckets)
            examples = self._examples(events, store, starts, buckets)
            self.store_rows = len(store)
        segment = popularity_segments(self.train_events)
        pieces = self._sorted(examples)
        if sampled:
            assert self.config.negatives is not None
            pieces = self._with_negatives(pieces, self.config.negatives)
        splits = self._write(pieces, segment)
        self._write_items(segment)
        config = asdict(self.config)
        return {
            "version": LAYOUT_VERSION,
            "config": config,
            "items": len(self.folder),
            "users": self.users,
            "events": statistics.rows,
            "history_events": self.store_rows,
            "actions": max(statistics.actions, 2),
            "dense": list(DENSE),
            "block_rows": self.config.block_rows,
            "blocks_per_file": BLOCKS_PER_FILE,
            "sampled_negatives": sampled,
            "clock": not self.reader.clockless,
            "dropped": {"held_out": self.held_out, "without_embedding": statistics.without_embedding},
            "explicit_histories": joined,
            "splits": splits,
        }

    def _partition_by_user(self, store: StoreWriter) -> tuple[Spill, dict[str, int] | None]:
        by_user = Spill(self.spill / "users", EVENT, self.buckets, self.config.bucket_rows)
        if self.reader.key is None:
            for events in self.reader:
                by_user.add(events, hash_bucket(events["user"], self.buckets))
            return by_user, None
        histories = ExplicitHistories(self.folder, self.reader.key, self.release > 0)
        keyed = Spill(self.spill / "keys", EVENT, self.buckets, self.config.bucket_rows)
        rows = histories.partition(keyed, self.spill / "histories")
        for events in self.reader:
            # Events without a key need no partner: spread them.
            keys = np.where(events["key"] < 0, events["row"], events["key"])
            keyed.add(events, hash_bucket(keys, self.buckets))
        return by_user, asdict(histories.join(keyed, rows, by_user, store))

    def _examples(
        self, by_user: Spill, store: StoreWriter, starts: list[int], buckets: TimeBuckets
    ) -> Spill:
        by_time = Spill(self.spill / "times", EXAMPLE, len(buckets), self.config.bucket_rows)
        for events in by_user.drain():
            if not self.reader.has_split:
                events["split"] = np.searchsorted(np.array(starts), events["ts"], side="right")
            kept = events["split"] >= self.release[events["item"]]
            self.held_out += int((~kept).sum())
            events = events[kept]
            if not len(events):
                continue
            examples = past_of(events, store, self.config.history == "positives")
            train = examples["item"][examples["split"] == 0]
            items, counts = np.unique(train, return_counts=True)
            self.train_events[items] += counts
            self.users += int((np.diff(examples["user"]) != 0).sum()) + 1
            by_time.add(examples, buckets(examples["ts"], examples["event"]))
        return by_time

    def _sorted(self, by_time: Spill) -> Iterator[Array]:
        for examples in filter(len, by_time.drain()):
            yield examples[np.lexsort((examples["event"], examples["ts"]))]

    def _with_negatives(self, pieces: Iterator[Array], config: NegativeSampling) -> Iterator[Array]:
        """Rows of both labels: first the whole log in order of time, then draws from its past."""
        log_items, log_ts = self.spill / "log_item.npy", self.spill / "log_ts.npy"
        with NpyAppender(log_items, np.int32) as item, NpyAppender(log_ts, np.int64) as ts:
            for number, examples in enumerate(pieces):
                item.append(examples["item"])
                ts.append(examples["ts"])
                examples.tofile(self.spill / f"piece-{number}.bin")
        sampler = NegativeSampler(
            config,
            np.load(log_items, mmap_mode="r"),
            np.load(log_ts, mmap_mode="r"),
            self.config.seed,
        )
        begin = 0
        for number in range(len(list(self.spill.glob("piece-*.bin")))):
            examples = np.fromfile(self.spill / f"piece-{number}.bin", EXAMPLE)
            drawn = sampler.draw(begin, examples["event"])
            begin += len(examples)
            negatives = examples[drawn.positive]
            negatives["item"], negatives["label"], negatives["action"] = drawn.item, 0, 0
            order = np.argsort(np.append(np.arange(len(examples)), drawn.positive), kind="stable")
            yield np.concatenate([examples, negatives])[order]

    def _write(self, pieces: Iterator[Array], segment: Array) -> dict[str, Any]:
        c = self.config
        windows = (c.shuffle_window, 0, 0)
        writers = [
            ExampleWriter(self.done / name, c.block_rows, window, c.seed)
            for name, window in zip(SPLITS, windows, strict=True)
        ]
        for examples in pieces:
            examples["segment"] = segment[examples["item"]]
            for number, writer in enumerate(writers):
                writer.add(examples[examples["split"] == number])
        for name, writer in zip(SPLITS, writers, strict=True):
            writer.close()
            if not 0 < writer.positives < writer.rows:
                label = (
                    "has no events" if not writer.rows else f"has label {int(writer.positives > 0)} only"
                )
                raise SidError(
                    str(self.reader.path), f"split {name!r} {label}", "Give each split both labels."
                )
        return {name: writer.summary() for name, writer in zip(SPLITS, writers, strict=True)}

    def _write_items(self, segment: Array) -> None:
        folder = self.done / "items"
        folder.mkdir()
        np.save(folder / "id.npy", self.folder.item_ids)
        np.save(folder / "train_events.npy", self.train_events)
        np.save(folder / "segment.npy", segment)


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
