"""Train the rows of a paper's table on a log, and report them.

    torchrec-sid paper --table 2 --data FOLDER --seeds 3
    torchrec-sid paper --table 2 --data FOLDER --rows_file my_rows.py --rows full_id mine

OUTPUT gets table.json, table.md, table.html, plot.png and a run directory per row and seed, each with the
`run.yaml` that repeats it: `torchrec-sid train --config RUN/run.yaml`, or with any number of processes
`torchx run train --nproc_per_node 8 -- --config RUN/run.yaml`. Rows that an earlier call finished are not
trained again.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from torchrec_sid.artifact.place import locate
from torchrec_sid.data.prepare_config import PrepareConfig
from torchrec_sid.errors import SidError
from torchrec_sid.parallel.optimizer import TableOptimizer
from torchrec_sid.plugins import load_plugins
from torchrec_sid.training.train_config import TABLE_OPTIMIZER, TrainConfig

from .cli import command_line, parse_config, plain_errors, wide_console
from .harness import Effort, run_rows
from .recipes import TABLES
from .report import plot_gains, summarise, terminal_table, write_report
from .rows import Comparison
from .rundir import git_commit
from .saved_tables import save_table
from .search import with_choices


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
    rows_file: str | None = None
    """Python file with a function rows(items): rows of one's own beside these, see docs/results.md."""
    plugin: tuple[str, ...] = ()
    """Python files that add quantizers, schemes or channels."""
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
    epochs: int = 1
    """Passes over the training events, at most."""
    minutes: float | None = None
    """Begin no training later than this; the same call goes on where it stopped."""
    chosen: str | None = None
    """File of torchrec-sid search: rows whose names it holds train with what it chose for them."""
    save: str | None = None
    """Folder of finished tables, such as docs/tables: LOG-TABLE.json there gets the rows of this call."""
    max_steps: int | None = None
    """Stop each training after so many steps: for a quick look."""
    specification: str | None = None
    """What the log's columns are (YAML, see docs/data.md): its features reach every row. Default:
    specification.yaml in DATA, else item, history and time alone."""
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    """How the log becomes examples."""

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
        report = paper(config, Console())
    console = wide_console(180)
    console.print(terminal_table(report))
    console.print(report["verdict"], markup=False)


def paper(config: PaperConfig, console: Console) -> dict[str, Any]:
    """Train the rows of a table and write it.

    Returns:
        What ``OUTPUT/table.json`` holds.

    Raises:
        SidError: bad data, no such row, or a training that failed.
    """
    for file in config.plugin:
        load_plugins(file)
    dataset = locate(config.data).name
    output = Path(config.output or Path("out/paper") / dataset / config.table)
    base = TrainConfig(
        data=config.data,
        output=str(output / "runs"),
        specification=config.specification,
        prepare=config.prepare,
        source=config.source,
        tables=config.tables,
        evaluate_on=config.evaluate_on,
        epochs=config.epochs,
        max_steps=config.max_steps,
    )

    def rows(items: int) -> Comparison:
        table = TABLES[config.table](items)
        if config.rows_file:
            table = table.with_file(config.rows_file, items)
        table = table.chosen(config.rows)
        return table if config.chosen is None else with_choices(table, Path(config.chosen))

    content = {"source": config.source, "categories": config.categories, "separator": config.separator}
    content = {name: value for name, value in content.items() if value}
    effort = Effort(config.seeds, jobs=config.jobs, minutes=config.minutes)
    trained = run_rows(rows, base, effort, output.parent, console, content=content)
    report = summarise(trained) | {
        "dataset": dataset,
        "world_size": 1,
        "seeds": list(range(max(map(len, trained.runs.values())))),
        "command": command_line(),
        "git": git_commit(),
        "evaluated_on": config.evaluate_on,
    }
    write_report(report, output, stem="table")
    if config.save:
        save_table(Path(config.save), f"{dataset}-{config.table}", report, trained)
    plot_gains(report["rows"], report["cost"], output / "plot.png")
    return report


if __name__ == "__main__":
    main()
