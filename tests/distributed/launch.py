"""Run a function on several gloo processes, forked from the test so that nothing is imported again."""

import contextlib
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT_SECONDS = 300


def run_ranks(
    function: Callable[..., Any], world_size: int, *arguments: Any, local_size: int = 0
) -> list[Any]:
    """``function(*arguments)`` on each rank of a gloo process group; the results in rank order.

    Fails with the traceback of the lowest rank that raised.
    """
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(
                target=_child,
                args=(function, arguments, rank, world_size, local_size or world_size, folder, results),
            )
            for rank in range(world_size)
        ]
        outcomes: dict[int, tuple[bool, Any]] = {}
        for process in ranks:
            process.start()
        try:
            outcomes = _collect(ranks, results, world_size)
        finally:
            for process in ranks:
                process.join(30 if len(outcomes) == world_size else 0)
                if process.is_alive():
                    process.kill()
    for rank, (failed, value) in sorted(outcomes.items()):
        if failed:
            raise AssertionError(f"rank {rank}:\n{value}")
    if len(outcomes) < world_size:
        raise AssertionError(
            f"ranks {sorted(set(range(world_size)) - set(outcomes))} ended without a result"
        )
    return [outcomes[rank][1] for rank in range(world_size)]


def _collect(ranks: list[Any], results: Any, world_size: int) -> dict[int, tuple[bool, Any]]:
    outcomes: dict[int, tuple[bool, Any]] = {}
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        while not results.empty():
            rank, failed, value = results.get()
            outcomes[rank] = (failed, value)
            if failed:
                return outcomes
        if len(outcomes) == world_size or not any(process.is_alive() for process in ranks):
            break
        time.sleep(0.01)
    while not results.empty():
        rank, failed, value = results.get()
        outcomes[rank] = (failed, value)
    return outcomes


def _child(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    rank: int,
    world_size: int,
    local_size: int,
    folder: str,
    results: Any,
) -> None:
    join_group(rank, world_size, local_size, folder)
    try:
        results.put((rank, False, function(*arguments)))
    except BaseException:
        results.put((rank, True, traceback.format_exc()))
        os._exit(1)
    # Leave together: gloo aborts a rank whose peer closes a connection that it still reads. The result is
    # out, so that how the others leave changes nothing.
    with contextlib.suppress(RuntimeError):
        dist.barrier()
        dist.destroy_process_group()
    os._exit(0)


def join_group(rank: int, world_size: int, local_size: int, folder: str) -> None:
    """Make this process a rank of a gloo group that meets in ``folder``."""
    os.environ |= {
        "GLOO_SOCKET_IFNAME": "lo",
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank % local_size),
        "LOCAL_WORLD_SIZE": str(local_size),
    }
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
