"""Frozen tables, optimizers by table, optimizers applied before: what `shard_model` makes of them."""

import pytest
import torch
from torch import nn
from torchrec import EmbeddingBagCollection
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from tests.distributed.launch import run_ranks
from tests.test_replace import CATALOG, PREFIX, bag, batch
from torchrec_sid.errors import SidError
from torchrec_sid.parallel.embedding_tables import local_shards
from torchrec_sid.parallel.optimizer import TableOptimizer, optimizers_by_table
from torchrec_sid.parallel.planner_config import PlannerConfig, TableConstraint
from torchrec_sid.parallel.sharding import shard_model
from torchrec_sid.replace import replace_embeddings

KINDS = ("table_wise", "row_wise", "data_parallel")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.ebc = EmbeddingBagCollection(
            [bag("t_user", 10, ["user"]), bag("t_item", 100, ["item"]), bag("t_history", 100, ["history"])]
        )
        self.out = nn.Linear(24, 1)

    def forward(self, features):
        return self.out(self.ebc(features).values()).square().sum()


def model():
    net = Net()
    replace_embeddings(net, {"item": PREFIX}, catalog=CATALOG)
    net.ebc.embedding_bags["t_user"].weight.requires_grad_(False)
    return net


def rows(state, tables):
    return {
        name: [shard.tensor.clone() for shard in local_shards(state[table.weight_key])]
        for name, table in tables.items()
    }


def train(kind, seed, table_optimizer, before=None):
    net = model()
    if before is not None:
        apply_optimizer_in_backward(*before(net))
    user = net.ebc.embedding_bags["t_user"].weight.detach().clone()
    planner = PlannerConfig(tables={"*": TableConstraint(sharding_types=(kind,))})
    sharded = shard_model(
        net, planner, device=torch.device("cpu"), table_optimizer=table_optimizer, seed=seed
    )
    optimizer = sharded.make_optimizer(lambda p: torch.optim.SGD(p, lr=0.1))
    first = rows(sharded.model.state_dict(), sharded.tables)
    for _ in range(3):
        optimizer.zero_grad()
        sharded.model(batch()).backward()
        optimizer.step()
    last = rows(sharded.model.state_dict(), sharded.tables)
    moved = {
        name: any(not torch.equal(a, b) for a, b in zip(first[name], last[name], strict=True))
        for name in first
    }
    kept = [torch.equal(shard, user[: len(shard)]) or len(shard) < 10 for shard in last["t_user"]]
    return moved, all(kept), {n: o.name for n, o in sharded.table_optimizers.items()}


def on_each_rank():
    found = {kind: train(kind, 0, TableOptimizer("adagrad", lr=0.1)) for kind in KINDS}
    several = {"t_item": TableOptimizer("sgd", lr=0.1), "*": TableOptimizer("adagrad")}
    found["several"] = train("row_wise", None, several)

    def zero(net):
        return torch.optim.SGD, [net.ebc.embedding_bags["t_item"].weight], {"lr": 0.0}

    found["before"] = train("table_wise", 0, TableOptimizer("sgd", lr=0.1), zero)
    return found


def test_frozen_tables_stay_and_others_train():
    results = run_ranks(on_each_rank, 2)
    for found in results:
        assert all(not moved["t_user"] and kept for moved, kept, _ in found.values())
        assert found["several"][2] == {"t_user": "adagrad", "t_item": "sgd", "t_history": "adagrad"}
    # A table-wise table has its rows on one rank.
    for name in (*KINDS, "several"):
        assert any(found[name][0]["t_item"] for found in results), name
        assert any(found[name][0]["t_history"] for found in results), name
    assert not any(found["before"][0]["t_item"] for found in results), "its own optimizer, of rate 0, stays"
    assert any(found["before"][0]["t_history"] for found in results)


def test_optimizers_by_table_must_fit():
    sgd = TableOptimizer("sgd")
    with pytest.raises(SidError, match=r"'x\*'.*\['a', 'b'\]"):
        optimizers_by_table({"x*": sgd, "*": sgd}, ["a", "b"])
    with pytest.raises(SidError, match="'b'.*no optimizer"):
        optimizers_by_table({"a": sgd}, ["a", "b"])
