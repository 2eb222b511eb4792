"""Examples per second of each arm: 1 and 2 processes, pipelined or not, our loop and a bare TorchRec one.

`python -m apps.bench.training [--quick] --json FILE`, in pieces with `--arms` and `--processes`: rows that
FILE has of other arms and processes stay. The loops alternate in the same processes on equal models and
batches; the median over repeats counts. A bare loop calls TorchRec's pipeline and nothing else; ours does
what apps.train does beside that: the position, the learning rate, progress, TensorBoard and the rank's log.
CPU time is rank 0's, and tells the loops apart on a busy machine too.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torchrec.distributed.train_pipeline import TrainPipelineBase, TrainPipelineSparseDist

from torchrec_sid.artifact import write_json
from torchrec_sid.data.prepare import prepare
from torchrec_sid.data.prepared import PreparedLog
from torchrec_sid.data.reader import BatchReader
from torchrec_sid.data.specification import Specification
from torchrec_sid.data.synthetic import SyntheticConfig, write_synthetic
from torchrec_sid.models.build import Ranking, RankingConfig, build_ranking
from torchrec_sid.models.channels import ARMS
from torchrec_sid.models.stores import ContentStore, SideStore, SidStore
from torchrec_sid.parallel.optimizer import TableOptimizer
from torchrec_sid.parallel.planner_config import PlannerConfig
from torchrec_sid.parallel.sharding import ShardedModel, shard_model
from torchrec_sid.side.basis import FrozenBasis
from torchrec_sid.spec import SidSpec
from torchrec_sid.tables import PieceTrainerConfig, SidPieces, train_pieces
from torchrec_sid.training.log_features import log_sizes
from torchrec_sid.training.loop import TrainingLoop
from torchrec_sid.training.progress_line import TrainingProgress
from torchrec_sid.training.recorder import StepRecorder
from torchrec_sid.training.run import batch_config
from torchrec_sid.training.schedule import RateSchedule

from ..rundir import set_up_logging
from .loop_cost import loop_cost_us
from .prepare_events import write_wide_log

_SPEC = SidSpec((64, 64, 64, 64))
_SIDE = SidSpec((3,) * 25)
_BATCH = 512


@dataclass(frozen=True)
class BenchConfig:
    """How much to measure."""

    steps: int = 60
    """Steps of each measurement."""
    repeats: int = 5
    """Measurements of each kind, alternating."""
    arms: tuple[str, ...] = (*ARMS, "sentencepiece", "side")
    """Which arms."""
    processes: tuple[int, ...] = (1, 2)
    """Numbers of processes."""


QUICK = BenchConfig(steps=20, repeats=2, arms=("none", "full_id", "hashed_prefix"))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer arms, steps and repeats")
    parser.add_argument("--arms", nargs="*", help="only these")
    parser.add_argument("--processes", nargs="*", type=int, help="only these")
    parser.add_argument(
        "--features", type=float, help="log of so many events with 40 features, arm full_id"
    )
    parser.add_argument("--json", type=Path, help="where to write the rows")
    options = parser.parse_args()
    set_up_logging()
    config = QUICK if options.quick else BenchConfig()
    config = replace(
        config,
        arms=tuple(options.arms or config.arms),
        processes=tuple(options.processes or config.processes),
    )
    with tempfile.TemporaryDirectory() as folder:
        log = _log(Path(folder), options.features)
        if options.features:
            config = replace(config, arms=("full_id",))
        cost = loop_cost_us(Path(folder) / "board")
        rows: list[dict[str, Any]] = []
        for processes in config.processes:
            for measured in _measure(config, log, processes):
                rows += measured
                if options.json is not None:
                    every = [*_others(options.json, rows), *rows]
                    write_json(options.json, {"rows": every, "loop_cpu_us_per_step": cost})
    console = Console()
    if not console.is_terminal:  # a log has no width: do not cut the table
        console = Console(width=120)
    console.print(_table(rows))
    console.print(f"our loop itself: {cost:.1f} microseconds of CPU time a step")


def _log(folder: Path, events: float | None) -> PreparedLog:
    """The synthetic log, or one of random events with 40 features."""
    if events is None:
        write_synthetic(folder / "log", SyntheticConfig())
        return prepare(folder / "log", folder / "prepared")
    file = write_wide_log(folder / "log", int(events), features=True)
    assert file is not None
    return prepare(folder / "log", folder / "prepared", specification=Specification.read(file))


def _others(file: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What an earlier piece of the bench wrote of other arms and processes."""
    measured = {(row["arm"], row["processes"]) for row in rows}
    earlier = json.loads(file.read_text())["rows"] if file.is_file() else []
    return [row for row in earlier if (row["arm"], row["processes"]) not in measured]


