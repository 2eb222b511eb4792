"""Preparation of many events: rate, CPU time and peak memory, before and now, on DuckDB and on Spark.

`python -m apps.bench.prepare_events --events 1e7 --old CHECKOUT --json FILE`. CHECKOUT is a checkout of an
earlier commit, with its own environment in `.venv` where it has one; each preparation is a process of its
own, one after the other, on one log. `--spark` prepares on local Spark too and says whether every file is
equal; its Java process is in the wall-clock time only. `--features` adds 40 features (20 categorical, 5
multi-valued, 15 numeric) and counters to the preparations of now.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.table import Table

from torchrec_sid.artifact import write_json
from torchrec_sid.data.specification import Specification

from ..cli import wide_console

_CHUNK = 1 << 20
_OLD = """
import sys
from torchrec_sid.data import prepare
prepare(sys.argv[1], sys.argv[2])
"""
_NEW = """
import sys
from torchrec_sid.data import PrepareConfig, Specification, prepare
spec = Specification.read(sys.argv[5]) if sys.argv[5] else None
config = PrepareConfig(engine=sys.argv[3], memory=sys.argv[4], buckets=int(sys.argv[6]))
prepare(sys.argv[1], sys.argv[2], config, specification=spec)
"""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=float, default=1e7, help="rows of the log")
    parser.add_argument("--old", type=Path, help="checkout of an earlier commit")
    parser.add_argument("--spark", action="store_true", help="prepare on local Spark too")
    parser.add_argument("--features", action="store_true", help="with 40 features and counters")
    parser.add_argument("--memory", default="2GB", help="of DuckDB")
    parser.add_argument("--buckets", type=int, default=1, help="of users")
    parser.add_argument("--folder", type=Path, help="where log and results are written; default: a new one")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        rows = measure(Path(folder), int(options.events), options)
    wide_console(120).print(_table(rows))
    if options.json is not None:
        write_json(options.json, {"rows": rows})


def measure(home: Path, events: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per preparation of a log of ``events`` rows.

    Raises:
        SystemExit: a preparation failed, with its message.
    """
    specification = write_wide_log(home / "log", events, options.features)
    rows = []
    if options.old is not None:
        rows.append(_run("before", _python(options.old), options.old, _OLD, home, events, []))
    engines = ["duckdb", *(["spark"] if options.spark else [])]
    for engine in engines:
        more = [engine, options.memory, str(specification or ""), str(options.buckets)]
        rows.append(_run(engine, sys.executable, Path.cwd(), _NEW, home, events, more))
    last = rows[-1]
    if last["system"] == "spark":
        last["equal_to_duckdb"] = last["files"] == rows[-2]["files"]
    first = rows[0]
    for row in rows:
        row["equal_counts"] = row["counts"] == first["counts"]
        del row["files"]
    return rows


def write_wide_log(folder: Path, events: int, features: bool) -> Path | None:
    """A log of random events in order of time, a hundred a user; with features, its specification too."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    items, users = max(events // 500, 100), max(events // 100, 50)
    np.save(folder / "item_emb.npy", random.standard_normal((items, 16)).astype(np.float16))
    catalogue: dict[str, Any] = {"item_id": np.arange(items), "title": [f"item {i}" for i in range(items)]}
    if features:
        catalogue |= {f"kind{k}": random.integers(0, 10 ** (1 + k % 4), items) for k in range(10)}
        catalogue |= {f"size{k}": random.standard_normal(items) for k in range(10)}
        for k in range(5):
            lengths = random.integers(0, 5, items)
            flat = random.integers(0, 1000, int(lengths.sum()))
            offsets = np.append(0, np.cumsum(lengths)).astype(np.int32)
            catalogue[f"tags{k}"] = pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat))
    pq.write_table(pa.table(catalogue), folder / "items.parquet")
    writer = None
    for begin in range(0, events, _CHUNK):
        rows = min(_CHUNK, events - begin)
        chunk: dict[str, Any] = {
            # Squares of uniform numbers: some users and items have most of the events.
            "user": (random.random(rows) ** 2 * users).astype(np.int64),
            "item": (random.random(rows) ** 2 * items).astype(np.int64),
            "ts": 1_700_000_000 + np.sort(random.integers(begin, begin + rows, rows)),
            "label": random.integers(0, 2, rows).astype(np.int8),
        }
        if features:
            chunk |= {f"place{k}": random.integers(0, 10 ** (1 + k % 4), rows) for k in range(10)}
            chunk |= {f"amount{k}": random.standard_normal(rows).astype(np.float32) for k in range(5)}
        table = pa.table(chunk)
        writer = writer or pq.ParquetWriter(folder / "events.parquet", table.schema)
        writer.write_table(table)
    if writer is not None:
        writer.close()
    return _specification(folder.with_name("wide.yaml")) if features else None


def _specification(file: Path) -> Path:
    numeric = {"kind": "numeric"}
    body = {
        "features": {
            "context": {
                **{f"place{k}": {} for k in range(10)},
                **{f"amount{k}": numeric for k in range(5)},
            },
            "item": {
                **{f"kind{k}": {} for k in range(10)},
                **{f"size{k}": numeric for k in range(10)},
                **{f"tags{k}": {"multi": True} for k in range(5)},
            },
        },
        "counters": {"keys": ["item", "user"], "days": 1},
    }
    file.write_text(Specification.from_plain(body).to_yaml())
    return file


def _python(checkout: Path) -> str:
    own = checkout / ".venv" / "bin" / "python"
    return str(own) if own.is_file() else sys.executable


def _run(
    system: str, python: str, checkout: Path, program: str, home: Path, events: int, more: list[str]
) -> dict[str, Any]:
    """Prepare in a process of its own, which ``wait4`` then measures."""
    out = home / f"out-{system}"
    command = [python, "-c", program, str(home / "log"), str(out), *more]
    started = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=checkout, env=os.environ | {"PYTHONPATH": str(checkout.absolute())}
    )
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - started
    if process.returncode:
        raise SystemExit(f"{system} failed with status {process.returncode}; see its message above")
    manifest = json.loads((out / "manifest.json").read_text())
    body = manifest.get("config", manifest)
    splits = body["splits"] if "splits" in body else manifest["splits"]
    return {
        "system": system,
        "events": events,
        "seconds": seconds,
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "peak_mb": used.ru_maxrss / 1024,
        "events_per_second": events / seconds,
        "counts": {name: [counts["rows"], counts["positives"]] for name, counts in splits.items()},
        "files": manifest.get("files"),
    }


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title=f"preparation of {rows[0]['events']:,} events")
    for head in (
        "system",
        "events/s",
        "seconds",
        "CPU seconds",
        "peak MB",
        "of the first's seconds",
        "equal",
    ):
        table.add_column(head, justify="left" if head == "system" else "right")
    for row in rows:
        equal = row.get("equal_to_duckdb", row["equal_counts"])
        table.add_row(
            row["system"],
            f"{row['events_per_second']:,.0f}",
            f"{row['seconds']:.1f}",
            f"{row['cpu_seconds']:.1f}",
            f"{row['peak_mb']:,.0f}",
            f"{row['seconds'] / rows[0]['seconds']:.2f}",
            str(equal),
        )
    return table


if __name__ == "__main__":
    main()
