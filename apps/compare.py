"""The main job: learn SIDs, write a catalog, train every arm under TorchX, compare them in one table.

`python -m apps.compare --output out` makes a synthetic log; `--data FOLDER` takes a log in the format of
docs/data.md.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from torchrec_sid.data.prepare import PrepareConfig, prepare
from torchrec_sid.data.prepared import PreparedLog
from torchrec_sid.data.synthetic import SyntheticConfig, write_synthetic
from torchrec_sid.models.build import RankingConfig
from torchrec_sid.models.channels import ARMS, arm_named
from torchrec_sid.quantizers import ResidualKMeansConfig, VqFusionConfig
from torchrec_sid.tables import PieceTrainerConfig
from torchrec_sid.training.train_config import TrainConfig

from .cli import command_line, parse_config, plain_errors
from .launch import launch_training
from .learn_sids import LearnedSids, SidRecipe, learn_sids, sid_options
from .report import markdown_table, summarise_arm, terminal_table, write_report
from .rundir import git_commit
from .runs import claim_run


@dataclass(frozen=True)
class CompareConfig:
    """One comparison."""

    output: str = "out"
    """Folder of the report, the catalog and the runs."""
    data: str | None = None
    """Folder of a log; default: a synthetic one, made in OUTPUT/synthetic."""
    arms: tuple[str, ...] = ARMS
    """Which arms, see torchrec_sid/models/channels.py."""
    seeds: int = 1
    """Trainings per arm, seeds 0 .. SEEDS - 1."""
    processes: int = 2
    """Processes of each training."""
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


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    with plain_errors():
        config = parse_config(CompareConfig, __doc__, argv)
    console = Console()
    with plain_errors():
        report = compare(config, console)
    if not console.is_terminal:  # a log has no width: do not cut the table
        console = Console(width=160)
    console.print(terminal_table(report))
    console.print(f"report: {Path(config.output) / 'report.html'}")


def compare(config: CompareConfig, console: Console) -> dict[str, Any]:
    """Run the main job and write its report.

    Returns:
        What ``OUTPUT/report.json`` holds.

    Raises:
        SidError: bad data, an unknown arm, or a training that failed; before any training where possible.
    """
    for name in config.arms:
        arm_named(name)
    output = Path(config.output)
    data = Path(config.data) if config.data else _synthesise(config, output / "synthetic", console)
    with console.status(f"preparing {data}"):
        log = prepare(data, output / "prepared", PrepareConfig())
    with console.status("learning SIDs"):
        sids = _learn_sids(config, data, log, output / "sids")
    runs = _train_all(config, data, log, sids, output, console)
    report = {
        "dataset": data.name,
        "world_size": config.processes,
        "seeds": list(range(config.seeds)),
        "command": command_line(),
        "git": git_commit(),
        "evaluated_on": config.evaluate_on,
        "arms": [summarise_arm(runs[name]) for name in config.arms],
    }
    write_report(report, output, sorted((output / "sids").glob("*/*.png")))
    (output / "report.md").write_text(markdown_table(report))
    return report


def _synthesise(config: CompareConfig, path: Path, console: Console) -> Path:
    with console.status("making a synthetic log"):
        write_synthetic(path, config.synthetic)
    return path


def _learn_sids(
    config: CompareConfig, data: Path, log: PreparedLog, output: Path
) -> dict[str, LearnedSids]:
    """The catalog of the tables, and the one of SIDE, as far as the arms need them."""
    arms = [arm_named(name) for name in config.arms]
    learned = {}
    if any("catalog" in arm.requires for arm in arms):
        pieces = PieceTrainerConfig(config.model.table_rows - 1)
        needed = any("pieces" in arm.requires for arm in arms)
        recipe = SidRecipe(config.quantizer, config.source, pieces=pieces if needed else None)
        learned["tables"] = learn_sids(recipe, data, log, output / "tables")
    if any("side_catalog" in arm.requires for arm in arms):
        sources = (config.source,) if config.source else ()
        learned["side"] = learn_sids(SidRecipe(config.side, sources=sources), data, log, output / "side")
    return learned


def _train_all(
    config: CompareConfig,
    data: Path,
    log: PreparedLog,
    sids: dict[str, LearnedSids],
    output: Path,
    console: Console,
) -> dict[str, list[dict[str, Any]]]:
    """Arm name -> the metrics of its seeds. Seeds outermost, so that drift of the machine is shared."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in config.arms}
    bar = Progress(
        TextColumn("{task.description:<16}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )
    with bar:
        task = bar.add_task("training", total=len(config.arms) * config.seeds, note="")
        for seed in range(config.seeds):
            for name in config.arms:
                bar.update(task, description=name, note=f"seed {seed}")
                run = TrainConfig(
                    data=str(data),
                    output=str(output / "runs" / f"{name}-seed{seed}"),
                    prepared=str(output / "prepared"),
                    **sid_options(arm_named(name), sids.get("tables"), sids.get("side")),
                    source=config.source,
                    model=replace(config.model, arm=name),
                    batch_size=config.batch_size,
                    evaluate_on=config.evaluate_on,
                    seed=seed,
                )
                marks = {"log": log.fingerprint} | {kind: s.fingerprint for kind, s in sids.items()}
                if not claim_run(run, config.processes, marks):
                    launch_training(
                        run, config.processes, on_line=lambda line: bar.update(task, note=_note(line))
                    )
                runs[name].append(json.loads((Path(run.output) / "metrics.json").read_text()))
                bar.advance(task)
    return runs


def _note(line: str) -> str:
    """The progress part of a log line of apps.train, or nothing."""
    return line.rsplit(": ", 1)[-1] if "examples/s" in line else ""


if __name__ == "__main__":
    main()