def _measure(config: BenchConfig, log: PreparedLog, processes: int) -> Iterator[list[dict[str, Any]]]:
    """The rows of each arm in turn."""
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=_rank, args=(config, log, rank, processes, folder, results))
            for rank in range(processes)
        ]
        for process in ranks:
            process.start()
        for _ in config.arms:
            # A failed rank would leave the others waiting for ever, and this one for its rows.
            while all(process.is_alive() for process in ranks) and results.empty():
                ranks[0].join(0.2)
            if results.empty():
                for process in ranks:
                    process.kill()
                raise SystemExit("a process of the bench failed; see its message above")
            yield results.get()
        for process in ranks:
            process.join()


def _rank(config: BenchConfig, log: PreparedLog, rank: int, world: int, folder: str, results: Any) -> None:
    os.environ |= {"LOCAL_WORLD_SIZE": str(world), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    for arm in config.arms:
        rows: list[dict[str, Any]] = []
        for pipelined in (False, True):
            rows += _measure_arm(config, log, arm, pipelined, Path(folder) / f"board{rank}")
        if rank == 0:
            results.put(rows)
    dist.barrier()
    dist.destroy_process_group()


def _measure_arm(
    config: BenchConfig, log: PreparedLog, arm: str, pipelined: bool, board: Path
) -> list[dict[str, Any]]:
    world = dist.get_world_size()
    loops: dict[str, Callable[[], None]] = {
        "ours": _our_loop(config, log, arm, pipelined, board),
        "bare": _bare_loop(config, log, arm, pipelined),
    }
    rates: dict[str, list[float]] = {name: [] for name in loops}
    work: dict[str, list[float]] = {name: [] for name in loops}
    peaks = dict.fromkeys(loops, 0.0)
    for repeat in range(config.repeats + 1):
        for name, run in loops.items():
            _reset_peak()
            dist.barrier()
            started, worked = time.perf_counter(), time.process_time()
            run()
            dist.barrier()
            if repeat:  # the first one traces the model and warms up
                work[name].append((time.process_time() - worked) * 1000 / config.steps)
                rates[name].append(config.steps * _BATCH / (time.perf_counter() - started))
                peaks[name] = max(peaks[name], _peak_mb())
    return [
        {
            "arm": arm,
            "processes": world,
            "pipelined": pipelined,
            "loop": name,
            "examples_per_second": statistics.median(rates[name]),
            "cpu_ms_per_step": statistics.median(work[name]),
            "peak_rss_mb": peaks[name],
        }
        for name in loops
    ]


def _build(log: PreparedLog, arm: str) -> tuple[Ranking, ShardedModel]:
    torch.manual_seed(0)
    content = torch.randn(log.items, 384, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 64, (log.items, 4), generator=generator)
    trits = torch.randint(0, 3, (log.items, _SIDE.levels), generator=generator)
    ranking = build_ranking(
        RankingConfig(arm=arm),
        log_sizes(log, RankingConfig().dim),
        (
            SidStore(
                _SPEC, _pieces() if arm == "sentencepiece" else None, values={"sid": _SPEC.pack(codes)}
            ),
            SideStore(
                FrozenBasis.from_digits(_SIDE, torch.randn(_SIDE.levels, 384)),
                values={"bytes": _SIDE.pack_bytes(trits)},
            ),
            ContentStore(content),
        ),
    )
    sharded = shard_model(
        ranking.module,
        PlannerConfig(),
        device=torch.device("cpu"),
        table_optimizer=TableOptimizer("adagrad", lr=0.05),
        seed=0,
    )
    return ranking, sharded


@functools.cache
def _pieces() -> SidPieces:
    codes = torch.randint(0, 64, (4000, 4), generator=torch.Generator().manual_seed(0))
    codes[:, 1] = (codes[:, 0] + codes[:, 1] % 8) % 64
    return train_pieces(_SPEC, codes, PieceTrainerConfig(1000))


def _read(log: PreparedLog, ranking: Ranking, steps: int) -> list[Any]:
    """Batches in memory, so that reading is not what is measured."""
    world = dist.get_world_size()
    reader = BatchReader(
        log,
        "train",
        batch_config(ranking, _BATCH // world, 64),
        rank=dist.get_rank(),
        world_size=world,
        item_values=ranking.item_values,
    )
    return list(itertools.islice(reader, steps))


def _adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=2e-3)


def _our_loop(
    config: BenchConfig, log: PreparedLog, arm: str, pipelined: bool, folder: Path
) -> Callable[[], None]:
    ranking, sharded = _build(log, arm)
    batches = _read(log, ranking, config.steps)
    dense: list[torch.optim.Optimizer] = []

    def make_dense(parameters: Any) -> torch.optim.Optimizer:
        dense.append(_adam(parameters))
        return dense[-1]

    loop = TrainingLoop(
        sharded.model, sharded.make_optimizer(make_dense), torch.device("cpu"), pipelined=pipelined
    )
    recorder = StepRecorder(folder, dist.get_rank())
    schedule = RateSchedule(dense[0].param_groups, 1_000_000)

    # Made once in a run, as in apps.train; a repeat is one more epoch.
    progress = TrainingProgress(config.steps, enabled=dist.get_rank() == 0)

    def run() -> None:
        loop.train(
            lambda epoch, start: batches,
            loop.position.epoch + 1,
            progress=progress,
            on_step=recorder,
            schedule=schedule.set,
        )

    return run


def _bare_loop(config: BenchConfig, log: PreparedLog, arm: str, pipelined: bool) -> Callable[[], None]:
    ranking, sharded = _build(log, arm)
    batches = _read(log, ranking, config.steps)
    optimizer = sharded.make_optimizer(_adam)
    device = torch.device("cpu")
    sparse = (
        TrainPipelineSparseDist(sharded.model, optimizer, device, pipeline_postproc=True)
        if pipelined and sharded.tables
        else None
    )

    def run() -> None:
        pipeline = sparse or TrainPipelineBase(sharded.model, optimizer, device)
        iterator = iter(batches)
        sharded.model.train()
        while True:
            try:
                pipeline.progress(iterator)
            except StopIteration:
                return

    return run


def _reset_peak() -> None:
    """Start a new peak of resident memory (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def _peak_mb() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("no VmHWM in /proc/self/status")


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="examples per second")
    headings = (
        "arm",
        "processes",
        "pipelined",
        "ours",
        "bare",
        "ours / bare",
        "CPU bare / ours",
        "peak MB",
    )
    for name in headings:
        table.add_column(name, justify="left" if name == "arm" else "right")
    for ours, bare in zip(rows[::2], rows[1::2], strict=True):
        rates = ours["examples_per_second"], bare["examples_per_second"]
        table.add_row(
            ours["arm"],
            str(ours["processes"]),
            str(ours["pipelined"]),
            f"{rates[0]:,.0f}",
            f"{rates[1]:,.0f}",
            f"{rates[0] / rates[1]:.3f}",
            f"{bare['cpu_ms_per_step'] / ours['cpu_ms_per_step']:.3f}",
            f"{ours['peak_rss_mb']:,.0f}",
        )
    return table


if __name__ == "__main__":
    main()
