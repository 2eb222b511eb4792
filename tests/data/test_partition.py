"""External partitioning keeps every record once, in order, for any batches."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrec_sid.data.appender import NpyAppender
from torchrec_sid.data.partition import EXAMPLE, Spill, TimeSketch, hash_bucket
from torchrec_sid.hashing import hash64, uniform


@given(st.integers(1, 9), st.lists(st.integers(0, 40), min_size=1, max_size=8), st.integers(1, 60))
@settings(max_examples=20)
def test_spill_keeps_records_and_their_order(
    tmp_path_factory: pytest.TempPathFactory, buckets: int, batches: list[int], pending: int
) -> None:
    folder = tmp_path_factory.mktemp("spill")
    spill, number = Spill(folder, EXAMPLE, buckets, pending), 0
    for rows in batches:
        records = np.zeros(rows, EXAMPLE)
        records["event"] = np.arange(number, number + rows)
        number += rows
        spill.add(records, hash_bucket(records["event"], buckets))
    drained = [records["event"] for records in spill.drain()]
    assert len(drained) == buckets
    assert sorted(np.concatenate(drained)) == list(range(number))
    for bucket, events in enumerate(drained):
        assert (np.diff(events) > 0).all() and (hash_bucket(events, buckets) == bucket).all()
    assert not list(folder.iterdir())
    shutil.rmtree(folder)


def test_buckets_are_even() -> None:
    counts = np.bincount(hash_bucket(np.arange(100_000), 16), minlength=16)
    assert counts.min() > 5_900 and counts.max() < 6_600


def sketch_of(ts: np.ndarray, capacity: int, batch: int) -> TimeSketch:
    sketch = TimeSketch(capacity)
    for begin in range(0, len(ts), batch):
        sketch.add(ts[begin : begin + batch], np.arange(begin, min(begin + batch, len(ts))))
    return sketch


@pytest.mark.parametrize("batch", [7, 64, 5_000])
def test_sketch_is_exact_while_it_holds_all_and_near_beyond(batch: int) -> None:
    ts = np.random.default_rng(0).permutation(np.arange(5_000) * 10)
    assert sketch_of(ts, 5_000, batch).times([0.0, 0.8, 0.9]) == [0, 40_000, 45_000]
    small = sketch_of(ts, 500, batch)
    assert small.stride == 16
    # A systematic sample of 313: three standard errors are 7% of the range.
    assert small.times([0.8, 0.9]) == pytest.approx([40_000, 45_000], abs=3_500)


@pytest.mark.parametrize("span", [1, 50, 10**6, 2**62])
def test_time_buckets_are_ordered_and_even(span: int) -> None:
    """In order of (time, row), also where all times are equal or span the whole range of int64."""
    ts = np.random.default_rng(0).integers(0, span, 4_000)
    row = np.arange(4_000)
    buckets = sketch_of(ts, 1_000, 64).boundaries(8)
    bucket = buckets(ts, row)[np.lexsort((row, ts))]
    assert len(buckets) == 8 and (np.diff(bucket) >= 0).all()
    assert np.bincount(bucket, minlength=8).max() < 900


def test_appender_writes_what_numpy_reads(tmp_path: Path) -> None:
    values = np.arange(35, dtype=np.float32).reshape(7, 5)
    with NpyAppender(tmp_path / "a.npy", np.float16, (5,)) as file:
        file.append(values[:3])
        file.append(values[3:])
    assert np.array_equal(np.load(tmp_path / "a.npy", mmap_mode="r"), values.astype(np.float16))
    with NpyAppender(tmp_path / "b.npy", np.int64) as file:
        pass
    assert np.load(tmp_path / "b.npy").shape == (0,)
    with (
        pytest.raises(ValueError, match="rows of shape"),
        NpyAppender(tmp_path / "c.npy", np.int8, (2,)) as file,
    ):
        file.append(np.zeros((3, 3)))
    # An error leaves no readable file behind.
    with pytest.raises(ValueError, match="pickle"):
        np.load(tmp_path / "c.npy")


def test_hashes_are_uniform_and_of_every_key() -> None:
    draws = uniform(3, np.arange(100_000), 5)
    assert np.histogram(draws, 10, (0, 1))[0] == pytest.approx(10_000, abs=400)
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.01
    base = hash64(3, np.arange(10), 5)
    assert not (hash64(4, np.arange(10), 5) == base).any()
    assert not (hash64(3, np.arange(10), 6) == base).any()
    assert not (hash64(3, np.arange(1, 11), 5) == base).any()
