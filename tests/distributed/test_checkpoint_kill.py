"""Kill -9 while checkpoints are being written: what is left is whole, and the newest loads."""

import multiprocessing
import os
import random
import signal
import tempfile
import time

import torch

from tests.distributed.launch import join_group, run_ranks
from tests.parallel.toy import Toy
from torchrec_sid.parallel.checkpoint import CheckpointManager
from torchrec_sid.parallel.checkpoint_files import list_checkpoints
from torchrec_sid.parallel.embedding_tables import local_shards
from torchrec_sid.parallel.optimizer import TableOptimizer
from torchrec_sid.parallel.planner_config import PlannerConfig, TopologyConfig
from torchrec_sid.parallel.sharding import shard_model

ROUNDS, MOST_ROUNDS = 6, 40
PATIENCE = 240


def make_state():
    sharded = shard_model(
        Toy(rows=20_000, dim=16),
        PlannerConfig(TopologyConfig(device="cpu")),
        device=torch.device("cpu"),
        table_optimizer=TableOptimizer(),
        seed=0,
    )
    return {"model": sharded.model.state_dict()}


def values(state):
    return [shard.tensor for weight in state["model"].values() for shard in local_shards(weight)]


def resume(manager, state):
    """The step of the newest checkpoint; every weight in it must have that value."""
    info = manager.latest()
    if info is None:
        return 0
    assert manager.load(info, state) == {"value": info.step}
    for tensor in values(state):
        assert torch.all(tensor == info.step), info
    return info.step


def save_without_end(folder, rank, world, rendezvous, asynchronous):
    join_group(rank, world, world, rendezvous)
    state = make_state()
    with CheckpointManager(folder, asynchronous=asynchronous) as manager:
        step = resume(manager, state)
        while True:
            step += 1
            for tensor in values(state):
                tensor.fill_(step)
            manager.save(step, state, {"value": step})


def check(folder):
    state = make_state()
    with CheckpointManager(folder) as manager:
        return resume(manager, state)


def test_the_newest_checkpoint_always_loads(tmp_path):
    context = multiprocessing.get_context("fork")
    chance = random.Random(7)
    before = torn = 0
    for attempt in range(MOST_ROUNDS):
        # A kill between two checkpoints shows nothing: go on until some have hit one being written.
        if attempt >= ROUNDS and torn:
            break
        with tempfile.TemporaryDirectory() as rendezvous:
            ranks = [
                context.Process(
                    target=save_without_end, args=(tmp_path, rank, 2, rendezvous, attempt % 2 == 1)
                )
                for rank in range(2)
            ]
            for process in ranks:
                process.start()
            deadline = time.monotonic() + PATIENCE
            while newest(tmp_path) <= before and time.monotonic() < deadline:
                assert all(process.is_alive() for process in ranks), f"a rank failed in round {attempt}"
                time.sleep(0.01)
            time.sleep(chance.uniform(0, 0.15))
            # Alternately one rank, which the other must notice, and all of them.
            victims = ranks if attempt % 4 < 2 else ranks[attempt % 2 :][:1]
            for process in victims:
                os.kill(process.pid, signal.SIGKILL)
            for process in ranks:
                process.join(PATIENCE)
                assert not process.is_alive(), "the other rank did not notice"
        assert newest(tmp_path) > before
        before = newest(tmp_path)
        torn += any(tmp_path.glob(".writing-*"))
    assert torn, "no kill hit a checkpoint being written: the test shows nothing"
    assert run_ranks(check, 2, tmp_path) == [before, before]
    # Two are kept, and a third if the kill hit between the new one and the deletion of the oldest.
    assert len(list_checkpoints(tmp_path)) <= 3


def newest(folder):
    found = list_checkpoints(folder)
    return int(found[-1].name.split("-")[-1]) if found else 0
