"""A checkpoint of sharded SID tables loads at another world size, under another sharding, and unsharded."""

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tests.distributed.launch import run_ranks
from tests.distributed.tables_model import Model, make_batch, part, shard, train_plain, train_sharded

STEPS = 3


def model(seed=1):
    torch.manual_seed(seed)
    return Model()


def train_and_save(path, way):
    sharded, optimizer = shard(model(), way, 2)
    train_sharded(sharded, optimizer, STEPS)
    names = sorted(sharded.state_dict())
    dcp.save({"model": sharded.state_dict()}, checkpoint_id=path)
    return names, train_sharded(sharded, optimizer, STEPS, first=STEPS)


def load_and_train(path, way, ranks):
    sharded, optimizer = shard(model(seed=2), way, ranks)
    state = {"model": sharded.state_dict()}
    dcp.load(state, checkpoint_id=path)
    sharded.load_state_dict(state["model"])
    return train_sharded(sharded, optimizer, STEPS, first=STEPS)


def test_state_crosses_world_sizes_and_shardings(tmp_path):
    path = str(tmp_path / "checkpoint")
    (names, later), _ = run_ranks(train_and_save, 2, path, ("row_wise", "column_wise"))
    assert names == sorted(model().state_dict()), "sharding renames nothing"
    for way, ranks in ((("table_wise", "table_wise"), 1), (("column_wise", "row_wise"), 2)):
        assert run_ranks(load_and_train, ranks, path, way, ranks)[0] == pytest.approx(later, abs=1e-6)

    unsharded = model(seed=2)
    before = train_plain(model(seed=2), 1)
    state = {"model": unsharded.state_dict()}
    dcp.load(state, checkpoint_id=path, no_dist=True)
    unsharded.load_state_dict(state["model"])
    loss, _ = unsharded(part(make_batch(STEPS), 0, 1))
    assert loss.item() == pytest.approx(later[0], abs=1e-6)
    assert loss.item() != pytest.approx(before[0], abs=1e-3)
