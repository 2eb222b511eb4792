"""`kill -9` at seeded random moments of a training; started again, it must end with the same weights.

`python -m tests.distributed.kill_matrix --json FILE` runs every case: one rank and all ranks, each at 20
random steps, half of them while that step's checkpoint is being written, in the background every other
time. tests/distributed/test_killed_training.py runs a few of them.
"""

import argparse
import itertools
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

from apps.train import train
from tests.distributed.launch import join_group
from tests.logs import small_log
from torchrec_sid.artifact import write_json
from torchrec_sid.catalog import SidCatalog
from torchrec_sid.models.build import RankingConfig
from torchrec_sid.parallel.checkpoint_files import list_checkpoints, read_checkpoint, verify_files
from torchrec_sid.spec import SidSpec
from torchrec_sid.training.train_config import TrainConfig

WORLD = 2
STEPS = 24
EVERY = 3
FORWARD_MODULES = 12
"""A kill in the middle of a step comes before one of so many of the first modules of the next forward."""
FILE_EVENTS = 16
"""A kill in a checkpoint comes before one of so many of the first file operations of the rank."""
ENDS_WITHIN = 60
"""Seconds for the rank that is left to notice."""


class Case(NamedTuple):
    """When which ranks die."""

    whole: bool
    """All ranks, or the acting one alone."""
    rank: int
    """Which rank acts."""
    step: int
    """The last step that it completes."""
    moment: str
    """`forward` of the next step, or `checkpoint`, of this step."""
    event: int
    """Modules called or files touched before it dies."""
    delay: float
    """Seconds between that and the kill, which then hits anything."""
    asynchronous: bool
    """Whether checkpoints are written in the background."""


def cases(count: int, seed: int = 0) -> Iterator[Case]:
    """``count`` random steps, each for one rank and for all of them."""
    chance = random.Random(seed)
    for number, whole in itertools.product(range(count), (False, True)):
        moment = ("forward", "checkpoint")[number % 2]
        step = chance.randrange(EVERY, STEPS - EVERY)
        events = FILE_EVENTS if moment == "checkpoint" else FORWARD_MODULES
        yield Case(
            whole,
            chance.randrange(WORLD),
            step - step % EVERY if moment == "checkpoint" else step,
            moment,
            chance.randrange(events),
            chance.choice((0.0, chance.uniform(0, 0.02))),
            number // 2 % 2 == 1,
        )


def prepare_case(folder: Path) -> TrainConfig:
    """The log and the catalog of all runs, and the configuration of the run that nobody kills."""
    log = small_log(folder)
    codes = torch.randint(0, 8, (log.items, 3), generator=torch.Generator().manual_seed(7))
    ids = torch.tensor(log.item_ids)
    SidCatalog.create(folder / "catalog", SidSpec((8, 8, 8)), ids, codes, "0" * 64)
    return TrainConfig(
        data=str(folder / "log"),
        output=str(folder / "whole"),
        catalog=str(folder / "catalog"),
        model=RankingConfig(arm="hashed_prefix", dim=16, history_length=20, table_rows=100),
        batch_size=256,
        epochs=2,
        max_steps=STEPS,
        checkpoint_every=EVERY,
    )


