"""Rows -> SIDs -> trainings: what `compare` and `paper` share. Finished trainings are not repeated."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from torchrec_sid.artifact import unused_name, write_atomically, write_json
from torchrec_sid.data.embeddings import find_embeddings
from torchrec_sid.data.lake import ParquetTable, folder_at
from torchrec_sid.data.prepared import PreparedLog
from torchrec_sid.data.schema import LogFolder, find_specification
from torchrec_sid.data.specification import Specification
from torchrec_sid.errors import SidError
from torchrec_sid.learn import LearnedSids, LearnOptions, learn_sids
from torchrec_sid.models.channels import arm_named
from torchrec_sid.parallel.ranks import process_group
from torchrec_sid.training.run_record import is_finished
from torchrec_sid.training.train_config import TrainConfig

from .embed import EmbedConfig, embed
from .launch import launch_training, sid_options, write_options
from .prepare_log import guessed, prepare_on_screen
from .quantize_report import plot_quality
from .rows import Comparison, Row
from .rundir import library_fingerprint, set_up_logging
from .train import train

STAMP = "comparison.json"
"""In a run directory that a comparison made: what it trains."""
_OF_A_RUN = {
    STAMP,
    *("run.yaml", "run.json", "config.json", "environment.json", "plan.json", "plan.txt", "metrics.json"),
    *("checkpoints", "best", "tensorboard", "logs", "profile", "prepared", "served"),
}
"""What may lie in a run directory."""


class Trained(NamedTuple):
    """What :func:`run_rows` returns."""

    comparison: Comparison
    """Without the rows that the log has no sources for."""
    runs: dict[str, list[Path]]
    """Row name -> run directories, one per seed."""
    log: PreparedLog
    sids: dict[str, LearnedSids]

    def finished(self, console: Console) -> Trained:
        """With the seeds that every row has, and without the rows that have none; says what is left out.

        Raises:
            SidError: a row that others are measured against, or read beside, has not been trained.
        """
        done = {
            name: sum((run / "metrics.json").is_file() for run in mine) for name, mine in self.runs.items()
        }
        if all(done[name] == len(mine) for name, mine in self.runs.items()):
            return self
        kept = tuple(row for row in self.comparison.rows if done[row.name])
        names = {row.name for row in kept}
        wanted = {self.comparison.none, self.comparison.features} - {None}
        wanted |= {self.comparison.against(row) for row in kept}
        if not kept or not wanted <= names:
            missing = ", ".join(sorted(str(name) for name in wanted - names)) or "every row"
            raise SidError("minutes", f"too few to train {missing}", "Give more minutes, or call again.")
        seeds = min(done[name] for name in names)
        left = sum(len(mine) for mine in self.runs.values()) - sum(done.values())
        console.print(
            f"{left} trainings are left for another call; {seeds} seeds are reported", markup=False
        )
        return self._replace(
            comparison=replace(self.comparison, rows=kept),
            runs={name: self.runs[name][:seeds] for name in names},
        )


class Effort(NamedTuple):
    """How often and on how many processes to train."""

    seeds: int
    """Trainings of each row, seeds 0 .. seeds - 1."""
    processes: int = 1
    """Of each training; more than one are started by TorchX."""
    jobs: int = 1
    """Trainings at a time, where each is one process with one thread."""
    minutes: float | None = None
    """Begin no training later than this; the same call goes on where it stopped."""


def run_rows(
    comparison: Callable[[int], Comparison],
    base: TrainConfig,
    effort: Effort,
    home: Path,
    console: Console,
    *,
    content: Mapping[str, object] | None = None,
    guess: bool = False,
) -> Trained:
    """Prepare the log, learn the SIDs that the rows read, and train every row with every seed.

    Args:
        comparison: the rows, given the number of items.
        base: what all trainings share; its ``output`` is the folder of their run directories.
        effort: see :class:`Effort`.
        home: folder of what trainings share: ``prepared`` and ``sids``.
        console: for progress.
        content: fields of each :class:`SidRecipe` to replace: source, categories, separator.
        guess: whether a log that has no specification is read with a guessed one.

    Raises:
        SidError: bad data, an unknown arm, a folder that is not ours, or a training that failed.
    """
    data = base.data
    specification = find_specification(data, base.specification)
    if specification is None and guess and base.specification != "none":
        base = replace(base, specification=str(guessed(data, home / "specification.yaml", console)))
        specification = find_specification(data, base.specification)
    place = home / ("prepared" if specification is None else "prepared-features")
    log = prepare_on_screen(data, place, base.prepare, specification, console)
    base = replace(base, embeddings=base.embeddings or _embedded(data, home / "embeddings", console))
    item_id = None if specification is None else specification.columns.item_id
    sources = LogFolder.open(data, item_id=item_id, embeddings=base.embeddings).sources
    base = replace(base, prepared=str(log.path))
    rows = comparison(log.items).for_sources(sources)
    rows = rows if specification is None else rows.with_features()
    arms = {row.name: arm_named(row.model.arm) for row in rows.rows}
    plain = base
    if specification is not None and any(row.bare for row in rows.rows):
        plain = _without_features(base, specification, home, console)
    learned: dict[str, LearnedSids] = {}
    for name in sorted({n for row in rows.rows for n in (row.tables, row.side) if n is not None}):
        recipe = replace(rows.sids[name], **dict(content or {}))  # type: ignore[arg-type]
        with console.status(f"learning SIDs: {escape(name)}"):
            place = home / "sids" / name.replace(" ", "-")
            learned[name] = learn_sids(recipe, data, log, place, LearnOptions(embeddings=base.embeddings))
            plot_quality(learned[name].report(), learned[name].quality.with_name("quality.png"))
        _say_missing(name, learned[name], console)

    def run(row: Row, seed: int) -> TrainConfig:
        name = row.name.replace(" ", "-").replace("+", "and") if " " in row.name else row.name
        return replace(
            plain if row.bare else base,
            **{**rows.training, **row.training},
            output=str(Path(base.output) / f"{name}-seed{seed}"),
            predictions=True,
            **sid_options(arms[row.name], learned.get(row.tables or ""), learned.get(row.side or "")),
            shuffle_sids=row.shuffled,
            hide_new=row.hide_new,
            source="+".join(sources) if row.every_source else base.source,
            model=row.model,
            seed=seed,
        )

    runs = {row.name: [run(row, seed) for seed in range(effort.seeds)] for row in rows.rows}
    _train_all(runs, learned, effort, console)
    found = {name: [Path(r.output) for r in mine] for name, mine in runs.items()}
    return Trained(rows, found, log, learned).finished(console)


def _without_features(
    base: TrainConfig, specification: Specification, home: Path, console: Console
) -> TrainConfig:
    """The same log by its keys and its first label alone, for rows that read no features."""
    keys = replace(specification, labels=specification.labels[:1], features=(), counters=None)
    file = home / "without-features.yaml"
    write_atomically(file, lambda path: path.write_text(keys.to_yaml()))
    log = prepare_on_screen(base.data, home / "prepared", base.prepare, keys, console)
    return replace(base, specification=str(file), prepared=str(log.path), slices=())


def _embedded(data: str, home: Path, console: Console) -> str | None:
    """The folder of embeddings of the items' texts, where the log has none of its own; None: not needed."""
    place = folder_at(data)
    items = ParquetTable.find(place, "items")
    columns = tuple(name for name in EmbedConfig.columns if name in items.names)
    if find_embeddings(place) or not columns:
        return None
    with console.status(f"embedding {' and '.join(columns)}"):
        done = embed(EmbedConfig(data, str(home), columns))
    console.print(
        f"no embeddings: {done.items:,} items are embedded by {' and '.join(columns)}"
        + (f", {done.without_text:,} of them have no text" if done.without_text else ""),
        markup=False,
    )
    return str(home)


