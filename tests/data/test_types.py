"""Types and folders that people have: each gives the log of plain integers, or names a row."""

from __future__ import annotations

import io
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.logs import all_examples, random_events, write_log
from torchrec_sid.data import LogFolder, PrepareConfig, PreparedLog, prepare
from torchrec_sid.errors import SidError

ROWS, ITEMS = 120, 20
EVENTS = random_events(ROWS, times=40)
CONFIG = PrepareConfig(block_rows=16, shuffle_window=0)
START = datetime(1970, 1, 1, tzinfo=UTC)
FIELDS = ("event", "ts", "label", "history", "item", "user", "segment", "log_seconds_since_last")


def examples(log: PreparedLog) -> list[tuple[Any, ...]]:
    """What does not depend on how ids are written: dense indices, and histories as such."""
    index = {int(number): i for i, number in enumerate(log.item_ids)}
    rows = all_examples(log)
    for row in rows:
        row["history"] = [(index[item], ts, action) for item, ts, action in row["history"]]
    return [tuple(row[field] for field in FIELDS) for row in rows]


def prepared(folder: Path, *, ids: Any = None, **columns: Any) -> PreparedLog:
    """The log with other columns of events, and other ids of items."""
    write_log(folder / "log", EVENTS | columns)
    if ids is not None:
        table = pq.read_table(folder / "log" / "items.parquet").set_column(0, "item_id", ids)
        pq.write_table(table, folder / "log" / "items.parquet")
    return prepare(folder / "log", folder / "out", CONFIG)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, ...]]:
    return examples(prepared(tmp_path_factory.mktemp("plain")))


IDS: dict[str, Callable[[list[int]], Any]] = {
    "int16": lambda ids: pa.array(ids, pa.int16()),
    "uint64": lambda ids: pa.array(ids, pa.uint64()),
    "hashes": lambda ids: pa.array([i * 2**54 for i in ids], pa.uint64()),
    "whole floats": lambda ids: pa.array([float(i) for i in ids]),
    "decimals": lambda ids: pa.array([Decimal(i) for i in ids], pa.decimal128(20, 0)),
    "text": lambda ids: pa.array([f"ид {i}" for i in ids]),
    "large text": lambda ids: pa.array([f"a'b\"{i}" for i in ids], pa.large_string()),
    "dictionary": lambda ids: pa.array([f"i{i}" for i in ids]).dictionary_encode(),
    "number dictionary": lambda ids: pa.array(ids).dictionary_encode(),
}


@pytest.mark.parametrize("name", IDS)
def test_ids(tmp_path: Path, expected: list[Any], name: str) -> None:
    make = IDS[name]
    items, users = list(range(100, 100 + ITEMS)), EVENTS["user"]
    log = prepared(tmp_path, ids=make(items), item=make(EVENTS["item"]), user=make([u + 1 for u in users]))
    assert examples(log) == expected
    assert log.item_keys.to_pylist() == _plain(make(items)).to_pylist()
    assert set(log.user_keys.to_pylist()) == set(_plain(make([u + 1 for u in users])).to_pylist())


def _plain(column: pa.Array) -> pa.Array:
    plain = column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
    return (
        plain
        if pa.types.is_string(plain.type) or pa.types.is_large_string(plain.type)
        else plain.cast("int64")
    )


def moments(kind: pa.DataType) -> pa.Array:
    return pa.array([START + timedelta(seconds=t, milliseconds=7) for t in EVENTS["ts"]], kind)


TIMES: dict[str, Callable[[], Any]] = {
    "milliseconds": lambda: moments(pa.timestamp("ms")),
    "microseconds in Berlin": lambda: moments(pa.timestamp("us", "Europe/Berlin")),
    "nanoseconds in UTC": lambda: moments(pa.timestamp("ns", "UTC")),
    "float32": lambda: pa.array([float(t) for t in EVENTS["ts"]], pa.float32()),
    "uint32": lambda: pa.array(EVENTS["ts"], pa.uint32()),
    "decimals": lambda: pa.array([Decimal(t) for t in EVENTS["ts"]], pa.decimal128(12, 2)),
    "text": lambda: [f"1970-01-01 {t // 3600:02}:{t // 60 % 60:02}:{t % 60:02}" for t in EVENTS["ts"]],
    "dictionary": lambda: pa.array(TIMES["text"]()).dictionary_encode(),
}


@pytest.mark.parametrize("name", TIMES)
def test_times(tmp_path: Path, expected: list[Any], name: str) -> None:
    assert examples(prepared(tmp_path, ts=TIMES[name]())) == expected


