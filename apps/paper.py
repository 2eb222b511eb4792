"""The papers' tables on a log: `python -m apps.paper --table 1 --data ../shared/data/ml1m --seeds 3`.

OUTPUT gets table.json, table.md, plot.png and a run directory per row and seed, each with the `run.yaml`
that repeats it: `python -m apps.train --config RUN/run.yaml`, or with any number of processes
`torchx run -s local_cwd apps/components.py:train --nproc_per_node 8 -- --config RUN/run.yaml`. Rows that
an earlier call finished are not trained again.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from torchrec_sid.data.prepare import PrepareConfig, prepare
from torchrec_sid.data.prepared import PreparedLog
from torchrec_sid.data.schema import LogFolder
from torchrec_sid.errors import SidError
from torchrec_sid.models.channels import arm_named
from torchrec_sid.parallel.optimizer import TableOptimizer
from torchrec_sid.parallel.ranks import process_group
from torchrec_sid.training.train_config import TABLE_OPTIMIZER, TrainConfig

from .cli import command_line, parse_config, plain_errors
from .launch import write_options
from .learn_sids import LearnedSids, learn_sids, sid_options
from .paper_report import paper_report, paper_table, write_paper
from .recipes import TABLES, PaperTable, Row
from .rundir import git_commit, set_up_logging
from .runs import claim_run
from .train import train


@dataclass(frozen=True)
class PaperConfig:
    """One table on one log."""

    data: str
    """Folder of the log, in the format of docs/data.md."""
    table: str = "1"
    """Which table, see apps/recipes.py."""
    output: str | None = None
    """Folder to write; default: out/paper/LOG/TABLE."""
    seeds: int = 3
    """Trainings per row, seeds 0 .. SEEDS - 1."""
    rows: tuple[str, ...] = ()
    """Only rows that have one of these in their name, and those they are measured against; default: all."""
    jobs: int = 2
    """Trainings at a time, each a process with one thread."""
    evaluate_on: str = "test"
    """Split that the table is about; tune on valid."""
    source: str | None = None
    """Embedding source of the SIDs of one source and of dense; default: the log's own."""
    categories: tuple[str, ...] = ()
    """Category columns of items.parquet that fused SIDs take in beside all embedding sources."""
    separator: str | None = None
    """What stands between several values of a category."""
    tables: TableOptimizer = TABLE_OPTIMIZER
    """Optimizer of the embedding tables."""
    max_steps: int | None = None
    """Stop each training after so many steps: for a quick look."""

    def __post_init__(self) -> None:
        if self.table not in TABLES:
            raise SidError("table", repr(self.table), f"Choose one of {', '.join(TABLES)}.")
        if min(self.seeds, self.jobs) < 1:
            raise SidError("seeds, jobs", f"{self.seeds}, {self.jobs}", "Choose 1 or more.")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    with plain_errors():
        config = parse_config(PaperConfig, __doc__, argv)
    console = Console()
    with plain_errors():
        report = paper(config, console)
    if not console.is_terminal:  # a log has no width: do not cut the table
        console = Console(width=180)
    console.print(paper_table(report))


def paper(config: PaperConfig, console: Console) -> dict[str, Any]:
    """Train the rows of a table and write it.

    Returns:
        What ``OUTPUT/table.json`` holds.

    Raises:
        SidError: bad data, no such row, or a training that failed.
    """
    data = Path(config.data)
    output = Path(config.output or Path("out/paper") / data.name / config.table)
    home = output.parent
    with console.status(f"preparing {data}"):
        log = prepare(data, home / "prepared", PrepareConfig())
    sources = LogFolder.open(data).sources
    table = chosen_rows(TABLES[config.table](log.items), config.rows)
    if len(sources) == 1:
        table = replace(table, rows=tuple(row for row in table.rows if not row.every_source))
    learned = {}
    needed = {name for row in table.rows for name in (row.tables, row.side) if name is not None}
    for name in sorted(needed):
        recipe = replace(
            table.sids[name],
            source=config.source,
            categories=config.categories,
            separator=config.separator,
        )
        with console.status(f"learning SIDs: {name}"):
            learned[name] = learn_sids(recipe, data, log, home / "sids" / name.replace(" ", "-"))
    runs = _runs(config, table, learned, log, output, sources)
    _train_all(runs, learned, log, config.jobs, console)
    report = paper_report(
        table, {name: [Path(run.output) for run in mine] for name, mine in runs.items()}, log
    )
    report |= {
        "dataset": data.name,
        "evaluated_on": config.evaluate_on,
        "seeds": list(range(config.seeds)),
        "command": command_line(),
        "git": git_commit(),
    }
    write_paper(report, output)
    return report


