"""Histories that are given as such (histories.parquet), and logs without a clock."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.data.logs import all_examples, write_log
from torchrec_sid.ages import NO_TIME
from torchrec_sid.data import BatchConfig, BatchReader, PrepareConfig, prepare

CONFIG = PrepareConfig(shuffle_window=0, block_rows=4)
ROWS = 40


def impressions() -> dict[str, list[Any]]:
    """Twenty impressions of two items each, one clicked."""
    return {
        "impression": [r // 2 for r in range(ROWS)],
        "user": [r // 2 % 3 for r in range(ROWS)],
        "item": [100 + r % 20 for r in range(ROWS)],
        "ts": [1_000 + 10 * (r // 2) for r in range(ROWS)],
        "label": [r % 2 for r in range(ROWS)],
        "split": ["train"] * 20 + ["valid"] * 10 + ["test"] * 10,
    }


@pytest.mark.parametrize("buckets", [1, 4])
@pytest.mark.parametrize("timed", [False, True])
def test_an_impression_keeps_its_history_and_others_have_the_log(
    tmp_path: Path, timed: bool, buckets: int
) -> None:
    given = {i: [100 + (i * j) % 20 for j in range(i % 5)] for i in range(0, 20, 2)}
    histories: dict[str, Any] = {"impression": list(given), "history": list(given.values())}
    if timed:
        histories["history_ts"] = [[500 + i + j for j in range(len(h))] for i, h in given.items()]
    events = impressions()
    folder = write_log(tmp_path / "log", events, histories=histories)
    config = PrepareConfig(shuffle_window=0, block_rows=4, buckets=buckets)
    log = prepare(folder, tmp_path / "out", config)
    examples = all_examples(log)
    assert sorted(row["event"] for row in examples) == list(range(ROWS))
    for row in examples:
        event = row["event"]
        impression = events["impression"][event]
        if impression in given:
            expected = given[impression]
            assert [h[0] for h in row["history"]] == expected
            assert {h[2] for h in row["history"]} <= {1}
            assert row["log_history_length"] == pytest.approx(np.log1p(len(expected)))
            if timed:
                assert [h[1] for h in row["history"]] == [
                    500 + impression + j for j in range(len(expected))
                ]
            else:
                assert {h[1] for h in row["history"]} <= {NO_TIME}
                assert row["log_seconds_since_last"] == 0
        else:
            past = [
                r
                for r in range(ROWS)
                if events["user"][r] == events["user"][event] and events["ts"][r] < events["ts"][event]
            ]
            assert [h[0] for h in row["history"]] == [events["item"][r] for r in past]
    joined = log.manifest["explicit_histories"]
    assert (joined["histories"], joined["events"]) == (10, 20)


def test_unknown_times_have_their_own_age(tmp_path: Path) -> None:
    histories = {"impression": [0], "history": [[100, 101, 102]]}
    log = prepare(write_log(tmp_path / "log", impressions(), histories=histories), tmp_path / "out", CONFIG)
    batch = next(iter(BatchReader(log, "train", BatchConfig(4, None, ("item", "history_age")))))
    assert batch.features["history_age"].lengths().tolist()[:2] == [3, 3]
    assert batch.features["history_age"].values()[:6].tolist() == [0] * 6


def test_held_out_items_leave_given_histories_too(tmp_path: Path) -> None:
    """Entries have no time that could be compared with a release: held-out items are always left out."""
    groups = np.array([0, 1, 2] + [0] * 17, np.int8)
    histories = {"impression": [0, 19], "history": [[100, 101, 102, 103], [101, 103]]}
    folder = write_log(
        tmp_path / "log", impressions(), item_columns={"cold_holdout": groups}, histories=histories
    )
    log = prepare(folder, tmp_path / "out", CONFIG)
    seen = {row["event"] // 2: [h[0] for h in row["history"]] for row in all_examples(log)}
    assert seen[0] == [100, 103] and seen[19] == [103]
    assert log.manifest["explicit_histories"]["entries_held_out"] == 3


def test_a_log_without_a_clock_is_ordered_by_order_and_target(tmp_path: Path) -> None:
    """User positions order the training events; numbered targets follow them, in their global order."""
    events = {
        "user": [1, 1, 1, 2, 2, 2, 1, 2, 1, 2, 2, 1],
        "item": [100 + r for r in range(12)],
        "ts": [-1] * 12,
        "order": [0, 1, 2, 0, 1, 2, 3, 3, 4, 4, 5, 5],
        "target_no": [-1] * 6 + [0, 1, 3, 2, 5, 4],
        "label": [1, 0] * 6,
        "split": ["train"] * 6 + ["valid"] * 3 + ["test"] * 3,
    }
    events["split"][9], events["split"][8] = "valid", "test"
    log = prepare(write_log(tmp_path / "log", events), tmp_path / "out", CONFIG)
    assert log.manifest["clock"] is False
    rows = {row["event"]: row for row in all_examples(log)}
    assert [h[0] for h in rows[11]["history"]] == [100, 101, 102, 106, 108]
    assert [h[0] for h in rows[9]["history"]] == [103, 104, 105, 107]
    order = pq.read_table(log.path / "valid" / "00000")["event"].to_pylist()
    assert order == [6, 7, 9]
    assert pq.read_table(log.path / "test" / "00000")["event"].to_pylist() == [8, 11, 10]