def test_dates_are_their_midnight(tmp_path: Path) -> None:
    days = [date(2026, 1, 1) + timedelta(days=t // 10 - 100) for t in EVENTS["ts"]]
    log = prepared(tmp_path / "dates", ts=days)
    seconds = [(d - date(1970, 1, 1)).days * 86_400 for d in days]
    assert examples(log) == examples(prepared(tmp_path / "seconds", ts=seconds))


LABELS: dict[str, Callable[[list[int]], Any]] = {
    "bool": lambda y: [bool(v) for v in y],
    "float32": lambda y: pa.array([float(v) for v in y], pa.float32()),
    "uint8": lambda y: pa.array(y, pa.uint8()),
    "decimals": lambda y: pa.array([Decimal(v) for v in y], pa.decimal128(3, 1)),
    "dictionary": lambda y: pa.array(y).dictionary_encode(),
}


@pytest.mark.parametrize("name", LABELS)
def test_labels(tmp_path: Path, expected: list[Any], name: str) -> None:
    assert examples(prepared(tmp_path, label=LABELS[name](EVENTS["label"]))) == expected


def test_a_request_and_histories_by_text(tmp_path: Path) -> None:
    names = [f"anfrage {r}" for r in range(ROWS)]
    given = {"impression": [names[0], names[7]], "history": [[100, 101], [105]]}
    numbers = {"impression": [0, 7], "history": given["history"]}
    logs = []
    for folder, keys, histories in (("text", names, given), ("numbers", list(range(ROWS)), numbers)):
        write_log(tmp_path / folder, EVENTS | {"impression": keys}, histories=histories)
        logs.append(prepare(tmp_path / folder, tmp_path / f"{folder}-out", CONFIG))
    assert examples(logs[0]) == examples(logs[1])
    assert logs[0].manifest["explicit_histories"]["events"] == 2


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "item above": (
        {"item": pa.array([2**64 - 1] * ROWS, pa.uint64())},
        r"item is 18446744073709551615 at row 0",
    ),
    "fraction": ({"user": [1.5 if r == 3 else 1.0 for r in range(ROWS)]}, r"user is 1.5 at row 3"),
    "text for integers": (
        {"item": [str(i) for i in EVENTS["item"]]},
        r"'item' holds text, the ids of items.* are integers",
    ),
    "bytes": ({"user": [b"a"] * ROWS}, r"column 'user' has type binary.*integer or text"),
    "null user": ({"user": [None, *EVENTS["user"][1:]]}, r"column 'user' is null at row 0"),
    "null flag": (
        {"label": [True] * 5 + [None] + [False] * (ROWS - 6)},
        r"column 'label' is null at row 5",
    ),
    "nan label": (
        {"label": [float("nan")] + [1.0] * (ROWS - 1)},
        r"label is nan at row 0|'label' is null at row 0",
    ),
    "before 1970": ({"ts": [START - timedelta(days=1)] * ROWS}, r"ts is 1969-12-31.* at row 0"),
    "no date": ({"ts": ["2026-13-01"] * ROWS}, r"ts is 2026-13-01 at row 0"),
    "infinite time": ({"ts": [float("inf")] * ROWS}, r"ts is inf at row 0|'ts' is null at row 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_kept_is_refused_by_row(tmp_path: Path, name: str) -> None:
    columns, message = REFUSED[name]
    with pytest.raises(SidError, match=message):
        prepared(tmp_path, **columns)
    assert not (tmp_path / "out").exists()


def parts(folder: Path, names: dict[str, tuple[int, int]]) -> None:
    """Cut events.parquet into files."""
    whole = pq.read_table(folder / "events.parquet")
    (folder / "events.parquet").unlink()
    for name, (begin, end) in names.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(whole.slice(begin, end - begin), folder / name)


FOLDERS: dict[str, dict[str, tuple[int, int]]] = {
    "numbered files": {"events-00000.parquet": (0, 70), "events-00001.parquet": (70, ROWS)},
    "a folder of parts": {
        "events.parquet/part-0.parquet": (0, 1),
        "events.parquet/part-1.parquet": (1, ROWS),
    },
    "an empty part": {
        "events/a.parquet": (0, 50),
        "events/b.parquet": (50, 50),
        "events/c.parquet": (50, ROWS),
    },
    "days and hours": {
        "events/day=01/hour=1/x.parquet": (0, 30),
        "events/day=02/hour=%31/x.parquet": (30, ROWS),
    },
    "no day": {
        "events/day=1/x.parquet": (0, 9),
        "events/day=__HIVE_DEFAULT_PARTITION__/x.parquet": (9, ROWS),
    },
}


@pytest.mark.parametrize("name", FOLDERS)
def test_folders(tmp_path: Path, expected: list[Any], name: str) -> None:
    folder = write_log(tmp_path / "log", EVENTS)
    parts(folder, FOLDERS[name])
    top = folder / next(iter(FOLDERS[name])).split("/")[0]
    if top.is_dir():
        (top / "_SUCCESS").touch()
        (top / ".part-0.parquet.crc").write_bytes(b"crc")
    assert examples(prepare(folder, tmp_path / "out", CONFIG)) == expected


def test_parts_of_several_writers(tmp_path: Path, expected: list[Any]) -> None:
    folder = write_log(tmp_path / "log", EVENTS)
    parts(folder, {"events/a.parquet": (0, 60), "events/b.parquet": (60, ROWS)})
    second = pq.read_table(folder / "events" / "b.parquet")
    coded = second.column("split").combine_chunks().dictionary_encode()
    second = second.set_column(0, "user", second.column("user").cast(pa.int32())).drop_columns("split")
    pq.write_table(second.append_column("split", coded), folder / "events" / "b.parquet")
    assert examples(prepare(folder, tmp_path / "out", CONFIG)) == expected
    pq.write_table(second.append_column("split", pa.array([1] * 60)), folder / "events" / "b.parquet")
    with pytest.raises(SidError, match=r"b.parquet: column 'split' is int64, in a.parquet string"):
        prepare(folder, tmp_path / "out", CONFIG)
    pq.write_table(second, folder / "events" / "b.parquet")
    with pytest.raises(SidError, match=r"column 'split' is null at row 0 of b.parquet"):
        prepare(folder, tmp_path / "out", CONFIG)


def test_vectors_are_read_row_by_row(tmp_path: Path) -> None:
    folder = write_log(tmp_path / "log", EVENTS)
    (folder / "item_emb.npy").unlink()
    ids = list(range(100, 100 + ITEMS))
    good = [[1.0, float(i)] for i in range(ITEMS)]

    def opened(vectors: list[Any], kind: pa.DataType | None = None) -> np.ndarray[Any, Any]:
        table = pa.table({"item_id": ids, "embedding": pa.array(vectors, kind)})
        pq.write_table(table, folder / "item_emb.parquet")
        found = LogFolder.open(folder)
        found.validate()
        return np.asarray(found.embedding_matrix())

    for kind in (pa.list_(pa.float32()), pa.large_list(pa.float64()), pa.list_(pa.float32(), 2)):
        assert opened(good, kind).tolist() == good
    for bad, message in (
        ([*good[:7], None, *good[8:]], "row 7 is null"),
        ([*good[:7], [1.0], *good[8:]], "row 7 holds 1 numbers, the first one 2"),
        ([*good[:7], [1.0, None], *good[8:]], "row 7 holds a null"),
        ([*good[:7], [], *good[8:]], "row 7 holds 0 numbers"),
        ([*good[:7], [1.0, float("nan")], *good[8:]], "row 7 holds a NaN"),
    ):
        with pytest.raises(SidError, match=message):
            opened(bad)


def test_files_of_numpy_that_are_no_vectors(tmp_path: Path) -> None:
    folder = write_log(tmp_path / "log", EVENTS)
    big = np.ones((ITEMS, 2), ">f4") * np.arange(ITEMS)[:, None]
    np.save(folder / "item_emb.npy", big)
    assert np.allclose(next(iter(LogFolder.open(folder).embeddings())).numpy(), big.astype("<f4"))
    stream = io.BytesIO()
    np.save(stream, np.array([["a"]] * ITEMS, dtype=object), allow_pickle=True)
    (folder / "item_emb.npy").write_bytes(stream.getvalue())
    with pytest.raises(SidError, match=r"item_emb.npy: "):
        LogFolder.open(folder)


def test_what_is_left_out_is_in_the_manifest(tmp_path: Path) -> None:
    folder = write_log(tmp_path / "log", EVENTS, item_columns={"cold_holdout": [2] + [0] * (ITEMS - 1)})
    rows = pa.table({"item_id": list(range(100, 99 + ITEMS))})
    np.save(folder / "item_emb.npy", np.load(folder / "item_emb.npy")[:-1])
    pq.write_table(rows, folder / "item_emb_rows.parquet")
    said: list[str] = []
    log = prepare(folder, tmp_path / "out", CONFIG, progress=said.append)
    bare = EVENTS["item"].count(99 + ITEMS)
    held = sum(i == 100 and s != "test" for i, s in zip(EVENTS["item"], EVENTS["split"], strict=True))
    dropped = log.manifest["dropped"]
    assert dropped["items_without_embedding"] == 1
    assert (dropped["without_embedding"], dropped["held_out"]) == (bare, held) and bare and held
    assert {f"left out: {bare:,} without embedding", f"left out: {held:,} held out"} <= set(said)
    kept = sum(log.rows(split) for split in ("train", "valid", "test"))
    assert kept + bare + held == ROWS == log.manifest["events"] + bare
