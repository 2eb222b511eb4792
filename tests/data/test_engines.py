"""Spark gives the log that DuckDB gives: ties, text ids, several files, counters, negatives."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.logs import random_events, write_log
from torchrec_sid.data import NegativeSampling, PrepareConfig, PreparedLog, Specification, prepare

SPECIFICATION = {
    "features": {
        "context": {"device": {}, "price": {"kind": "numeric", "log": True}},
        "item": {"genres": {"multi": True, "separator": ","}},
        "history": {"device": {}},
    },
    "counters": {"keys": ["item", "user", "user x genres"], "days": 1},
}


def shop(folder: Path, positives: bool = False) -> Path:
    """Text ids beyond ASCII, nulls, ties, events in two files."""
    events = random_events(240, times=40)
    random = np.random.default_rng(3)
    events["user"] = [f"näme {u}" for u in events["user"]]
    events["item"] = [f"prodükt {i}" for i in events["item"]]
    events["device"] = [None if r % 7 == 0 else f"d{r % 3}" for r in range(240)]
    events["price"] = [None if r % 5 == 0 else float(x) for r, x in enumerate(random.random(240))]
    if positives:
        events["label"] = [1] * 240
    names = [f"prodükt {i}" for i in range(100, 120)]
    write_log(folder, events, item_columns={"genres": [f"a, g{k % 4}" for k in range(20)]})
    table = pq.read_table(folder / "items.parquet").set_column(0, "item_id", pa.array(names))
    pq.write_table(table, folder / "items.parquet")
    whole = pq.read_table(folder / "events.parquet")
    (folder / "events.parquet").unlink()
    for day, begin in ((1, 0), (2, 100)):
        part = folder / "events" / f"day={day}"
        part.mkdir(parents=True)
        pq.write_table(whole.slice(begin, 100 if day == 1 else 140), part / "part-0.parquet")
    return folder


def contents(log: PreparedLog) -> dict[str, object]:
    """Every file but the manifest, floats as they are."""
    found: dict[str, object] = {}
    for file in sorted(log.path.rglob("*")):
        name = str(file.relative_to(log.path))
        if file.suffix == ".npy":
            found[name] = np.load(file).tolist()
        elif file.suffix == ".parquet":
            found[name] = pq.ParquetFile(file).read().to_pylist()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("positives", [False, True])
def test_spark_equals_duckdb(tmp_path: Path, positives: bool) -> None:
    pytest.importorskip("pyspark", reason="the extra spark is not installed")
    folder = shop(tmp_path / "log", positives)
    config = PrepareConfig(
        block_rows=16, shuffle_window=32, buckets=2, negatives=NegativeSampling(2, window=30)
    )
    spec = Specification.from_plain(SPECIFICATION)
    duck = prepare(folder, tmp_path / "duck", config, specification=spec)
    spark = prepare(folder, tmp_path / "spark", replace(config, engine="spark"), specification=spec)
    assert contents(duck) == contents(spark)
    assert duck.fingerprint == spark.fingerprint and duck.manifest == spark.manifest
    assert sum(duck.rows(split) for split in ("train", "valid", "test")) >= 240
