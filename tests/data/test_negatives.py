"""Sampled negatives: what they may be, how often, and that they give nothing away."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.data.logs import all_examples, random_events, write_log
from torchrec_sid.data import NegativeSampling, PrepareConfig, prepare
from torchrec_sid.data import negatives as negatives_module
from torchrec_sid.data.negatives import NegativeSampler
from torchrec_sid.errors import SidError

CONFIG = PrepareConfig(shuffle_window=0, block_rows=8)


def positive_log(folder: Path, rows: int = 300, **columns: Any) -> Path:
    events = random_events(rows) | {"label": [1] * rows}
    return write_log(folder, events, item_columns=columns)


def test_come_from_the_window_and_share_all_but_the_item(tmp_path: Path) -> None:
    groups = np.array([i % 4 % 3 for i in range(20)], np.int8)
    scheme = NegativeSampling(per_positive=3, window=25)
    log = prepare(
        positive_log(tmp_path / "log", cold_holdout=groups),
        tmp_path / "out",
        replace(CONFIG, negatives=scheme),
    )
    examples = all_examples(log)
    positives = [row for row in examples if row["label"]]
    negatives = [row for row in examples if not row["label"]]
    timeline = sorted((row["ts"], row["event"], row["item_id"]) for row in positives)
    own = {row["event"]: row for row in positives}
    assert set(Counter(row["event"] for row in negatives).values()) <= {1, 2, 3}
    assert len(negatives) > 2.9 * len(positives)
    for row in negatives:
        same_time = [item for ts, _, item in timeline if ts == row["ts"]]
        before = [item for ts, _, item in timeline if ts < row["ts"]][-25:]
        positive = own[row["event"]]
        assert row["item_id"] in before + same_time
        assert row["item_id"] != positive["item_id"]
        # Released: group 1 with valid, group 2 with test.
        assert groups[row["item_id"] - 100] <= ("train", "valid", "test").index(row["split"])
        for name in ("user", "ts", "split", "history", *log.dense_names):
            assert row[name] == positive[name]
        assert (row["action"], positive["action"]) == (0, 1)
    assert len(log.store.item) == len(positives), "a negative must never be history"
    assert log.manifest["sampled_negatives"]


def test_are_not_drawn_where_the_log_has_its_own(tmp_path: Path) -> None:
    log = prepare(write_log(tmp_path / "log", random_events(100)), tmp_path / "out", CONFIG)
    assert not log.manifest["sampled_negatives"]
    assert len(all_examples(log)) == 100


def test_none_refuses_a_log_of_positives(tmp_path: Path) -> None:
    with pytest.raises(SidError, match="every label is 1"):
        prepare(positive_log(tmp_path / "log"), tmp_path / "out", replace(CONFIG, negatives=None))


def test_nothing_to_draw_from_is_an_error(tmp_path: Path) -> None:
    events = random_events(60) | {"label": [1] * 60, "item": [100] * 60}
    with pytest.raises(SidError, match="has label 1 only"):
        prepare(write_log(tmp_path / "log", events), tmp_path / "out", CONFIG)


def test_every_option_changes_the_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(negatives_module, "_PIECE", 32)
    folder = positive_log(tmp_path / "log")

    def drawn(name: str, scheme: NegativeSampling, **change: Any) -> list[tuple[int, int]]:
        log = prepare(folder, tmp_path / name, replace(CONFIG, negatives=scheme, **change))
        return [(row["event"], row["item_id"]) for row in all_examples(log) if not row["label"]]

    base = NegativeSampling(2, power=0.5, window=30)
    first = drawn("a", base)
    assert drawn("c", base, seed=1) != first
    assert drawn("d", replace(base, power=1.0)) != first
    assert drawn("e", replace(base, window=100)) != first
    assert len(drawn("f", replace(base, per_positive=4))) == pytest.approx(2 * len(first), abs=8)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_are_drawn_in_proportion_to_a_power_of_their_count(power: float) -> None:
    counts = np.array([40, 10, 5, 1])
    items = np.append(np.repeat(np.arange(4), counts), np.full(40, 4)).astype(np.int32)
    ts = np.append(np.zeros(56, np.int64), np.ones(40, np.int64))
    # The last 40 positives are item 4 itself, so that it is drawn from the other four.
    drawn = NegativeSampler(NegativeSampling(200, power), items, ts, seed=0).draw(56, np.arange(40))
    assert len(drawn.item) == 8_000
    found = np.bincount(drawn.item, minlength=5) / 8_000
    expected = np.append(counts**power / (counts**power).sum(), 0)
    assert found == pytest.approx(expected, abs=0.02)


def test_counts_are_of_the_window_alone() -> None:
    """Item 0 was frequent long ago: with power 0 it is drawn as often as its equal within the window."""
    items = np.array([0] * 1_000 + [0, 1] * 10 + [2], np.int32)
    sampler = NegativeSampler(NegativeSampling(4_000, 0.0, window=20), items, np.arange(len(items)), seed=0)
    drawn = sampler.draw(len(items) - 1, np.array([7]))
    assert np.bincount(drawn.item) / 4_000 == pytest.approx([0.5, 0.5], abs=0.03)


def drifting_log(folder: Path) -> Path:
    """Half of the events fall on 100 lasting items, half on 30 of 260 that come and go."""
    random = np.random.default_rng(0)
    rows = 20_000
    ts = np.arange(rows)
    passing = 200 + ts * 230 // rows + random.integers(0, 30, rows)
    item = np.where(random.random(rows) < 0.5, random.integers(100, 200, rows), passing)
    events = {
        "user": random.integers(0, 200, rows).tolist(),
        "item": item.tolist(),
        "ts": ts.tolist(),
        "label": [1] * rows,
    }
    return write_log(folder, events, items=400)


def cold_rates(out: Path) -> tuple[float, float]:
    """Share of positives among test rows of cold items and of the others."""
    test = pq.read_table(out / "test" / "00000")
    cold, label = test["segment"].to_numpy() == 3, test["label"].to_numpy()
    return label[cold].mean(), label[~cold].mean()


def test_being_new_does_not_give_the_label_away(tmp_path: Path) -> None:
    """With a short window the share of positives is the same for new and for old items.

    Drawn from the whole past instead, a new item is nearly always a positive: that is the leak which the
    short window is there to close.
    """
    folder = drifting_log(tmp_path / "log")
    short = replace(CONFIG, block_rows=1024, negatives=NegativeSampling(4, window=256))
    prepare(folder, tmp_path / "short", short)
    cold, warm = cold_rates(tmp_path / "short")
    assert cold == pytest.approx(0.2, abs=0.03) and warm == pytest.approx(0.2, abs=0.03)
    prepare(folder, tmp_path / "long", replace(short, negatives=NegativeSampling(4, window=1 << 20)))
    cold, warm = cold_rates(tmp_path / "long")
    assert cold > 0.4 and warm < 0.16
