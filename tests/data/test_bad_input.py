"""Every kind of bad input: refused with its file, the value, and what to do, before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.logs import random_events, write_log
from torchrec_sid.data import LogFolder, prepare
from torchrec_sid.errors import ArtifactError, SidError

Spoil = Callable[[Path], None]


def events(**change: Any) -> Spoil:
    """Replace or remove (None) columns of events.parquet."""

    def spoil(folder: Path) -> None:
        columns = random_events(60) | change
        table = pa.table({name: values for name, values in columns.items() if values is not None})
        pq.write_table(table, folder / "events.parquet")

    return spoil


def event(row: int, **change: Any) -> Spoil:
    """Replace values of one event."""

    def spoil(folder: Path) -> None:
        columns: dict[str, list[Any]] = random_events(60)
        for name, value in change.items():
            columns[name][row] = value
        pq.write_table(pa.table(columns), folder / "events.parquet")

    return spoil


def items(**columns: Any) -> Spoil:
    return lambda folder: pq.write_table(pa.table(columns), folder / "items.parquet")


def embeddings(values: Any) -> Spoil:
    return lambda folder: np.save(folder / "item_emb.npy", values)


def embedding(row: int, value: float) -> Spoil:
    values = np.ones((20, 4), np.float16)
    values[row, 2] = value
    return embeddings(values)


def keyed(ids: list[int], column: str = "embedding", values: Any = None) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / "item_emb.npy").unlink()
        data = values if values is not None else pa.array([[1.0, 2.0]] * len(ids))
        pq.write_table(pa.table({"item_id": ids, column: data}), folder / "item_emb.parquet")

    return spoil


def truncate(name: str, keep: float = 0.6) -> Spoil:
    def spoil(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * keep)])

    return spoil


def garble(name: str) -> Spoil:
    """Overwrite the middle of a file and leave its two ends, so that it opens."""

    def spoil(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[4:200] = b"\xff" * 196
        (folder / name).write_bytes(data)

    return spoil


def remove(name: str) -> Spoil:
    return lambda folder: (folder / name).unlink()


def write(name: str, text: str) -> Spoil:
    return lambda folder: (folder / name).write_text(text) and None


def histories(**columns: Any) -> Spoil:
    """Explicit histories for the first of 60 impressions; event r is impression r."""

    def spoil(folder: Path) -> None:
        log = random_events(60) | {"impression": list(range(60)), "ts": [1_000 + 10 * r for r in range(60)]}
        log["split"] = ["train"] * 30 + ["valid"] * 15 + ["test"] * 15
        pq.write_table(pa.table(log), folder / "events.parquet")
        pq.write_table(pa.table(columns), folder / "histories.parquet")

    return spoil


IDS = list(range(100, 120))

CASES: dict[str, tuple[Spoil, str]] = {
    # Columns and types.
    "missing column": (
        events(label=None),
        r"events.parquet: no column 'label' .*Add 'label', or name its column",
    ),
    "missing item_id": (items(name=IDS), r"items.parquet: no column 'item_id'"),
    "fraction label": (events(label=[0.0, 0.5] * 30), r"label is 0.5 at row 1\. Use 0\.\.1"),
    "text label": (events(label=["yes"] * 60), r"column 'label' has type string.*Write it as integer"),
    "list user": (events(user=[["ann"]] * 60), r"column 'user' has type list"),
    "boolean time": (events(ts=[True] * 60), r"column 'ts' has type bool"),
    "no number time": (events(ts=["soon"] * 60), r"ts is soon at row 0\. Write int64 seconds"),
    "integer split": (events(split=[0] * 60), r"column 'split' has type int64.*Write it as text"),
    "text rating": (events(rating=["5"] * 60), r"column 'rating' has type string"),
    # Values.
    "label 2": (event(7, label=2), r"label is 2 at row 7\. Use 0\.\.1"),
    "null item": (event(9, item=None), r"column 'item' is null at row 9"),
    "null split": (event(9, split=None), r"column 'split' is null at row 9"),
    "milliseconds": (event(3, ts=1_700_000_000_000), r"ts is 1700000000000 at row 3.*int64 seconds"),
    "negative time": (event(3, ts=-5), r"ts is -5 at row 3"),
    "some unknown times": (event(3, ts=-1), r"ts is -1 at row 3"),
    "unknown split": (event(3, split="dev"), r"split 'dev' at row 3\. Use train, valid, test"),
    "rating 300": (events(rating=[300] * 60), r"rating is 300 at row 0\. Use 0\.\.127"),
    # Items and embeddings.
    "unknown item": (event(5, item=999), r"item 999 at row 5 is not in items.parquet\. Add it"),
    "duplicate item": (items(item_id=[*IDS[:-1], 100]), r"items.parquet: item_id 100 occurs 2 times"),
    "no items": (items(item_id=pa.array([], pa.int64())), r"items.parquet: no items"),
    "row count mismatch": (embeddings(np.ones((19, 4))), r"item_emb.npy: 19 rows for 20 items"),
    "nan": (embedding(13, np.nan), r"item_emb.npy: row 13 holds a NaN or an infinity"),
    "infinity": (embedding(2, np.inf), r"item_emb.npy: row 2 holds a NaN or an infinity"),
    "integer embeddings": (embeddings(np.ones((20, 4), np.int64)), r"item_emb.npy: dtype int64"),
    "flat embeddings": (embeddings(np.ones(20)), r"item_emb.npy: shape \(20,\)"),
    "item without embedding": (keyed(IDS[:-1]), r"item 119 at row \d+ has no embedding\. Add one"),
    "embedding of an unknown item": (keyed([*IDS, 7]), r"item_emb.parquet: item_id 7 is not in items"),
    "embedding twice": (keyed([*IDS, 100]), r"item_emb.parquet: item_id 100 occurs 2 times"),
    "embedding column": (keyed(IDS, "vector"), r"item_emb.parquet: no column 'embedding'"),
    "text embedding": (keyed(IDS, values=["x"] * 20), r"column 'embedding' has type string"),
    "ragged embedding": (
        keyed(IDS, values=[[1.0, 2.0]] * 19 + [[1.0]]),
        r"item_emb.parquet: row 19 holds 1 numbers, the first one 2",
    ),
    "hold-out group 3": (items(item_id=IDS, cold_holdout=[3] * 20), r"cold_holdout holds other values"),
    # Splits.
    "empty split": (
        events(split=["train"] * 30 + ["valid"] * 30, ts=list(range(60))),
        r"events.parquet: split 'test' has no events\. Give each split both labels",
    ),
    "one label": (
        events(
            split=["train"] * 30 + ["valid"] * 15 + ["test"] * 15,
            ts=list(range(60)),
            label=[0, 1] * 20 + [0] * 20,
        ),
        r"split 'test' has label 0 only",
    ),
    "split against time": (
        event(0, split="train", ts=99_999),
        r"train reaches to ts 99999, valid begins at",
    ),
    "no events": (
        events(**{n: pa.array([], pa.int64()) for n in random_events(1)}),
        r"events.parquet: no events",
    ),
    "one time": (events(ts=[5] * 60, split=None), r"split 'train' has no events"),
    # Files.
    "truncated events": (truncate("events.parquet"), r"events.parquet: not a complete Parquet file"),
    "truncated items": (truncate("items.parquet"), r"items.parquet: not a complete Parquet file"),
    "truncated embeddings": (truncate("item_emb.npy"), r"item_emb.npy: not a complete .npy file"),
    "empty embeddings file": (truncate("item_emb.npy", 0), r"item_emb.npy: not a complete .npy file"),
    "damaged events": (garble("events.parquet"), r"events.parquet: damaged in the middle"),
    "missing events": (remove("events.parquet"), r"events.parquet: no such file"),
    "settings": (write("dataset.json", "{"), r"dataset.json: not JSON"),
    "unknown setting": (write("dataset.json", '{"a": 1}'), r"dataset.json: holds"),
    "unknown source": (write("dataset.json", '{"default_source": "x"}'), r"no embedding source 'x'"),
    # Explicit histories.
    "history twice": (histories(impression=[0, 0], history=[[100], [101]]), r"impression 0 occurs twice"),
    "history without key": (histories(history=[[100]]), r"share no key with events.parquet"),
    "history type": (histories(impression=[0], history=[["a"]]), r"'history' has type list<.*string>"),
    "null history": (histories(impression=[0, 1], history=[[100], None]), r"a null in column 'history'"),
    "unknown history": (histories(impression=[0], history=[[100, 5]]), r"item 5 in the history of row 0"),
    "unsorted history": (
        histories(impression=[4, 5], history=[[100], [100, 101]], history_ts=[[1], [900, 800]]),
        r"histories.parquet: the history of row 1 is not sorted by time\. Order it oldest first",
    ),
    "future history": (
        histories(impression=[0, 5], history=[[100], [100, 101]], history_ts=[[1], [900, 1_060]]),
        r"history of impression 5 reaches to ts 1060, its event is at 1050",
    ),
    "present history": (
        histories(impression=[5], history=[[100]], history_ts=[[1_050]]),
        r"reaches to ts 1050, its event is at 1050\. A history ends strictly before",
    ),
    "times of another length": (
        histories(impression=[5], history=[[100, 101]], history_ts=[[900]]),
        r"history_ts and history differ in length",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_is_refused(tmp_path: Path, name: str) -> None:
    spoil, message = CASES[name]
    folder = write_log(tmp_path / "log", random_events(60))
    prepare(folder, tmp_path / "good")
    spoil(folder)
    with pytest.raises(SidError, match=message) as caught:
        prepare(folder, tmp_path / "out")
    assert caught.value.remedy.endswith(".")
    assert not (tmp_path / "out").exists()


def test_truncated_files_are_artifact_errors(tmp_path: Path) -> None:
    folder = write_log(tmp_path / "log", random_events(60))
    truncate("events.parquet")(folder)
    with pytest.raises(ArtifactError):
        LogFolder.open(folder)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(SidError, match="no such folder"):
        LogFolder.open(tmp_path / "nowhere")
    folder = write_log(tmp_path / "log", random_events(60))
    with pytest.raises(SidError, match="Choose 'error' or 'drop'"):
        LogFolder.open(folder, missing_embedding="ignore")  # type: ignore[arg-type]
    with pytest.raises(SidError, match="no embedding source 'image'"):
        LogFolder.open(folder, source="image")


def test_clockless_logs_need_order_and_split(tmp_path: Path) -> None:
    folder = write_log(tmp_path / "log", random_events(60))
    events(ts=[-1] * 60)(folder)
    with pytest.raises(SidError, match="no column 'order'"):
        prepare(folder, tmp_path / "out")
    events(ts=[-1] * 60, order=list(range(60)), split=None)(folder)
    with pytest.raises(SidError, match="no column 'split'"):
        prepare(folder, tmp_path / "out")
    events(ts=[-1] * 59 + [5], order=list(range(60)))(folder)
    with pytest.raises(SidError, match=r"ts is 5 at row 59, -1 in 59 of 60 rows\. Give all times or none"):
        prepare(folder, tmp_path / "out")
