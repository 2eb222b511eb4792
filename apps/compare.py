"""Learn SIDs, train every arm, and compare them in one report: the main job.

    torchrec-sid compare --output out
    torchrec-sid compare --data FOLDER --output out --arms full_id full_id+side --seeds 3

The first makes a synthetic log, the second takes a log in the format of docs/data.md. OUTPUT gets
report.html, report.json, report.md and a run directory for each training.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from torchrec_sid.artifact.place import locate
from torchrec_sid.data.prepare_config import PrepareConfig
from torchrec_sid.data.synthetic import SyntheticConfig, write_synthetic
from torchrec_sid.errors import SidError
from torchrec_sid.learn import SidRecipe
from torchrec_sid.models.build import RankingConfig
from torchrec_sid.models.channels import ARMS, arm_named
from torchrec_sid.plugins import load_plugins
from torchrec_sid.quantizers import ResidualKMeansConfig, VqFusionConfig
from torchrec_sid.tables import PieceTrainerConfig
from torchrec_sid.training.train_config import TrainConfig

from .cli import command_line, parse_config, plain_errors, wide_console
from .harness import Effort, run_rows
from .report import summarise, terminal_table, write_report
from .rows import Comparison, Row
from .rundir import git_commit


@dataclass(frozen=True)
class CompareConfig:
    """One comparison."""

    output: str = "out"
    """Folder of the report, the catalog and the runs."""
    data: str | None = None
    """Folder of a log, local or a URI; default: a synthetic one, made in OUTPUT/synthetic."""
    specification: str | None = None
    """What the log's columns are (YAML, see docs/data.md): its features reach every arm. none: item,
    history and time alone. Default: DATA/specification.yaml, else what `torchrec-sid inspect` guesses."""
    arms: tuple[str, ...] = ARMS
    """Which arms, see torchrec_sid/models/channels.py."""
    seeds: int = 1
    """Trainings per arm, seeds 0 .. SEEDS - 1."""
    processes: int = 2
    """Processes of each training; more than 1 are started by TorchX."""
    jobs: int = 1
    """Trainings at a time, with one process each."""
    rows_file: str | None = None
    """Python file with a function rows(items): rows of one's own beside the arms, see docs/results.md."""
    plugin: tuple[str, ...] = ()
    """Python files that add quantizers, schemes or channels."""
    source: str | None = None
    """Embedding source that SIDs and the dense arm read; default: the log's own default."""
    evaluate_on: str = "test"
    """Split that the table is about; tune on valid."""
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)
    """The log made where no data is given."""
    quantizer: ResidualKMeansConfig = field(default_factory=lambda: ResidualKMeansConfig((16, 16, 16)))
    """What learns the SIDs of tables."""
    side: VqFusionConfig = field(default_factory=lambda: VqFusionConfig(codebooks=(), stages=((25, 3),)))
    """What learns the SIDs that the channel side computes with, from all embedding sources of the log."""
    model: RankingConfig = field(default_factory=RankingConfig)
    """Backbone; its arm is ignored."""
    batch_size: int = 512
    """Rows per step over all processes."""
    slices: tuple[str, ...] = ()
    """Categorical features of the specification by whose values metrics are given too."""
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    """How the log becomes examples."""

    def __post_init__(self) -> None:
        if min(self.seeds, self.processes, self.jobs) < 1:
            found = f"{self.seeds}, {self.processes}, {self.jobs}"
            raise SidError("seeds, processes, jobs", found, "Choose 1 or more.")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    with plain_errors():
        config = parse_config(CompareConfig, __doc__, argv)
        report = compare(config, Console())
    console = wide_console(160)
    console.print(terminal_table(report))
    console.print(report["verdict"], markup=False)
    console.print(f"report: {Path(config.output) / 'report.html'}", markup=False)


def compare(config: CompareConfig, console: Console) -> dict[str, Any]:
    """Run the main job and write its report.

    Returns:
        What ``OUTPUT/report.json`` holds.

    Raises:
        SidError: bad data, an unknown arm, or a training that failed; before any training where possible.
    """
    for file in config.plugin:
        load_plugins(file)
    for name in config.arms:
        arm_named(name)
    output = Path(config.output)
    data = config.data or str(output / "synthetic")
    if config.data is None:
        with console.status("making a synthetic log"):
            write_synthetic(Path(data), config.synthetic)
    base = TrainConfig(
        data=data,
        specification=config.specification,
        prepare=config.prepare,
        slices=config.slices,
        output=str(output / "runs"),
        source=config.source,
        batch_size=config.batch_size,
        evaluate_on=config.evaluate_on,
    )

    def rows(items: int) -> Comparison:
        made = arm_rows(config)
        return made.with_file(config.rows_file, items) if config.rows_file else made

    effort = Effort(config.seeds, config.processes, config.jobs)
    trained = run_rows(rows, base, effort, output, console, guess=config.data is not None)
    report = summarise(trained) | {
        "dataset": locate(data).name,
        "world_size": config.processes,
        "seeds": list(range(config.seeds)),
        "command": command_line(),
        "git": git_commit(),
        "evaluated_on": config.evaluate_on,
    }
    write_report(report, output, pictures=sorted((output / "sids").glob("*/*.png")))
    return report


def arm_rows(config: CompareConfig) -> Comparison:
    """A row for each arm, named like it, measured against full_id where that is one of them."""
    arms = [arm_named(name) for name in config.arms]
    pieces = (
        PieceTrainerConfig(config.model.table_rows - 1)
        if any("pieces" in a.requires for a in arms)
        else None
    )
    sources = (config.source,) if config.source else ()
    rows = tuple(
        Row(
            arm.name,
            replace(config.model, arm=arm.name),
            tables="tables" if "catalog" in arm.requires else None,
            side="side" if "side_catalog" in arm.requires else None,
        )
        for arm in arms
    )
    return Comparison(
        "Ways to give a ranker its items",
        rows,
        {
            "tables": SidRecipe(config.quantizer, config.source, pieces=pieces),
            "side": SidRecipe(config.side, sources=sources),
        },
        reference="full_id" if "full_id" in config.arms else None,
        none="none" if "none" in config.arms else None,
    )


if __name__ == "__main__":
    main()
