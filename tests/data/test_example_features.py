"""Features of a specification in batches: right values, equal global batches for every world."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.data.logs import random_events, write_log
from torchrec_sid.data.batch import BatchConfig, RankingBatch
from torchrec_sid.data.example_features import dense_names
from torchrec_sid.data.prepare import prepare
from torchrec_sid.data.prepare_config import PrepareConfig
from torchrec_sid.data.prepared import PreparedLog
from torchrec_sid.data.reader import BatchReader
from torchrec_sid.data.specification import Specification
from torchrec_sid.errors import SidError

SPEC = Specification.from_plain(
    {
        "columns": {"weight": "importance"},
        "labels": {"label": {"column": "label"}, "bought": {"column": "bought"}},
        "features": {
            "context": {"device": {}, "price": {"kind": "numeric", "standardise": False}},
            "user": {"age": {"kind": "numeric", "buckets": 3}, "city": {}},
            "item": {"brand": {}, "tags": {"multi": True}, "weight_kg": {"kind": "numeric"}},
            "history": {"device": {}, "brand": {}, "price": {"kind": "numeric", "standardise": False}},
        },
    }
)
FIELDS = ("item", "history", "device", "age", "city", "brand", "tags", "history_device", "history_brand")
FIELDS = (*FIELDS, "history_price")
BRANDS = [None if i % 4 == 0 else f"b{i % 3}" for i in range(20)]
TAGS = [[f"t{j}" for j in range(i % 3)] for i in range(20)]


def write(folder: Path, buckets: int) -> PreparedLog:
    events = random_events(400, times=4000)
    draw = np.random.default_rng(1)
    events["device"] = draw.choice(["phone", "desk", "tv"], 400).tolist()
    events["price"] = draw.uniform(1, 9, 400).tolist()
    events["bought"] = draw.integers(0, 2, 400).tolist()
    events["importance"] = draw.uniform(0.5, 2, 400).tolist()
    items = {"brand": BRANDS, "tags": TAGS, "weight_kg": [float(i) for i in range(20)]}
    write_log(folder / "log", events, item_columns=items)
    users = {"user_id": list(range(7)), "age": [10, 20, 30, 40, 50, 60, 70], "city": list("aabbccd")}
    pq.write_table(pa.table(users), folder / "log" / "users.parquet")
    config = PrepareConfig(block_rows=8, buckets=buckets)
    return prepare(folder / "log", folder / f"prepared-{buckets}", config, specification=SPEC)


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, PreparedLog]:
    folder = tmp_path_factory.mktemp("features")
    return {buckets: write(folder, buckets) for buckets in (1, 4)}


def read(log: PreparedLog, split: str = "train", size: int = 16, **how) -> list[RankingBatch]:
    config = BatchConfig(size, 5, how.pop("fields", FIELDS), ("bought",), dropped=how.pop("dropped", {}))
    return list(BatchReader(log, split, config, **how))


def rows_of(batches: list[RankingBatch]) -> list[tuple]:
    """A comparable tuple per row that counts."""
    found = []
    for batch in batches:
        bags = {key: jagged.to_dense() for key, jagged in batch.features.to_dict().items()}
        prices = batch.rows["history_price"][:, 0].split(batch.history_lengths.tolist())
        for row in batch.weights.nonzero().flatten().tolist():
            keys = tuple((key, tuple(bags[key][row].tolist())) for key in sorted(bags))
            numbers = (batch.weights[row].item(), *batch.dense[row].tolist(), *batch.labels[row].tolist())
            found.append((*keys, *numbers, *prices[row].tolist()))
    return found


def test_features_are_those_of_the_row(logs: dict[int, PreparedLog]) -> None:
    log = logs[1]
    vocabulary = {
        table: ["?", "!", *log.vocabulary(table).to_pylist()] for table in ("device", "brand", "tags")
    }
    events = pq.read_table(log.path.parent / "log" / "events.parquet").to_pylist()
    by_time = {(event["user"], event["ts"], event["item"]): event for event in events}
    part = pq.read_table(log.path / "train" / "00000").to_pylist()
    users = log.user_keys.to_pylist()
    seen = 0
    for batch in read(log):
        bags = batch.features.to_dict()
        tags = bags["tags"].to_dense()
        for i in range(16):
            row = part[seen]
            event = by_time[users[row["user"]], row["ts"], 100 + row["item"]]
            item, seen = row["item"], seen + 1
            assert bags["item"].values()[i] == item
            assert vocabulary["device"][bags["device"].values()[i]] == event["device"]
            assert vocabulary["brand"][bags["brand"].values()[i]] == (BRANDS[item] or "?")
            assert [vocabulary["tags"][int(tag)] for tag in tags[i]] == TAGS[item]
            numbers = dict(zip(dense_names(log), batch.dense[i].tolist(), strict=True))
            assert numbers["price"] == pytest.approx(event["price"], rel=1e-5)
            assert batch.labels[i].tolist() == [event["label"], event["bought"]]
            assert batch.weights[i].item() == pytest.approx(event["importance"], rel=1e-5)
            assert bags["age"].values()[i] == 2 + np.searchsorted([3, 5], event["user"] + 1, side="right")
        history = bags["history"].values().tolist()
        assert [
            vocabulary["history_brand" if "history_brand" in vocabulary else "brand"][r] for r in []
        ] == []
        assert bags["history_device"].values().min() >= 2 and len(history) == len(
            batch.rows["history_price"]
        )
    assert seen > 100


def test_events_carry_the_features_of_their_items_and_of_themselves(logs: dict[int, PreparedLog]) -> None:
    log = logs[1]
    names = ["?", "!", *log.vocabulary("history_brand").to_pylist()]
    for batch in read(log, "test"):
        bags = batch.features.to_dict()
        found = [names[row] for row in bags["history_brand"].values().tolist()]
        assert found == [BRANDS[item] or "?" for item in bags["history"].values().tolist()]
        prices = batch.rows["history_price"]
        assert ((prices >= 1) & (prices <= 9)).all()


@pytest.mark.parametrize("buckets", [1, 4])
@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("order", ["time", "shuffled"])
def test_global_batches_are_the_same_for_every_world(logs, buckets: int, split: str, order: str) -> None:
    log = logs[buckets]
    whole = read(log, split, 32, order=order, seed=3)
    for world in (2, 4, 8):
        parts = [
            read(log, split, 32 // world, rank=r, world_size=world, order=order, seed=3)
            for r in range(world)
        ]
        assert {len(part) for part in parts} == {len(whole)}
        for number, batch in enumerate(whole):
            assert rows_of([batch]) == rows_of([part[number] for part in parts])


def test_buckets_hold_the_same_rows_and_their_users_only(logs) -> None:
    one, four = (read(logs[buckets], "test", 16) for buckets in (1, 4))
    assert sorted(rows_of(one)) == sorted(rows_of(four))
    assert rows_of(one) != rows_of(four)
    with pytest.raises(SidError, match="batch_size: 6 over all ranks, the log has 4 buckets"):
        read(logs[4], size=6)


def test_workers_read_features_too(logs) -> None:
    assert rows_of(read(logs[4], workers=2)) == rows_of(read(logs[4]))


def test_ids_are_dropped_by_row_and_epoch_alone(logs) -> None:
    known = {"known": torch.arange(20)}
    how = {"fields": ("item_known", "history_known"), "item_values": known}

    def values(log, **more) -> dict[str, list[int]]:
        config = BatchConfig(16, 5, how["fields"], dropped={"known": (0.25, 20)})
        found: dict[str, list[int]] = {"item_known": [], "history_known": []}
        for batch in BatchReader(log, "train", config, item_values=known, **more):
            for key in found:
                found[key] += batch.features[key].values().tolist()
        return found

    whole = [batch.features["item_known"].values() for batch in read(logs[1], **how)]
    first, again, later = values(logs[1]), values(logs[1]), values(logs[1], epoch=1)
    assert first == again != later and values(logs[1], seed=1) != first
    for key in first:
        assert 0.15 < np.mean(np.array(first[key]) == 20) < 0.35
    kept = [(a, b) for a, b in zip(first["item_known"], torch.cat(whole).tolist(), strict=True) if a != 20]
    assert all(a == b for a, b in kept) and len(kept) > 50
