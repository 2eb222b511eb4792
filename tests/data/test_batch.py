"""`RankingBatch` as TorchRec's pipelines use it."""

from __future__ import annotations

import pickle

import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from torchrec_sid.data import RankingBatch


def batch(with_bytes: bool) -> RankingBatch:
    features = KeyedJaggedTensor(
        keys=["item", "history"],
        values=torch.tensor([3, 4, 1, 2, 3]),
        lengths=torch.tensor([1, 1, 3, 0]),
    )
    return RankingBatch(
        dense=torch.ones(2, 3),
        features=features,
        labels=torch.tensor([0.0, 1.0]),
        weights=torch.ones(2),
        segment=torch.tensor([0, 3]),
        history_lengths=torch.tensor([3, 0]),
        rows={"history_bytes": torch.zeros(3, 2, dtype=torch.uint8)} if with_bytes else {},
    )


@pytest.mark.parametrize("with_bytes", [True, False])
def test_moves_every_tensor(with_bytes: bool) -> None:
    moved = batch(with_bytes).to(torch.device("meta"), non_blocking=True)
    assert isinstance(moved, Pipelineable)
    for tensor in (moved.dense, moved.labels, moved.weights, moved.segment, moved.history_lengths):
        assert tensor.is_meta
    assert moved.features.values().is_meta and moved.features.lengths().is_meta
    assert [(name, row.is_meta) for name, row in moved.rows.items()] == [
        ("history_bytes", True)
    ] * with_bytes


def test_survives_a_worker_process() -> None:
    again = pickle.loads(pickle.dumps(batch(True)))
    assert again.features.to_dict()["history"].values().tolist() == [1, 2, 3]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory and streams need a GPU")
def test_pins_and_records_streams() -> None:
    pinned = batch(True).pin_memory()
    assert pinned.dense.is_pinned() and pinned.features.values().is_pinned()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        moved = pinned.to(torch.device("cuda"), non_blocking=True)
    moved.record_stream(stream)
    stream.synchronize()
    assert moved.to(torch.device("cpu")).labels.tolist() == [0.0, 1.0]