def _say_missing(name: str, sids: LearnedSids, console: Console) -> None:
    bare = json.loads(sids.quality.read_text())["without_sid"]["any"]
    if bare:
        console.print(f"SIDs {name}: {bare:,} items without content have none", markup=False)


def claim_run(run: TrainConfig, processes: int, marks: Mapping[str, str]) -> bool:
    """Whether an earlier call finished this run; one that it began is resumed, another's is
    moved aside.

    Args:
        run: what is to be trained.
        processes: on how many processes.
        marks: fingerprints of what it reads.

    Raises:
        SidError: the folder holds something that no run writes; it stays as it is.
    """
    output = Path(run.output)
    stamp = output / STAMP
    wanted = json.loads(json.dumps({"config": asdict(run), "processes": processes, **marks}))
    if stamp.is_file() and _read(stamp) == wanted:
        return is_finished(output)
    if output.exists():
        _move_aside(output)
    write_json(stamp, wanted)
    return False


def _read(stamp: Path) -> object:
    try:
        return json.loads(stamp.read_text())
    except ValueError:
        return None


def _move_aside(output: Path) -> None:
    """Another run's folder becomes ``NAME.old-N``: nothing is removed."""
    remedy = "Move it away, or pass another --output."
    if output.is_symlink() or not output.is_dir():
        raise SidError(str(output), "is not a folder of ours", remedy)
    entries = sorted(path.name for path in output.iterdir())
    if entries and STAMP not in entries:
        raise SidError(str(output), f"was not made by a comparison: it holds {entries[0]}", remedy)
    foreign = [name for name in entries if not _is_of_a_run(name)]
    if foreign:
        raise SidError(str(output), f"holds {foreign[0]}, which no run writes", remedy)
    output.rename(unused_name(output))


