"""Small logs for tests: write one, read examples back, and the slow truth to compare with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from torchrec_sid.data import HistoryStore, PreparedLog
from torchrec_sid.data.schema import Category

SPLITS = ("train", "valid", "test")


def write_log(
    folder: Path,
    events: Mapping[str, Sequence[Any]],
    items: int | Sequence[int] = 20,
    *,
    item_columns: Mapping[str, Sequence[Any]] | None = None,
    histories: Mapping[str, Any] | None = None,
    dim: int = 4,
) -> Path:
    """Write a folder whose item ids are 100, 101, ... unless given; ``events['item']`` are item ids."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = list(range(100, 100 + items)) if isinstance(items, int) else list(items)
    columns = {"item_id": pa.array(ids, pa.int64()), **(item_columns or {})}
    pq.write_table(pa.table(columns), folder / "items.parquet")
    random = np.random.default_rng(0)
    np.save(folder / "item_emb.npy", random.standard_normal((len(ids), dim)).astype(np.float32))
    pq.write_table(pa.table(dict(events)), folder / "events.parquet")
    if histories is not None:
        pq.write_table(pa.table(dict(histories)), folder / "histories.parquet")
    return folder


def random_events(
    rows: int, *, users: int = 7, items: int = 20, times: int = 50, seed: int = 0, split: bool = True
) -> dict[str, list[Any]]:
    """Events in random order, with many ties; splits by time at 60% and 80% of the times."""
    random = np.random.default_rng(seed)
    ts = random.integers(0, times, rows) * 10 + 1_000
    events: dict[str, list[Any]] = {
        "user": random.integers(0, users, rows).tolist(),
        "item": (random.integers(0, items, rows) + 100).tolist(),
        "ts": ts.tolist(),
        "label": random.integers(0, 2, rows).tolist(),
    }
    if split:
        cuts = [1_000 + times * 6, 1_000 + times * 8]
        events["split"] = [SPLITS[int(np.searchsorted(cuts, t, side="right"))] for t in ts]
    return events


def read_examples(log: PreparedLog, split: str) -> list[dict[str, Any]]:
    """All rows of a split in file order, each with its history as ``(item id, ts, action)`` triples."""
    users = log.user_keys.to_pylist()
    rows = []
    for bucket in range(log.buckets):
        files = sorted((log.path / split / f"{bucket:05d}").glob("*.parquet"))
        found = [row for file in files for row in pq.ParquetFile(file).read().to_pylist()]
        store = log.bucket_store(bucket)
        for row in found:
            _complete(row, log, store, users)
            row["bucket"] = bucket
        rows += found
    return rows


def _complete(row: dict[str, Any], log: PreparedLog, store: HistoryStore, users: list[Any]) -> None:
    span = slice(row["hist_begin"], row["hist_end"])
    row["history"] = list(
        zip(
            log.item_ids[store.item[span]].tolist(),
            store.ts[span].tolist(),
            store.action[span].tolist(),
            strict=True,
        )
    )
    row["item_id"] = int(log.item_ids[row["item"]])
    row["user_id"] = users[row["user"]]


def all_examples(log: PreparedLog) -> list[dict[str, Any]]:
    return [dict(row, split=split) for split in SPLITS for row in read_examples(log, split)]


def true_past(events: Mapping[str, Sequence[Any]], row: int, keep: Sequence[int]) -> list[int]:
    """Rows of the same user's events strictly before ``row``'s time, oldest first, by brute force."""
    past = [
        other
        for other in keep
        if events["user"][other] == events["user"][row] and events["ts"][other] < events["ts"][row]
    ]
    return sorted(past, key=lambda other: (events["ts"][other], other))


def true_dense(
    events: Mapping[str, Sequence[Any]], row: int, past: Sequence[int]
) -> tuple[float, float, float]:
    liked = sum(events["label"][other] for other in past)
    gap = events["ts"][row] - events["ts"][past[-1]] if past else 0
    return math.log1p(len(past)), (liked + 1) / (len(past) + 2), math.log1p(gap)


def distributions(category: Category) -> tuple[tuple[str, ...], np.ndarray[Any, Any]]:
    """The classes, and ``[N, classes]`` shares with their zeros."""
    out = np.zeros((len(category.offsets) - 1, len(category.names)), np.float32)
    owner = np.repeat(np.arange(len(out)), np.diff(category.offsets))
    out[owner, category.classes] = category.shares
    return category.names, out
