"""What a folder holds, and the specification that is guessed from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.logs import random_events, write_log
from tests.stranger import write_stranger
from torchrec_sid.data import PrepareConfig, Specification, prepare
from torchrec_sid.data.guess import Guess, guess_specification
from torchrec_sid.data.inspection import profile_folder
from torchrec_sid.data.specification import feature_key
from torchrec_sid.errors import SidError

ROWS = 600


def guess(folder: Path, items: dict[str, Any] | None = None, **columns: Any) -> Guess:
    events = random_events(ROWS, users=40, times=300) | columns
    events = {name: values for name, values in events.items() if values is not None}
    return guess_specification(profile_folder(write_log(folder / "log", events, item_columns=items)))


def plain(found: Guess, source: str) -> dict[str, Any]:
    return found.specification.to_plain().get("features", {}).get(source, {})


def test_profiles_equal_plain_counts(tmp_path: Path) -> None:
    columns = {
        "text": ["a", " ", None, "b", "a", ""],
        "real": [1.5, float("nan"), None, -2.0, 1.5, 0.0],
        "list": [["x", "y"], [], None, ["x"], ["z", "z"], ["y"]],
        "vector": [[0.0, 1.0]] * 6,
        "code": pa.array(["u", "v", None, "u", "u", "v"]).dictionary_encode(),
    }
    (tmp_path / "shop").mkdir()
    ids = {"item_id": list(range(6))}
    pq.write_table(pa.table(ids | columns), tmp_path / "shop" / "items.parquet")
    found = profile_folder(tmp_path / "shop")["items"]
    counts = {c.name: (c.values, c.missing) for c in found.columns}
    assert counts["text"] == (2, 3) and counts["real"] == (3, 2) and counts["list"] == (3, 2)
    assert counts["code"] == (2, 1) and counts["item_id"] == (6, 0)
    real = found.column("real")
    assert (real.low, real.high) == (-2.0, 1.5) and found.rows == 6 == len(found.sample)
    with pytest.raises(SidError, match="describes a log of events"):
        guess_specification({"items": found})


def test_columns_of_a_strangers_folder(tmp_path: Path) -> None:
    folder = write_stranger(tmp_path / "shop")
    found = guess_specification(profile_folder(folder))
    keys = found.specification.columns
    assert (keys.user, keys.item, keys.time, keys.item_id) == ("user_id", "sku", "timestamp", "sku")
    assert found.specification.labels[0].column == "purchased"
    assert plain(found, "item") == {"brand": {}, "price": {"kind": "numeric"}, "tags": {"multi": True}}
    assert plain(found, "context") == {"device": {}, "user_id": {}}
    assert found.left_out == {"events.day": "a time"}
    # What it says can be prepared, and survives its file.
    assert Specification.from_plain(found.specification.to_plain()) == found.specification
    log = prepare(folder, tmp_path / "out", PrepareConfig(), specification=found.specification)
    assert log.vocabulary("brand").to_pylist().count("naïve") == 1
    assert sum(log.rows(split) for split in ("train", "valid", "test")) == 6_000


def test_what_is_known_after_the_event_is_history_alone(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    label = random_events(ROWS, users=40, times=300)["label"]
    found = guess(
        tmp_path,
        is_like=random.integers(0, 2, ROWS),
        seconds=np.array(label) * 5 + random.random(ROWS),
        position=random.integers(1, 9, ROWS),
        shelf=[f"s{v}" for v in label],
    )
    assert set(plain(found, "context")) == {"position"}
    assert found.left_out["events.is_like"] == "an outcome, by its name"
    assert "AUC" in found.left_out["events.seconds"] and "AUC" in found.left_out["events.shelf"]
    assert {"is_like", "seconds", "shelf", "position"} == set(plain(found, "history"))


def test_a_log_of_positives_has_no_context(tmp_path: Path) -> None:
    found = guess(tmp_path, label=[1] * ROWS, price=np.random.default_rng(0).random(ROWS))
    assert "context" not in found.specification.to_plain().get("features", {})
    assert "negatives are sampled" in found.left_out["events.price"]


def test_kinds_of_columns(tmp_path: Path) -> None:
    n = 400
    random = np.random.default_rng(2)
    items = {
        "genres": [f"g{k % 5} | g{k % 3}" for k in range(n)],
        "year": 1950 + random.integers(0, 70, n),
        "income": np.exp(random.normal(0, 4, n)),
        "shop_id": random.integers(0, 100, n),
        "first_sold": 1_700_000_000 + random.integers(0, 10**6, n),
        "added": 20_260_101 + random.integers(0, 27, n),
        "on_sale": [bool(k % 2) for k in range(n)],
        "constant": ["x"] * n,
        "nothing": pa.nulls(n, pa.string()),
        "prose": [f"words of item {k}" for k in range(n)],
        "vector": [[1.0, float(k)] for k in range(n)],
        "2nd name!": [f"v{k % 4}" for k in range(n)],
    }
    events = random_events(ROWS, users=40, times=300, items=n)
    folder = write_log(tmp_path / "log", events, items=n, item_columns=items)
    found = guess_specification(profile_folder(folder))
    assert plain(found, "item") == {
        "genres": {"multi": True, "separator": "|"},
        "year": {"kind": "numeric"},
        "income": {"kind": "numeric", "log": True},
        "shop_id": {},
        "on_sale": {},
        "vector": {"kind": "embedding"},
        "_2nd_name_": {"column": "2nd name!"},
    }
    assert found.left_out == {
        "items.first_sold": "a time",
        "items.added": "a time",
        "items.constant": "one value",
        "items.nothing": "no values",
        "items.prose": "400 values in 400 rows: a key or prose",
    }
    assert found.specification.counters is not None
    assert found.specification.counters.keys == ("item", "user", "user x genres")


def test_ratings_without_a_label_are_cut_at_their_mean(tmp_path: Path) -> None:
    found = guess(tmp_path, label=None, rating=[1 + k % 5 for k in range(ROWS)])
    assert found.specification.labels[0].action == 3 and found.specification.columns.action == "rating"


def test_one_name_in_two_tables_gives_two_features(tmp_path: Path) -> None:
    found = guess(
        tmp_path, {"kind": [f"k{i % 3}" for i in range(20)]}, kind=[f"e{i % 4}" for i in range(ROWS)]
    )
    names = [feature_key(f) for f in found.specification.features]
    assert len(set(names)) == len(names) and {"kind", "context_kind", "history_context_kind"} == set(names)


def test_a_part_that_nothing_plays_is_named(tmp_path: Path) -> None:
    with pytest.raises(SidError, match="no column looks like label"):
        guess(tmp_path, label=None)