def chosen_rows(table: PaperTable, wanted: tuple[str, ...]) -> PaperTable:
    """The table with only the rows that were asked for, and those they are measured against.

    Raises:
        SidError: a name that no row has.
    """
    names = [row.name for row in table.rows]
    for part in wanted:
        if not any(part in name for name in names):
            raise SidError("rows", repr(part), f"Choose from: {'; '.join(names)}.")
    kept = {row.name for row in table.rows if not wanted or any(part in row.name for part in wanted)}
    kept |= {row.against or names[0] for row in table.rows if row.name in kept}
    return replace(table, rows=tuple(row for row in table.rows if row.name in kept))


def _runs(
    config: PaperConfig,
    table: PaperTable,
    learned: dict[str, LearnedSids],
    log: PreparedLog,
    output: Path,
    sources: Sequence[str],
) -> dict[str, list[TrainConfig]]:
    """Row name -> its trainings."""

    def run(row: Row, seed: int) -> TrainConfig:
        arm = arm_named(row.model.arm)
        name = row.name.replace(" ", "-").replace("+", "and")
        return TrainConfig(
            data=config.data,
            output=str(output / "runs" / f"{name}-seed{seed}"),
            prepared=str(log.path),
            **sid_options(arm, learned.get(row.tables or ""), learned.get(row.side or "")),
            shuffle_sids=row.shuffled,
            hide_new=row.hide_new,
            source="+".join(sources) if row.every_source else config.source,
            model=row.model,
            tables=config.tables,
            evaluate_on=config.evaluate_on,
            max_steps=config.max_steps,
            predictions=True,
            seed=seed,
        )

    return {row.name: [run(row, seed) for seed in range(config.seeds)] for row in table.rows}


def _train_all(
    runs: dict[str, list[TrainConfig]],
    learned: dict[str, LearnedSids],
    log: PreparedLog,
    jobs: int,
    console: Console,
) -> None:
    """Every training that is not done; seeds outermost, so that an interrupted table is balanced."""
    marks = {"log": log.fingerprint}
    by_path = {str(sids.catalog): sids.fingerprint for sids in learned.values()}
    todo = []
    for seed in range(max(len(mine) for mine in runs.values())):
        for mine in runs.values():
            run = mine[seed]
            sids = {path: by_path[path] for path in (run.catalog, run.side_catalog) if path}
            if not claim_run(run, 1, marks | sids):
                todo.append(run)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )
    context = multiprocessing.get_context("spawn")
    with bar, ProcessPoolExecutor(jobs, mp_context=context, initializer=_start_worker) as pool:
        task = bar.add_task("training", total=len(todo))
        for done in _finished(pool, todo):
            bar.update(task, description=Path(done.output).name[:48], advance=1)


def _finished(pool: ProcessPoolExecutor, todo: list[TrainConfig]) -> Iterator[TrainConfig]:
    futures = {pool.submit(_train, run): run for run in todo}
    try:
        for future in as_completed(futures):
            future.result()
            yield futures[future]
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise


def _start_worker() -> None:
    """A process that trains one model after another, alone in its group."""
    set_up_logging()
    logging.disable(logging.INFO)
    os.environ.pop("MASTER_PORT", None)
    torch.set_num_threads(1)


def _train(run: TrainConfig) -> None:
    # Groups of its own: each has threads that wake up for as long as it lives.
    with process_group() as device:
        write_options(run)
        train(run, device)


if __name__ == "__main__":
    main()