def _is_of_a_run(name: str) -> bool:
    return name in _OF_A_RUN or name.startswith(("predictions-rank-", "metrics-", "."))


def _train_all(
    runs: Mapping[str, list[TrainConfig]],
    learned: Mapping[str, LearnedSids],
    effort: Effort,
    console: Console,
) -> None:
    """Every training that is not done; seeds outermost, so that drift of the machine is shared."""
    by_path = {str(sids.catalog): sids.fingerprint for sids in learned.values()}
    deadline = None if effort.minutes is None else time.monotonic() + 60 * effort.minutes
    todo = []
    for seed in range(effort.seeds):
        for mine in runs.values():
            run = mine[seed]
            sids = {path: by_path[path] for path in (run.catalog, run.side_catalog) if path}
            mark = {
                "library": library_fingerprint(),
                "log": PreparedLog.open(str(run.prepared)).fingerprint,
            }
            if not claim_run(run, effort.processes, mark | sids):
                todo.append(run)
    bar = Progress(
        TextColumn("{task.description:<16}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        console=console,
    )
    with bar:
        task = bar.add_task("training", total=len(todo), note="")

        def note(run: TrainConfig, text: str) -> None:
            bar.update(task, description=Path(run.output).name[:48], note=text)

        trainings = (
            _launched(todo, effort.processes, note, deadline)
            if effort.processes > 1
            else _pooled(todo, effort.jobs, deadline)
        )
        for done in trainings:
            note(done, "")
            bar.advance(task)


def _launched(
    todo: list[TrainConfig],
    processes: int,
    note: Callable[[TrainConfig, str], None],
    deadline: float | None,
) -> Iterator[TrainConfig]:
    """One after another, each on several processes under TorchX."""
    for run in todo:
        if _late(deadline):
            return
        note(run, "")
        launch_training(
            run,
            processes,
            on_line=lambda line, run=run: (  # type: ignore[misc]
                note(run, line.rsplit(": ", 1)[-1]) if "examples/s" in line else None
            ),
        )
        yield run


def _pooled(todo: list[TrainConfig], jobs: int, deadline: float | None) -> Iterator[TrainConfig]:
    """``jobs`` at a time, each alone in a process."""
    context, left = multiprocessing.get_context("spawn"), iter(todo)
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_start_worker) as pool:
        futures: dict[Future[None], TrainConfig] = {}
        try:
            while True:
                while len(futures) < jobs and not _late(deadline) and (run := next(left, None)) is not None:
                    futures[pool.submit(_train, run)] = run
                if not futures:
                    return
                for future in wait(futures, return_when=FIRST_COMPLETED).done:
                    run = futures.pop(future)
                    future.result()
                    yield run
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _late(deadline: float | None) -> bool:
    return deadline is not None and time.monotonic() > deadline


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
