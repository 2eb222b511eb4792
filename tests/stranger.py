"""A folder as a stranger keeps it: nothing in it was made for this package."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

_BRANDS = ("Ølsen", "North & Sons", "acme", "naïve")
_THINGS = ("cotton shirt", "leather boot", "steel kettle", "oak table", "wool scarf")
_COLOURS = ("red", "green", "blue", "black", "white", "grey")


def write_stranger(folder: Path, *, items: int = 120, users: int = 60, events: int = 6_000) -> Path:
    """Text ids, timestamps in UTC, truth values, prices, brands with nulls, lists of tags, hive partitions
    by day, titles and no embedding.

    Whether something is bought depends on its kind and the user's taste: there is something to learn.
    """
    random = np.random.default_rng(5)
    kind, brand = random.integers(0, len(_THINGS), items), random.integers(0, 6, items)
    skus = [f"SKU-{number:05d}" for number in range(items)]
    price = np.round(np.exp(random.normal(3, 1, items)), 2)
    folder.mkdir(parents=True)
    catalogue = {
        "sku": skus,
        "title": [f"{_COLOURS[i % len(_COLOURS)]} {_THINGS[k]} no {i}" for i, k in enumerate(kind)],
        "brand": [_BRANDS[b] if b < len(_BRANDS) else None for b in brand],
        "price": price,
        "tags": [[_THINGS[k].split()[0], f"t{i % 7}"] if i % 5 else [] for i, k in enumerate(kind)],
    }
    pq.write_table(pa.table(catalogue), folder / "items.parquet")
    user, item = random.integers(0, users, events), random.integers(0, items, events)
    liked = (kind[item] == user % len(_THINGS)).astype(float)
    bought = random.random(events) < 0.1 + 0.6 * liked
    seconds = np.sort(random.integers(0, 20 * 86_400, events))
    start = datetime(2026, 1, 1, tzinfo=UTC)
    moments = [start + timedelta(seconds=int(s), microseconds=int(s) % 1_000_000) for s in seconds]
    days = seconds // 86_400
    log = pa.table(
        {
            "user_id": [f"user:{u:04d}" for u in user],
            "sku": [skus[i] for i in item],
            "timestamp": pa.array(moments, pa.timestamp("us", "UTC")),
            "purchased": bought,
            "device": pa.array([("phone", "web", None)[i % 3] for i in user]).dictionary_encode(),
        }
    )
    for day in np.unique(days):
        part = folder / "events" / f"day=2026-01-{day + 1:02d}"
        part.mkdir(parents=True)
        pq.write_table(log.filter(pa.array(days == day)), part / "part-0.parquet")
    return folder
