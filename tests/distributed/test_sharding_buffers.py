"""Buffers are rank 0's on every rank; what cannot be made equal is refused."""

import torch
import torch.distributed as dist
from torch import nn

from tests.distributed.launch import run_ranks
from tests.parallel.toy import Toy
from torchrec_sid.errors import SidError
from torchrec_sid.parallel.buffers import checksum, synchronise_buffers
from torchrec_sid.parallel.optimizer import TableOptimizer
from torchrec_sid.parallel.planner_config import PlannerConfig, TopologyConfig
from torchrec_sid.parallel.ranks import Ranks
from torchrec_sid.parallel.sharding import shard_model

PLANNER = PlannerConfig(TopologyConfig(device="cpu"))


def shard(model):
    return shard_model(model, PLANNER, device=torch.device("cpu"), table_optimizer=TableOptimizer(), seed=0)


class Buffers(nn.Module):
    """Buffers of every kind, other on each rank, and no dense parameter."""

    def __init__(self, rank):
        super().__init__()
        self.register_buffer("floats", torch.rand(3, 2) + rank)
        self.register_buffer("flags", torch.tensor([rank == 0, True]))
        self.register_buffer("scalar", torch.tensor(rank, dtype=torch.int64))
        self.register_buffer("hidden", torch.full((2,), rank, dtype=torch.uint8), persistent=False)
        self.register_buffer("bfloat", torch.full((2,), float(rank), dtype=torch.bfloat16))
        self.register_buffer("empty", torch.empty(0))
        self.register_buffer("strided", (torch.arange(6.0).view(2, 3) + rank).t())


def buffers_after_sharding():
    rank = dist.get_rank()
    model = Toy()
    model.scale.add_(rank)
    model.extra = Buffers(rank)
    sharded = shard(model).model
    found = dict(sharded.module.named_buffers())
    names = ["scale", *(f"extra.{name}" for name, _ in Buffers(0).named_buffers())]
    return checksum(found[name] for name in names), found["extra.scalar"].item(), found["scale"][0].item()


def test_every_rank_gets_the_buffers_of_rank_0():
    first, second = run_ranks(buffers_after_sharding, 2)
    assert first == second
    assert first[1:] == (0, 0.5)


def refused():
    rank = dist.get_rank()
    messages = []
    for buffer in (torch.zeros(2 + rank), torch.zeros(2, dtype=[torch.float32, torch.int64][rank])):
        module = nn.Module()
        module.register_buffer("b", buffer)
        try:
            synchronise_buffers(module, ["b"], Ranks.open())
        except SidError as error:
            messages.append(str(error))
    module = nn.Module()
    names = ["b", "c"][: 1 + rank]
    for name in names:
        module.register_buffer(name, torch.zeros(1))
    try:
        synchronise_buffers(module, names, Ranks.open())
    except SidError as error:
        messages.append(str(error))
    model = Toy()
    model.register_buffer("codebook", torch.zeros(3, device="meta"))
    try:
        shard(model)
    except SidError as error:
        messages.append(str(error))
    return messages


def test_buffers_that_cannot_be_made_equal_are_refused():
    for messages in run_ranks(refused, 2):
        assert len(messages) == 4
        assert "buffer 'b': is ((2,), 'torch.float32') on rank" in messages[0] or "(3,)" in messages[0]
        assert "torch.int64" in messages[1]
        assert "same configuration" in messages[2]
        assert "buffer 'codebook': is on the meta device" in messages[3]


def ranks_agree():
    ranks = Ranks.open()
    found = [ranks.all(lambda: ranks.rank, where="x"), ranks.first(lambda: ranks.rank, where="x")]

    def fail():
        if ranks.rank == 1:
            raise OSError(28, "No space left on device", "/tmp/file")
        return 0

    def fail_first():
        raise KeyError("missing")

    for call in (lambda: ranks.all(fail, where="here"), lambda: ranks.first(fail_first, where="there")):
        try:
            call()
        except SidError as error:
            found.append(str(error))
    return found


def test_ranks_fail_together_with_one_message():
    first, second = run_ranks(ranks_agree, 2)
    assert first == second
    assert first[:2] == [[0, 1], 0]
    assert first[2].startswith("here: rank 1: No space left on device (/tmp/file).")
    assert first[3].startswith("there: rank 0: KeyError: 'missing'.")
