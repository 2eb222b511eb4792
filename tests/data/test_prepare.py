"""Preparation against brute force, every option, caching and atomicity."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.logs import (
    SPLITS,
    all_examples,
    random_events,
    read_examples,
    true_dense,
    true_past,
    write_log,
)
from torchrec_sid.data import NegativeSampling, PrepareConfig, PreparedLog, prepare
from torchrec_sid.data.examples import popularity_segments
from torchrec_sid.data.prepared import MANIFEST
from torchrec_sid.errors import ArtifactError, SidError

PLAIN = PrepareConfig(shuffle_window=0, block_rows=8)


@settings(max_examples=12)
@given(st.integers(0, 10_000), st.sampled_from([1, 2, 8]))
def test_equals_brute_force(tmp_path_factory: pytest.TempPathFactory, seed: int, buckets: int) -> None:
    folder = tmp_path_factory.mktemp("log")
    events = random_events(150, seed=seed)
    log = prepare(write_log(folder / "log", events), folder / "out", replace(PLAIN, buckets=buckets))
    examples = all_examples(log)
    assert sorted(row["event"] for row in examples) == list(range(150))
    everything = range(150)
    for row in examples:
        event = row["event"]
        past = true_past(events, event, everything)
        assert row["history"] == [(events["item"][p], events["ts"][p], events["label"][p]) for p in past]
        assert row["split"] == events["split"][event]
        for name in ("user_id", "ts", "label"):
            assert row[name] == events[name.removesuffix("_id")][event]
        assert row["item_id"] == events["item"][event]
        dense = [row[name] for name in log.dense_names]
        assert dense == pytest.approx(true_dense(events, event, past), rel=1e-5)
    for split in SPLITS:
        order = [(row["bucket"], row["ts"], row["event"]) for row in read_examples(log, split)]
        assert order == sorted(order)
    shutil.rmtree(folder)


def test_users_of_the_store_own_their_ranges(tmp_path: Path) -> None:
    events = random_events(200)
    log = prepare(write_log(tmp_path / "log", events), tmp_path / "out", PLAIN)
    store, own = log.store, log.user_keys.to_pylist()
    assert own == list(dict.fromkeys(events["user"])), "in the order of their first rows"
    assert store.user.tolist() == list(range(len(own)))
    for k, user in enumerate(own):
        mine = sorted(
            (t, r) for r, (u, t) in enumerate(zip(events["user"], events["ts"], strict=True)) if u == user
        )
        span = slice(int(store.offsets[k]), int(store.offsets[k + 1]))
        assert (store.item[span] + 100).tolist() == [events["item"][r] for _, r in mine]


def test_splits_by_time_quantiles_without_a_split_column(tmp_path: Path) -> None:
    events = random_events(1_000, times=700, split=False)
    folder = write_log(tmp_path / "log", events)
    log = prepare(folder, tmp_path / "a", PLAIN)
    assert [log.rows(s) for s in SPLITS] == pytest.approx([800, 100, 100], abs=5)
    m = log.manifest["splits"]
    assert m["train"]["last_ts"] < m["valid"]["first_ts"] <= m["valid"]["last_ts"] < m["test"]["first_ts"]
    other = prepare(folder, tmp_path / "b", replace(PLAIN, train_share=0.5, valid_share=0.3))
    assert [other.rows(s) for s in SPLITS] == pytest.approx([500, 300, 200], abs=5)


def test_holdout_removes_items_until_their_release(tmp_path: Path) -> None:
    events = random_events(600)
    groups = [i % 3 for i in range(20)]
    folder = write_log(tmp_path / "log", events, item_columns={"cold_holdout": np.array(groups, np.int8)})
    log = prepare(folder, tmp_path / "out", PLAIN)
    kept = [r for r in range(600) if SPLITS.index(events["split"][r]) >= groups[events["item"][r] - 100]]
    examples = all_examples(log)
    assert sorted(row["event"] for row in examples) == kept
    for row in examples:
        past = true_past(events, row["event"], kept)
        assert [h[0] for h in row["history"]] == [events["item"][p] for p in past]
    assert log.manifest["dropped"]["held_out"] == 600 - len(kept)
    cold = {row["item_id"] for row in examples if row["segment"] == 3}
    assert cold == {row["item_id"] for row in examples if groups[row["item_id"] - 100] > 0}

    without = prepare(folder, tmp_path / "b", replace(PLAIN, holdout=False))
    assert sum(without.rows(s) for s in SPLITS) == 600


def test_history_of_positives_only(tmp_path: Path) -> None:
    events = random_events(200)
    log = prepare(
        write_log(tmp_path / "log", events), tmp_path / "out", replace(PLAIN, history="positives")
    )
    liked = [r for r in range(200) if events["label"][r]]
    for row in all_examples(log):
        past = true_past(events, row["event"], liked)
        assert [h[0] for h in row["history"]] == [events["item"][p] for p in past]
        # The dense features still know all events.
        assert row["log_history_length"] == pytest.approx(
            np.log1p(len(true_past(events, row["event"], range(200)))), rel=1e-5
        )


def test_action_is_the_rating_or_the_named_column(tmp_path: Path) -> None:
    events = random_events(100)
    events["rating"] = [r % 5 + 1 for r in range(100)]
    events["kind"] = [r % 9 for r in range(100)]
    folder = write_log(tmp_path / "log", events)
    rated = prepare(folder, tmp_path / "a", PLAIN)
    assert rated.actions == 6
    assert set(rated.store.action.tolist()) == {1, 2, 3, 4, 5}
    assert prepare(folder, tmp_path / "b", replace(PLAIN, action_column="kind")).actions == 9
    labels = prepare(folder, tmp_path / "c", replace(PLAIN, action_column="label"))
    assert labels.actions == 2


def test_bare_shuffle_is_seeded_windowed_and_of_train_only(tmp_path: Path) -> None:
    folder = write_log(tmp_path / "log", random_events(500))

    def rows(name: str, **change: Any) -> dict[str, list[int]]:
        log = prepare(folder, tmp_path / name, replace(PLAIN, **change))
        return {s: [row["event"] for row in read_examples(log, s)] for s in SPLITS}

    plain, a = rows("plain"), rows("a", shuffle_window=50)
    assert a["train"] != plain["train"]
    assert a["valid"] == plain["valid"] and a["test"] == plain["test"]
    for begin in range(0, len(plain["train"]), 50):
        assert sorted(a["train"][begin : begin + 50]) == sorted(plain["train"][begin : begin + 50])
    assert rows("c", shuffle_window=50, seed=1)["train"] != a["train"]
    assert rows("d", shuffle_window=10**6)["train"] not in (a["train"], plain["train"])


def test_blocks_have_block_rows(tmp_path: Path) -> None:
    folder = write_log(tmp_path / "log", random_events(500))
    for block_rows in (7, 64):
        log = prepare(folder, tmp_path / f"{block_rows}", replace(PLAIN, block_rows=block_rows))
        metadata = pq.ParquetFile(log.path / "train" / "00000" / "part-00000.parquet").metadata
        sizes = [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
        assert set(sizes[:-1]) == {block_rows} and sum(sizes) == log.rows("train")


def test_segments_by_thirds_of_the_training_events() -> None:
    counts = np.array([0, 50, 1, 30, 20, 0, 40, 9])
    # 150 events: 50 reach the first third, 40 + 30 cross the second, then 20 + 9 + 1.
    assert popularity_segments(counts).tolist() == [3, 0, 2, 1, 2, 3, 1, 2]
    assert popularity_segments(np.zeros(3, np.int64)).tolist() == [3, 3, 3]


def test_segment_column_counts_training_events(tmp_path: Path) -> None:
    events = random_events(400, items=12)
    log = prepare(write_log(tmp_path / "log", events), tmp_path / "out", PLAIN)
    counts = [
        sum(i == 100 + item and s == "train" for i, s in zip(events["item"], events["split"], strict=True))
        for item in range(20)
    ]
    assert log.item_train_events.tolist() == counts
    assert log.item_segment.tolist() == popularity_segments(np.array(counts)).tolist()
    assert all(row["segment"] == log.item_segment[row["item"]] for row in all_examples(log))


def test_reuses_only_what_was_made_of_the_same(tmp_path: Path) -> None:
    folder = write_log(tmp_path / "log", random_events(100))
    out = tmp_path / "out"
    first = prepare(folder, out, PLAIN)
    stamp = (out / MANIFEST).stat().st_ino
    assert prepare(folder, out, PLAIN).fingerprint == first.fingerprint
    assert (out / MANIFEST).stat().st_ino == stamp
    # Touched but equal: still the same.
    (folder / "events.parquet").touch()
    assert prepare(folder, out, PLAIN).fingerprint == first.fingerprint
    assert (out / MANIFEST).stat().st_ino == stamp
    write_log(folder, random_events(100, seed=1))
    changed = prepare(folder, out, PLAIN)
    assert changed.fingerprint != first.fingerprint
    assert prepare(folder, out, replace(PLAIN, seed=1)).fingerprint != changed.fingerprint


def test_a_failure_leaves_the_old_one_and_no_scratch(tmp_path: Path) -> None:
    folder, out = write_log(tmp_path / "log", random_events(100)), tmp_path / "out"
    good = prepare(folder, out, PLAIN).fingerprint
    bad = random_events(100)
    bad["label"][57] = 2
    write_log(folder, bad)
    with pytest.raises(SidError, match="label is 2 at row 57"):
        prepare(folder, out, PLAIN)
    assert PreparedLog.open(out).fingerprint == good
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.lock", "log", "out"]


def test_scratch_of_a_killed_process_is_removed(tmp_path: Path) -> None:
    folder, out = write_log(tmp_path / "log", random_events(100)), tmp_path / "out"
    (tmp_path / ".out.work-dead").mkdir()
    prepare(folder, out, PLAIN)
    assert not (tmp_path / ".out.work-dead").exists()
    assert not (out / ".spill").exists()


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk: every write beyond it fails."""
    folder, out = write_log(tmp_path / "log", random_events(20_000)), tmp_path / "out"
    program = (
        "import resource, sys; from torchrec_sid.data import prepare;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)); prepare(*sys.argv[1:])"
    )
    command = [sys.executable, "-c", program, str(folder), str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "out: cannot be written (File too large)" in done.stderr
    assert "Free space, or choose another folder." in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.lock", "log"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    folder = write_log(tmp_path / "log", random_events(100))
    (tmp_path / "file").write_text("")
    with pytest.raises(SidError, match="cannot be written"):
        prepare(folder, tmp_path / "file" / "out", PLAIN)


def test_never_replaces_something_else(tmp_path: Path) -> None:
    folder, out = write_log(tmp_path / "log", random_events(100)), tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(SidError, match="not a prepared log"):
        prepare(folder, out, PLAIN)
    assert (out / "thesis.tex").exists()


def test_open_refuses_what_it_cannot_read(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="not a prepared.log"):
        PreparedLog.open(tmp_path)
    log = prepare(write_log(tmp_path / "log", random_events(100)), tmp_path / "out", PLAIN)
    with pytest.raises(SidError, match="split: 'dev'"):
        log.rows("dev")
    store = log.path / "history" / "00000" / "item.npy"
    store.write_bytes(store.read_bytes()[:-40])
    with pytest.raises(ArtifactError, match="the manifest says"):
        PreparedLog.open(log.path)
    manifest = json.loads((log.path / MANIFEST).read_text())
    (log.path / MANIFEST).write_text(json.dumps(manifest | {"version": 99}))
    with pytest.raises(ArtifactError, match="99"):
        PreparedLog.open(log.path)


@pytest.mark.parametrize(
    "change",
    [
        {"train_share": 1.0},
        {"train_share": 0.9, "valid_share": 0.2},
        {"block_rows": 0},
        {"buckets": 3},
        {"shuffle_window": -1},
        {"history": "liked"},
    ],
)
def test_refuses_a_bad_configuration(change: dict[str, Any]) -> None:
    with pytest.raises(SidError):
        PrepareConfig(**change)


@pytest.mark.parametrize("change", [{"per_positive": 0}, {"power": 1.5}, {"window": 0}])
def test_refuses_bad_negatives(change: dict[str, Any]) -> None:
    with pytest.raises(SidError):
        NegativeSampling(**change)
