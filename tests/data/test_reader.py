"""The reader: the same global batches for every world size, exact resume, workers, padding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.data.logs import all_examples, random_events, read_examples, write_log
from torchrec_sid.ages import HISTORY_AGES, NO_TIME, age_bucket
from torchrec_sid.data import BatchConfig, BatchReader, PrepareConfig, PreparedLog, RankingBatch, prepare
from torchrec_sid.data import blocks as blocks_module
from torchrec_sid.data.reader import ranges
from torchrec_sid.errors import ArtifactError, SidError

ALL = ("item", "history", "history_action", "history_age", "item_sid", "history_sid")
SIDS = np.arange(20, dtype=np.int64) * 1_000 + 7
BYTES = np.stack([np.arange(20), 255 - np.arange(20)], axis=1).astype(np.uint8)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> PreparedLog:
    folder = tmp_path_factory.mktemp("reader")
    log = write_log(folder / "log", random_events(900))
    return prepare(log, folder / "out", PrepareConfig(shuffle_window=0, block_rows=8))


def read(log: PreparedLog, split: str = "train", size: int = 16, **how: Any) -> list[RankingBatch]:
    config = BatchConfig(size, how.pop("history_length", 5), how.pop("fields", ("item", "history")))
    return list(BatchReader(log, split, config, **how))


def equal(a: RankingBatch, b: RankingBatch) -> bool:
    tensors = ("dense", "labels", "weights", "segment", "history_lengths")
    return (
        all(torch.equal(getattr(a, name), getattr(b, name)) for name in tensors)
        and a.features.keys() == b.features.keys()
        and torch.equal(a.features.values(), b.features.values())
        and torch.equal(a.features.lengths(), b.features.lengths())
    )


def rows_of(batches: list[RankingBatch]) -> list[tuple[Any, ...]]:
    """One comparable tuple for each real row, history included."""
    rows: list[tuple[Any, ...]] = []
    for batch in batches:
        jagged = batch.features.to_dict()
        history = torch.split(jagged["history"].values(), jagged["history"].lengths().tolist())
        for b in range(int(batch.weights.sum())):
            item = int(jagged["item"].values()[b])
            dense = tuple(batch.dense[b].tolist())
            rows.append((item, *dense, float(batch.labels[b]), int(batch.segment[b]), *history[b].tolist()))
    return rows


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, PreparedLog]:
    """One log in blocks of several sizes."""
    folder = tmp_path_factory.mktemp("logs")
    log = write_log(folder / "log", random_events(250))
    sizes = (1, 5, 8, 64)
    return {rows: prepare(log, folder / f"{rows}", PrepareConfig(block_rows=rows)) for rows in sizes}


@given(
    world=st.sampled_from([1, 2, 3, 4, 6]),
    block_rows=st.sampled_from([1, 5, 8, 64]),
    split=st.sampled_from(["train", "test"]),
    order=st.sampled_from(["time", "shuffled"]),
    seed=st.integers(0, 3),
)
def test_global_batches_do_not_depend_on_the_world(
    logs: dict[int, PreparedLog], world: int, block_rows: int, split: str, order: Any, seed: int
) -> None:
    log, how = logs[block_rows], {"order": order, "seed": seed}
    alone = read(log, split, 24, **how)
    together = [read(log, split, 24 // world, rank=r, world_size=world, **how) for r in range(world)]
    assert {len(batches) for batches in together} == {len(alone)}
    for number, batch in enumerate(alone):
        assert rows_of([batch]) == rows_of([batches[number] for batches in together])


def test_time_order_reads_the_split_as_written(log: PreparedLog) -> None:
    for split in ("train", "valid", "test"):
        expected = [row["item"] for row in read_examples(log, split)]
        assert [row[0] for row in rows_of(read(log, split, drop_last=False))] == expected


def test_train_drops_the_last_batch_and_evaluation_pads_it(log: PreparedLog) -> None:
    rows = log.rows("train")
    assert rows % 16 and len(read(log)) == rows // 16
    padded = read(log, drop_last=False)
    assert len(padded) == rows // 16 + 1
    last = padded[-1]
    assert last.weights.tolist() == [1.0] * (rows % 16) + [0.0] * (16 - rows % 16)
    assert last.segment[rows % 16 :].eq(-1).all()
    assert last.history_lengths[rows % 16 :].eq(0).all()
    assert len(last.features["item"].values()) == 16
    assert len(read(log, "test")) == -(-log.rows("test") // 16)


def test_a_rank_without_rows_pads_whole_batches(log: PreparedLog) -> None:
    rows = log.rows("test")
    size = rows // 2 + 1
    ranks = [read(log, "test", size, rank=r, world_size=3) for r in range(3)]
    assert [len(b) for b in ranks] == [1, 1, 1]
    assert ranks[2][0].weights.sum() == 0
    assert ranks[2][0].features.lengths().tolist() == [1] * size + [0] * size


@pytest.mark.parametrize("order", ["time", "shuffled"])
def test_resumes_without_replay(log: PreparedLog, order: Any) -> None:
    whole = read(log, order=order, seed=3)
    reader = BatchReader(log, "train", BatchConfig(16, 5), order=order, seed=3, start_batch=7)
    rest = list(reader)
    assert len(reader) == len(rest) == len(whole) - 7 == reader.batches - 7
    assert all(equal(a, b) for a, b in zip(whole[7:], rest, strict=True))
    assert list(BatchReader(log, "train", BatchConfig(16), start_batch=reader.batches)) == []


def test_a_resumed_reader_does_not_touch_the_blocks_before(tmp_path: Path) -> None:
    log = prepare(
        write_log(tmp_path / "log", random_events(400)), tmp_path / "out", PrepareConfig(block_rows=8)
    )
    whole = read(log, start_batch=5)
    damage(log.path / "train" / "00000" / "part-00000.parquet", row_group=0)
    with pytest.raises(ArtifactError, match=r"block 0 cannot be read.*Prepare the log again"):
        read(log)
    assert all(equal(a, b) for a, b in zip(whole, read(log, start_batch=5), strict=True))


def damage(path: Path, row_group: int) -> None:
    """Flip a byte in the data of one row group."""
    import pyarrow.parquet as pq

    offset = pq.ParquetFile(path).metadata.row_group(row_group).column(1).data_page_offset
    data = bytearray(path.read_bytes())
    data[offset + 30] ^= 0xFF
    path.write_bytes(data)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_read_the_same(log: PreparedLog, workers: int) -> None:
    how: dict[str, Any] = {
        "order": "shuffled",
        "start_batch": 2,
        "fields": ALL,
        "item_values": {"sid": SIDS},
    }
    ours, theirs = read(log, **how), read(log, workers=workers, **how)
    assert len(ours) == len(theirs) > 10
    assert all(equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_worker_passes_its_error_on(tmp_path: Path) -> None:
    log = prepare(
        write_log(tmp_path / "log", random_events(400)), tmp_path / "out", PrepareConfig(block_rows=8)
    )
    (log.path / "train" / "00000" / "part-00000.parquet").unlink()
    with pytest.raises(ArtifactError, match=r"part-00000.parquet"):
        read(log, workers=1)


def test_shuffle_is_a_seeded_permutation_per_epoch(log: PreparedLog) -> None:
    time = rows_of(read(log, drop_last=False))
    a, b = (rows_of(read(log, drop_last=False, order="shuffled", seed=s)) for s in (1, 2))
    assert sorted(a) == sorted(b) == sorted(time)
    assert a != b and a != time
    reader = BatchReader(log, "train", BatchConfig(16, 5), order="shuffled", seed=1, drop_last=False)
    assert rows_of(list(reader)) == a
    reader.set_epoch(1)
    later = rows_of(list(reader))
    assert later != a and sorted(later) == sorted(a)
    assert later == rows_of(read(log, drop_last=False, order="shuffled", seed=1, epoch=1))


def test_shuffle_opens_each_file_once(log: PreparedLog, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are permuted, then blocks within runs of files: memory and opens stay bounded."""
    monkeypatch.setattr(blocks_module, "BLOCKS_PER_FILE", 3)
    monkeypatch.setattr(blocks_module, "_OPEN_FILES", 2)
    reader = blocks_module.BlockReader(log, "train")
    order = reader.order("shuffled", 0, 0)
    assert sorted(order) == list(range(reader.blocks))
    assert order[-1] == reader.blocks - 1
    held: list[int] = []
    opens = 0
    for file in order // 3:
        opens += file not in held
        held = [*(f for f in held if f != file), file][-2:]
    # The last block, which is not full, comes at the very end: its file may open twice.
    assert opens <= -(-reader.blocks // 3) + 1
    assert list(order[:-1] // 3) != sorted(order[:-1] // 3)


def test_fields_choose_keys_values_and_bytes(log: PreparedLog) -> None:
    fields = ("history_sid", "item", "history_bytes", "history", "item_sid", "item_bytes")
    values = {"sid": torch.from_numpy(SIDS), "bytes": BYTES}
    for batch in read(log, fields=fields, item_values=values):
        jagged = batch.features.to_dict()
        assert batch.features.keys() == ["history_sid", "item", "history", "item_sid"]
        assert batch.features.values().dtype == batch.features.lengths().dtype == torch.int64
        assert batch.features.values().is_contiguous()
        item, history = jagged["item"].values(), jagged["history"].values()
        assert jagged["item_sid"].values().equal(torch.from_numpy(SIDS)[item])
        assert jagged["history_sid"].values().equal(torch.from_numpy(SIDS)[history])
        assert jagged["history_sid"].lengths().equal(batch.history_lengths)
        assert batch.rows.keys() == {"item_bytes", "history_bytes"}
        assert batch.rows["item_bytes"].equal(torch.from_numpy(BYTES)[item])
        assert batch.rows["history_bytes"].equal(torch.from_numpy(BYTES)[history])


def test_further_labels_say_whether_the_action_was_at_least_that(tmp_path: Path) -> None:
    events = random_events(300)
    events["rating"] = np.random.default_rng(0).integers(0, 6, 300).tolist()
    log = prepare(write_log(tmp_path / "log", events), tmp_path / "out", PrepareConfig(block_rows=8))
    config = BatchConfig(batch_size=512, tasks=(1, 5))
    (batch,) = BatchReader(log, "test", config)
    rows = read_examples(log, "test")
    found = batch.labels[batch.weights > 0]
    assert found.tolist() == [[r["label"], r["action"] >= 1, r["action"] >= 5] for r in rows]
    assert [r["action"] for r in rows] == [events["rating"][r["event"]] for r in rows]


def test_history_length_keeps_the_latest(log: PreparedLog) -> None:
    rows = [r for r in all_examples(log) if r["split"] == "test"]
    for length in (1, 4, None):
        found = rows_of(read(log, "test", history_length=length))
        for row, seen in zip(rows, found, strict=True):
            past = [h[0] - 100 for h in row["history"]]
            assert list(seen[6:]) == (past if length is None else past[-length:])


def test_ages_are_floors_of_powers_of_two() -> None:
    ages = np.array([1, 2, 3, 4, 7, 8, 2**37, 2**38 - 1, 2**38, 2**50])
    assert age_bucket(ages + 5, np.full(10, 5)).tolist() == [1, 2, 2, 3, 3, 4, 38, 38, 39, 39]
    assert age_bucket(np.array([7]), np.array([NO_TIME])).tolist() == [0]
    assert HISTORY_AGES == 40


def test_ranges() -> None:
    assert ranges(np.array([5, 9, 0]), np.array([2, 0, 3])).tolist() == [5, 6, 0, 1, 2]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"rank": 2, "world_size": 2}, "rank: 2 of 2"),
        ({"start_batch": 9999}, "start_batch: 9999"),
        ({"order": "random"}, "order: 'random'"),
        ({"split": "dev"}, "split: 'dev'"),
        ({"size": 10_000}, "Choose a smaller batch"),
        ({"fields": ("item_sid",)}, "'sid': missing"),
        ({"fields": ("item", "item_bytes")}, "'bytes': missing"),
        ({"fields": ("item_sid",), "item_values": {"sid": SIDS[:5]}}, "'sid': shape"),
        ({"fields": ("item_sid",), "item_values": {"sid": SIDS.astype(np.int32)}}, "dtype int32"),
        ({"fields": ("item", "history_bytes"), "item_values": {"bytes": BYTES[:7]}}, "'bytes': shape"),
        ({"fields": ("item_bytes",), "item_values": {"bytes": BYTES}}, "are rows"),
        ({"fields": ("item", "price")}, "fields: 'price'"),
        ({"fields": ("item", "item_")}, "item value ''"),
    ],
)
def test_refuses(log: PreparedLog, how: dict[str, Any], message: str) -> None:
    with pytest.raises(SidError, match=message):
        read(log, **how)


@pytest.mark.parametrize(
    "change",
    [
        {"batch_size": 0},
        {"history_length": 0},
        {"fields": ("item", "item")},
        {"fields": ()},
    ],
)
def test_refuses_a_bad_batch(change: dict[str, Any]) -> None:
    with pytest.raises(SidError):
        replace(BatchConfig(), **change)


@pytest.mark.parametrize("world", [1, 3])
def test_the_user_of_every_row_is_known_in_the_order_of_the_batches(log, world):
    for split, epoch in (("train", 1), ("test", 0)):
        told, seen = [], []
        for rank in range(world):
            reader = BatchReader(
                log, split, BatchConfig(16), rank=rank, world_size=world, order="shuffled", epoch=epoch
            )
            weights = torch.cat([batch.weights for batch in reader])
            users = reader.users()
            assert torch.equal(users >= 0, weights > 0)
            told += users[users >= 0].tolist()
            seen.append(len(users))
        assert len(set(seen)) == 1
        if split == "test":
            stored = [row["user"] for row in read_examples(log, split)]
            assert sorted(told) == sorted(stored) and len(set(told)) > 1
            if world == 1:
                ordered = BatchReader(log, split, BatchConfig(16)).users()
                assert ordered[ordered >= 0].tolist() == stored
