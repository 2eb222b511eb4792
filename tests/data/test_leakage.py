"""No example sees its own label or anything that happens at its time or later."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.logs import all_examples, random_events, write_log
from torchrec_sid.data import BatchConfig, BatchReader, NegativeSampling, PrepareConfig, prepare

Events = dict[str, list[Any]]

CONFIG = PrepareConfig(shuffle_window=16, block_rows=8, negatives=NegativeSampling(3, power=0.5, window=20))
ROWS = 160


def what_it_sees(folder: Path, events: Events, config: PrepareConfig = CONFIG) -> list[dict[str, Any]]:
    """Everything a model may read of each example, by event; rows of one event in the order drawn."""
    shutil.rmtree(folder, ignore_errors=True)
    holdout = {"cold_holdout": np.array([i % 5 % 3 for i in range(20)], np.int8)}
    log = prepare(write_log(folder / "log", events, item_columns=holdout), folder / "out", config)
    names = ("event", "ts", "item_id", "history", *log.dense_names)
    seen = [{name: row[name] for name in names} | {"label": row["label"]} for row in all_examples(log)]
    return sorted(seen, key=lambda row: (row["event"], -row["label"], row["item_id"]))


def rewrite_future(events: Events, now: int, seed: int) -> Events:
    """Another future: other items, labels, users and ratings from time ``now`` on, and more events."""
    random = np.random.default_rng(seed)
    new = {name: list(column) for name, column in events.items()}
    for row, ts in enumerate(events["ts"]):
        if ts >= now:
            new["item"][row] = int(random.integers(100, 120))
            new["user"][row] = int(random.integers(0, 7))
            if "rating" in new:
                new["label"][row] = int(random.integers(0, 2))
                new["rating"][row] = int(random.integers(1, 6))
    for _ in range(20):
        row = int(random.choice([r for r, ts in enumerate(events["ts"]) if ts >= now]))
        for name in new:
            new[name].append(new[name][row])
    return new


def rated(seed: int) -> Events:
    events = random_events(ROWS, seed=seed)
    return events | {"rating": [(r * 7 + seed) % 5 + 1 for r in range(ROWS)]}


def positives(seed: int) -> Events:
    events = random_events(ROWS, seed=seed)
    return events | {"label": [1] * ROWS}


@pytest.mark.parametrize("make", [rated, positives])
@settings(max_examples=15)
@given(st.integers(0, 10_000), st.integers(10, 49))
def test_the_past_does_not_depend_on_the_future(
    tmp_path_factory: pytest.TempPathFactory, make: Callable[[int], Events], seed: int, moment: int
) -> None:
    """Whatever happens from a moment on, every example before it stays the same, negatives included."""
    folder = tmp_path_factory.mktemp("leak")
    events, now = make(seed), 1_000 + 10 * moment
    if not any(ts >= now for ts in events["ts"]):
        return
    before = [row for row in what_it_sees(folder, events) if row["ts"] < now]
    after = [row for row in what_it_sees(folder, rewrite_future(events, now, seed)) if row["ts"] < now]
    assert before == after
    shutil.rmtree(folder)


@settings(max_examples=15)
@given(st.integers(0, 10_000), st.integers(0, ROWS - 1))
def test_no_example_sees_its_own_label_or_those_of_its_moment(
    tmp_path_factory: pytest.TempPathFactory, seed: int, row: int
) -> None:
    folder = tmp_path_factory.mktemp("own")
    events = rated(seed)
    flipped = {name: list(column) for name, column in events.items()}
    for other, ts in enumerate(events["ts"]):
        if ts == events["ts"][row]:
            flipped["label"][other] = 1 - events["label"][other]
            flipped["rating"][other] = 6 - events["rating"][other]

    def seen(e: Events) -> list[dict[str, Any]]:
        rows = [r for r in what_it_sees(folder, e) if r["ts"] <= events["ts"][row]]
        return [
            {k: v for k, v in r.items() if k != "label"} for r in sorted(rows, key=lambda r: r["event"])
        ]

    assert seen(events) == seen(flipped)
    shutil.rmtree(folder)


def test_this_test_can_fail(tmp_path: Path) -> None:
    """The comparison notices a change of the past itself."""
    events = rated(3)
    first = min(events["ts"])
    changed = rewrite_future(events, first, 1)
    now = 1_300
    before = [row for row in what_it_sees(tmp_path / "a", events) if row["ts"] < now]
    assert before != [row for row in what_it_sees(tmp_path / "b", changed) if row["ts"] < now]


def test_ties_are_not_history(tmp_path: Path) -> None:
    """Ten events of one user at one time: none knows another, the next one knows all."""
    events = {
        "user": [1] * 12 + [2] * 8,
        "item": [100 + i % 20 for i in range(20)],
        "ts": [50] * 10 + [60, 70] + [55, 56, 57, 58, 59, 65, 70, 71],
        "label": [0, 1] * 10,
        "split": ["train"] * 10 + ["valid", "test"] + ["train"] * 4 + ["valid"] * 2 + ["test"] * 2,
    }
    log = prepare(write_log(tmp_path / "log", events), tmp_path / "out", CONFIG)
    length = {row["event"]: len(row["history"]) for row in all_examples(log)}
    assert [length[e] for e in range(12)] == [0] * 10 + [10, 11]


@pytest.mark.parametrize("history_length", [3, None])
def test_batches_hold_only_the_past(tmp_path: Path, history_length: int | None) -> None:
    """The same through the reader: history items and actions equal the user's past by brute force."""
    events = rated(11)
    log = prepare(write_log(tmp_path / "log", events), tmp_path / "out", replace(CONFIG, shuffle_window=0))
    examples = {s: [r for r in all_examples(log) if r["split"] == s] for s in ("train", "valid", "test")}
    config = BatchConfig(16, history_length, ("item", "history", "history_action", "history_age"))
    for split, rows in examples.items():
        seen = 0
        for batch in BatchReader(log, split, config, drop_last=False):
            jagged = batch.features.to_dict()
            for b in range(int(batch.weights.sum())):
                row = rows[seen]
                seen += 1
                past = row["history"] if history_length is None else row["history"][-history_length:]
                begin, end = (int(jagged["history"].offsets()[i]) for i in (b, b + 1))
                assert (jagged["history"].values()[begin:end] + 100).tolist() == [h[0] for h in past]
                assert jagged["history_action"].values()[begin:end].tolist() == [h[2] for h in past]
                ages = jagged["history_age"].values()[begin:end].tolist()
                assert ages == [(row["ts"] - h[1]).bit_length() for h in past]
                assert all(h[1] < row["ts"] for h in past)
        assert seen == len(rows)
