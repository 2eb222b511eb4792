"""Batches by request: the rows and events of batches by row, each history once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.data.logs import random_events, write_log
from torchrec_sid.data import BatchConfig, BatchReader, PrepareConfig, PreparedLog, RankingBatch, prepare
from torchrec_sid.data.reader import shared_histories
from torchrec_sid.errors import SidError

FIELDS = ("item", "history", "history_action", "history_age", "history_sid", "history_bytes")
SIDS = np.arange(20, dtype=np.int64) * 1_000 + 7
BYTES = np.stack([np.arange(20), 255 - np.arange(20)], axis=1).astype(np.uint8)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> PreparedLog:
    """Requests of three rows: every event with two sampled negatives, in two buckets of users."""
    folder = tmp_path_factory.mktemp("requests")
    log = write_log(folder / "log", random_events(900))
    return prepare(log, folder / "out", PrepareConfig(shuffle_window=0, block_rows=8, buckets=2))


def read(log: PreparedLog, by_request: bool, **how: Any) -> list[RankingBatch]:
    config = BatchConfig(16, 5, FIELDS, by_request=by_request)
    values = {"sid": SIDS, "bytes": BYTES}
    return list(BatchReader(log, how.pop("split", "train"), config, item_values=values, **how))


@pytest.mark.parametrize("how", [{}, {"split": "test"}, {"order": "shuffled"}, {"workers": 1}])
def test_rows_read_the_events_that_they_read_alone(log: PreparedLog, how: dict[str, Any]) -> None:
    shared, single = read(log, True, **how), read(log, False, **how)
    assert len(shared) == len(single) > 3
    saved = 0
    for ours, theirs in zip(shared, single, strict=True):
        for name in ("dense", "labels", "weights", "segment", "history_lengths"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name))
        request, row = ours.rows["request"], ours.rows["request_row"]
        assert torch.equal(row, row.sort().values)
        assert request.unique().tolist() == list(range(len(row)))
        for name in FIELDS[:-1]:
            bags, whole = ours.features[name], theirs.features[name]
            if name == "item":
                assert torch.equal(bags.values(), whole.values())
                continue
            held = bags.values().split(bags.lengths().tolist())
            alone = whole.values().split(whole.lengths().tolist())
            assert all(torch.equal(held[int(row[r])], alone[b]) for b, r in enumerate(request))
            assert bags.lengths().sum() == bags.lengths()[row].sum()
        events = ours.features["history"].values()
        assert torch.equal(ours.rows["history_bytes"], torch.from_numpy(BYTES)[events])
        saved += len(theirs.features["history"].values()) - len(events)
    assert saved > 0


def test_ranks_read_together_what_one_reads(log: PreparedLog) -> None:
    alone = read(log, True)
    parts = [read(log, True, rank=rank, world_size=2) for rank in range(2)]
    config = BatchConfig(32, 5, FIELDS, by_request=True)
    whole = list(BatchReader(log, "train", config, item_values={"sid": SIDS, "bytes": BYTES}))
    assert len(alone) // 2 == len(whole) == len(parts[0])
    for number, batch in enumerate(whole):
        mine = [part[number] for part in parts]
        assert torch.equal(torch.cat([part.labels for part in mine]), batch.labels)
        lengths = [part.history_lengths for part in mine]
        assert torch.equal(torch.cat(lengths), batch.history_lengths)


def test_what_is_shared_is_the_same_events_at_the_same_time() -> None:
    begin, end = np.array([0, 0, 0, 5, 0, 7, 9]), np.array([3, 3, 2, 8, 3, 7, 9])
    ts = np.array([10, 10, 10, 10, 11, 1, 2])
    found = shared_histories(begin, end, ts)
    assert found.request.tolist() == [0, 0, 1, 2, 3, 4, 4]
    assert found.request_row.tolist() == [0, 2, 3, 4, 5]


def test_a_feature_of_that_name_is_refused() -> None:
    with pytest.raises(SidError, match="another name"):
        BatchConfig(4, 5, ("item", "request"), by_request=True)
