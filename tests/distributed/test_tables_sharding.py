"""Every way to shard the tables on two processes trains like one process on the whole batch."""

import pytest
import torch

from tests.distributed.launch import run_ranks
from tests.distributed.tables_model import Model, shard, train_plain, train_sharded

STEPS = 6
WAYS = [
    ("table_wise", "table_wise"),
    ("row_wise", "row_wise"),
    ("column_wise", "column_wise"),
    ("table_row_wise", "row_wise"),
    ("grid_shard", "table_wise"),
]


def model():
    torch.manual_seed(1)
    return Model()


def on_each_rank():
    losses = {}
    for kinds in WAYS:
        sharded, optimizer = shard(model(), kinds, 2)
        losses[kinds] = train_sharded(sharded, optimizer, STEPS)
    return losses


def test_sharded_equals_unsharded():
    expected = train_plain(model(), STEPS)
    still = train_plain(model(), STEPS, lr=0.0)
    assert abs(expected[-1] - still[-1]) > 0.01, "training must move, or equality says nothing"
    losses, again = run_ranks(on_each_rank, 2)
    assert losses == again
    for kinds, found in losses.items():
        assert found == pytest.approx(expected, abs=1e-6), kinds