def run(config: TrainConfig, case: Case | None = None) -> list[int]:
    """Train on two processes; their exit codes, negative where a signal ended one."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as rendezvous:
        ranks = [
            context.Process(target=_rank, args=(config, rank, rendezvous, case)) for rank in range(WORLD)
        ]
        for process in ranks:
            process.start()
            # One group, so that one signal kills all of them at once.
            os.setpgid(process.pid, ranks[0].pid)
        try:
            while all(process.is_alive() for process in ranks):
                ranks[0].join(0.05)
            deadline = time.monotonic() + ENDS_WITHIN
            for process in ranks:
                process.join(max(0.0, deadline - time.monotonic()))
                assert not process.is_alive(), f"a rank was left and did not end: {said(config)}"
        finally:
            for process in ranks:
                process.kill()
                process.join()
    return [process.exitcode for process in ranks]


def check_case(case: Case, whole: TrainConfig, folder: Path) -> dict[str, Any]:
    """Kill a run as the case says, start it again, and compare how it ends.

    Returns:
        What was seen, for the report.
    """
    killed = replace(whole, output=str(folder), asynchronous_checkpoints=case.asynchronous)
    began = time.monotonic()
    codes = run(killed, case)
    dead = range(WORLD) if case.whole else [case.rank]
    assert all(codes[rank] == -signal.SIGKILL for rank in dead), f"not killed: {codes} {said(killed)}"
    assert all(codes), f"a rank went on alone: {codes}"
    checkpoints = Path(killed.output) / "checkpoints"
    left = [read_checkpoint(path) for path in list_checkpoints(checkpoints)]
    for info in left:
        verify_files(info, info.files)
    torn = any(checkpoints.glob(".*ing-*"))
    assert run(killed) == [0] * WORLD, said(killed)
    assert last_weights(killed) == last_weights(whole), "it ended with other weights"
    assert metrics_of(killed) == metrics_of(whole), "it ended with other metrics"
    return {
        **case._asdict(),
        "resumed_from": max((info.step for info in left), default=0),
        "half_written": torn,
        "exit_codes": codes,
        "seconds": round(time.monotonic() - began, 1),
    }


def last_weights(config: TrainConfig) -> tuple[int, dict[str, bytes]]:
    """The last checkpoint: its step, and the content of each rank's file of weights and optimizer state."""
    info = read_checkpoint(list_checkpoints(Path(config.output) / "checkpoints")[-1])
    return info.step, {path.name: path.read_bytes() for path in info.path.glob("*.distcp")}


def metrics_of(config: TrainConfig) -> str:
    """The metrics of all slices, digit for digit."""
    return (Path(config.output) / "metrics.json").read_text().split('"slices"')[1]


def said(config: TrainConfig) -> str:
    """The last lines of every rank."""
    logs = sorted(Path(config.output).glob("rank-*.log"))
    return "\n".join(f"{log.name}: {log.read_text()[-2000:]}" for log in logs)


def _rank(config: TrainConfig, rank: int, rendezvous: str, case: Case | None) -> None:
    join_group(rank, WORLD, WORLD, rendezvous)
    Path(config.output).mkdir(exist_ok=True)
    with (Path(config.output) / f"rank-{rank}.log").open("w") as sys.stderr:
        try:
            if case is not None and rank == case.rank:
                _arm(case)
            train(config, torch.device("cpu"))
            torch.distributed.barrier()
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
    torch.distributed.destroy_process_group()


def _arm(case: Case) -> None:
    """Count steps, then modules or file operations, and kill."""
    steps, events = itertools.count(1), itertools.count()
    due = False

    def after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        nonlocal due
        # TorchRec's wrappers are optimizers too; Adam steps once in a training step.
        if isinstance(optimizer, torch.optim.Adam):
            due = next(steps) >= case.step

    def happened(*_: Any) -> None:
        if due and next(events) == case.event:
            time.sleep(case.delay)
            if case.whole:
                os.killpg(os.getpgrp(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)

    def touched(name: str, arguments: tuple[Any, ...]) -> None:
        # Before it happens: open, mkdir, rename, remove, listdir and the like.
        if due and any(isinstance(a, (str, Path)) and "/checkpoints" in str(a) for a in arguments):
            happened()

    register_optimizer_step_post_hook(after_step)
    if case.moment == "forward":
        register_module_forward_pre_hook(happened)
    else:
        sys.addaudithook(touched)


def main() -> None:
    """Every case; ends with a table and with 1 if one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=20, help="random steps, each for one rank and for all")
    parser.add_argument("--first", type=int, default=0, help="case to begin with")
    parser.add_argument("--last", type=int, help="case to end before")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    console, rows, failed = Console(soft_wrap=True), [], 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole = prepare_case(folder)
        assert run(whole) == [0] * WORLD
        todo = list(cases(options.count))[options.first : options.last]
        for number, case in enumerate(todo, options.first):
            try:
                rows.append({"case": number, **check_case(case, whole, folder / f"killed-{number}")})
            except AssertionError as error:
                failed += 1
                rows.append({"case": number, **case._asdict(), "failed": str(error)})
            console.print(rows[-1])
    console.print(f"{len(rows) - failed} of {len(rows)} ended with the weights of the uninterrupted run")
    if options.json is not None:
        write_json(options.json, {"rows": rows})
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
