"""Logs as people keep them: text ids, timestamps, partitions, features, counters, against brute force."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.logs import all_examples, random_events, write_log
from tests.data.test_engines import SPECIFICATION, shop
from torchrec_sid.data import LogFolder, PrepareConfig, PreparedLog, Specification, prepare
from torchrec_sid.errors import SidError

CONFIG = PrepareConfig(block_rows=16, buckets=2, shuffle_window=0)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> PreparedLog:
    folder = tmp_path_factory.mktemp("shop")
    specification = Specification.from_plain(SPECIFICATION)
    return prepare(shop(folder / "log"), folder / "out", CONFIG, specification=specification)


def test_counters_are_of_the_strict_past(log: PreparedLog) -> None:
    examples = all_examples(log)
    genres = log.item_feature("genres")
    ends = np.cumsum(genres.lengths)  # type: ignore[union-attr]

    def of(item: int) -> set[int]:
        return set(genres.values[ends[item] - genres.lengths[item] : ends[item]].tolist())  # type: ignore[union-attr]

    assert len(examples) == 240
    for row in examples:
        earlier = [other for other in examples if other["ts"] < row["ts"]]
        item = [other for other in earlier if other["item"] == row["item"]]
        user = [other for other in earlier if other["user"] == row["user"]]
        shared = sum(len(of(o["item"]) & of(row["item"])) for o in user)
        assert row["item_events"] == pytest.approx(math.log1p(len(item)), rel=1e-6)
        liked = sum(o["label"] for o in item)
        assert row["item_label_rate"] == pytest.approx((liked + 1) / (len(item) + 2), rel=1e-6)
        assert row["user_events"] == pytest.approx(math.log1p(len(user)), rel=1e-6)
        assert row["userxgenres_events"] == pytest.approx(math.log1p(shared), rel=1e-6)


def test_features_are_rows_of_vocabularies_and_scaled_numbers(log: PreparedLog) -> None:
    devices = log.vocabulary("device").to_pylist()
    assert sorted(devices) == ["d0", "d1", "d2"]
    for row in all_examples(log):
        event = row["event"]
        expected = 0 if event % 7 == 0 else 2 + devices.index(f"d{event % 3}")
        assert row["device"] == expected
        assert (row["price"] == 0) == (event % 5 == 0)
        past = log.bucket_store(row["bucket"]).feature("history_device")
        assert len(past) >= row["hist_end"]
    assert log.dense_names[3:6] == ("item_events", "item_label_rate", "item_events_1d")
    assert log.item_keys.to_pylist()[0] == "prodükt 100"


def test_users_keep_their_bucket_and_the_store_their_events(log: PreparedLog) -> None:
    users = [set(log.bucket_store(b).user.tolist()) for b in range(2)]
    assert not users[0] & users[1]
    assert sorted(users[0] | users[1]) == list(range(len(log.user_keys)))
    assert all(row["user"] in users[row["bucket"]] for row in all_examples(log))


def plain(folder: Path, **columns: Any) -> list[dict[str, Any]]:
    """Examples of a small log with other columns."""
    events = random_events(60, times=40) | columns
    return all_examples(prepare(write_log(folder / "log", events), folder / "out", CONFIG))


def test_types_that_people_have_give_the_same_examples(tmp_path: Path) -> None:
    events = random_events(60, times=40)
    start = datetime(1970, 1, 1, tzinfo=UTC)
    moments = pa.array(
        [start + timedelta(seconds=t, microseconds=5) for t in events["ts"]], pa.timestamp("us", "UTC")
    )
    changes: dict[str, dict[str, Any]] = {
        "timestamp": {"ts": moments},
        "nanoseconds": {"ts": moments.cast(pa.timestamp("ns"))},
        "float time": {"ts": [t + 0.25 for t in events["ts"]]},
        "bool": {"label": [bool(v) for v in events["label"]]},
        "float": {"label": [float(v) for v in events["label"]]},
        "decimal": {"label": [Decimal(v) for v in events["label"]]},
        "uint64": {"user": pa.array(events["user"], pa.uint64())},
        "float rating unasked": {"rating": [0.5] * 60},
    }
    expected = plain(tmp_path / "plain")
    for name, change in changes.items():
        assert plain(tmp_path / name, **change) == expected, name


def test_ids_above_the_largest_are_refused_by_row(tmp_path: Path) -> None:
    users = pa.array([2**63 if r == 7 else 1 for r in range(60)], pa.uint64())
    with pytest.raises(SidError, match=r"user is 9223372036854775808 at row 7"):
        plain(tmp_path, user=users)


def test_one_bad_time_and_coarse_times_say_what_is_the_matter(tmp_path: Path) -> None:
    with pytest.raises(SidError, match="ts is -1 at row 0, known in 59 of 60 rows"):
        plain(tmp_path / "a", ts=[-1, *random_events(60, times=40)["ts"][1:]])
    events = random_events(60) | {"ts": [1, 2] * 30}
    del events["split"]
    with pytest.raises(SidError, match="2 different times are too coarse"):
        prepare(write_log(tmp_path / "b", events), tmp_path / "out", CONFIG)


def test_a_folder_without_embeddings_is_prepared(tmp_path: Path) -> None:
    folder = write_log(tmp_path / "log", random_events(60, times=40))
    (folder / "item_emb.npy").unlink()
    assert prepare(folder, tmp_path / "out", CONFIG).items == 20
    with pytest.raises(SidError, match="no embeddings. Add item_emb.npy"):
        LogFolder.open(folder).source()


def test_shards_of_embeddings_are_one_source(tmp_path: Path) -> None:
    folder = write_log(tmp_path / "log", random_events(60, times=40))
    vectors = np.load(folder / "item_emb.npy")
    (folder / "item_emb.npy").unlink()
    for shard, (begin, end) in enumerate(((0, 9), (9, 20))):
        ids = pa.array(range(100 + begin, 100 + end))
        columns = {"item_id": ids, "embedding": pa.array(vectors[begin:end].tolist())}
        pq.write_table(pa.table(columns), folder / f"item_emb_{shard}.parquet")
    opened = LogFolder.open(folder)
    assert opened.sources == ("content",) and len(opened) == 20
    assert np.allclose(opened.embedding_matrix(), vectors)


def test_a_folder_behind_a_uri_gives_the_same_log(tmp_path: Path) -> None:
    folder = write_log(tmp_path / "log", random_events(60, times=40))
    memory = fsspec.filesystem("memory")
    for file in folder.iterdir():
        memory.pipe_file(f"/uri-shop/{file.name}", file.read_bytes())
    here = prepare(folder, tmp_path / "here", CONFIG)
    there = prepare(LogFolder.open("memory://uri-shop"), tmp_path / "there", CONFIG)
    assert all_examples(here) == all_examples(there)


def test_padded_histories_are_called_so(tmp_path: Path) -> None:
    events = random_events(60, times=40) | {"impression": list(range(60))}
    given = {"impression": [0, 1], "history": [[100, 0, 0], [101, 102, 0]]}
    with pytest.raises(SidError, match="item 0, in no items.parquet, stands 3 times.*drop the padding"):
        prepare(write_log(tmp_path / "log", events, histories=given), tmp_path / "out", CONFIG)
