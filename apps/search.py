"""Search rates, passes and widths for the rows of a table, on the validation period alone.

    torchrec-sid search --table 2 --data FOLDER --specification FILE.yaml --rows base '+ dense + cosine'

Every row gets the same trainings: the axes below one after the other, each with the best of those before.
Trainings cannot open the test period. OUTPUT/search.json has every reading, what was chosen, and whether a
choice lies at the edge of its axis; `torchrec-sid paper --chosen OUTPUT/search.json` trains with it.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from torchrec_sid.artifact import locate, write_json
from torchrec_sid.errors import SidError
from torchrec_sid.training.train_config import TABLE_OPTIMIZER, TrainConfig

from .cli import command_line, parse_config, plain_errors, wide_console
from .harness import Effort, run_rows
from .recipes import TABLES
from .rows import Comparison, Row
from .rundir import git_commit

AXES: tuple[tuple[str, tuple[float, ...]], ...] = (
    ("dense_lr", (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)),
    ("tables_lr", (5e-3, 1e-2, 2e-2, 4e-2, 8e-2)),
    ("epochs", (1, 2, 3)),
    ("dim", (16, 32, 64)),
)
"""What is searched, in this order: rate of the dense part, rate of the tables, passes, width. Fixed before
the first reading, the same for every row; what a row has before its search is in the middle."""
START: Mapping[str, float] = {"dense_lr": 2e-3, "tables_lr": TABLE_OPTIMIZER.lr, "epochs": 1, "dim": 32}
"""Where a row begins; each is on its axis."""


@dataclass(frozen=True)
class SearchConfig:
    """One search."""

    data: str
    """Folder of the log, in the format of docs/data.md."""
    table: str = "2"
    """Whose rows, see apps/recipes.py."""
    rows: tuple[str, ...] = ()
    """Only rows that have one of these in their name, and those they are measured against; default: all."""
    rows_file: str | None = None
    """Python file with a function rows(items): rows of one's own beside these."""
    output: str | None = None
    """Folder to write; default: out/search/LOG/TABLE."""
    specification: str | None = None
    """What the log's columns are (YAML, see docs/data.md). Default: specification.yaml in DATA."""
    jobs: int = 2
    """Trainings at a time, each a process with one thread."""
    max_steps: int | None = None
    """Stop each training after so many steps: for a quick look."""

    def __post_init__(self) -> None:
        if self.table not in TABLES:
            raise SidError("table", repr(self.table), f"Choose one of {', '.join(TABLES)}.")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    with plain_errors():
        config = parse_config(SearchConfig, __doc__, argv)
        report = search(config, Console())
    table = Table(
        title=escape(f"validation period of {report['dataset']}: chosen of {report['readings_per_row']}")
    )
    for heading in ("row", "NE", *(name for name, _ in AXES), "at the edge"):
        table.add_column(heading, justify="left" if heading == "row" else "right")
    for name, found in report["rows"].items():
        chosen = (f"{found['chosen'][axis]:g}" for axis, _ in AXES)
        table.add_row(escape(name), f"{found['ne']:.4f}", *chosen, ", ".join(found["at_edge"]) or "no")
    wide_console(140).print(table)


def search(config: SearchConfig, console: Console) -> dict[str, Any]:
    """Search and write ``OUTPUT/search.json``.

    Returns:
        What it holds: ``rows``: name -> ``chosen``, ``ne``, ``at_edge`` (axes whose smallest or largest
        value was chosen; one pass is the smallest there is) and ``readings``, every training with its
        validation NE.

    Raises:
        SidError: bad data, no such row, or a training that failed.
    """
    dataset = locate(config.data).name
    output = Path(config.output or Path("out/search") / dataset / config.table)
    base = TrainConfig(
        data=config.data,
        output=str(output / "runs"),
        specification=config.specification,
        max_steps=config.max_steps,
        evaluate_on="valid",
        closed_splits=("test",),
    )
    names = [row.name for row in _table(config, 1000).rows]
    chosen: dict[str, dict[str, float]] = {name: dict(START) for name in names}
    readings: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in names}
    for axis, values in AXES:

        def rows(items: int, axis: str = axis, values: tuple[float, ...] = values) -> Comparison:
            table = _table(config, items)
            tried = [
                _tried(row, {**chosen[row.name], axis: value}) for row in table.rows for value in values
            ]
            return replace(table, rows=tuple(tried), reference=None, none=None, features=None)

        trained = run_rows(rows, base, Effort(1, jobs=config.jobs), output.parent, console)
        for name in names:
            for value in values:
                tried = {**chosen[name], axis: value}
                (run,) = trained.runs.get(_label(name, tried), [None])
                if run is not None:
                    readings[name][_label("", tried)] = _reading(tried, run)
            if readings[name]:
                best = min(readings[name].values(), key=lambda reading: reading["ne"])
                chosen[name] = best["values"]
    report = {
        "dataset": dataset,
        "table": config.table,
        "command": command_line(),
        "git": git_commit(),
        "axes": {axis: list(values) for axis, values in AXES},
        "readings_per_row": max(map(len, readings.values())),
        "rows": {name: _chosen(list(found.values())) for name, found in readings.items() if found},
    }
    write_json(output / "search.json", report)
    return report


def with_choices(table: Comparison, path: Path) -> Comparison:
    """A table whose rows train with what a search chose for them; others stay as they are.

    Raises:
        SidError: no file of a search, or one that has none of the rows.
    """
    try:
        rows = json.loads(path.read_text())["rows"]
        chosen = {name: {axis: found["chosen"][axis] for axis, _ in AXES} for name, found in rows.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SidError(
            str(path), f"is no search.json ({error})", "Make it with torchrec-sid search."
        ) from error
    names = {row.name for row in table.rows}
    if not names & set(chosen):
        raise SidError(
            str(path), f"has no row of this table: {'; '.join(chosen)}", f"It has {'; '.join(names)}."
        )
    found = (_with(row, chosen[row.name]) if row.name in chosen else row for row in table.rows)
    return replace(table, rows=tuple(found))


def _table(config: SearchConfig, items: int) -> Comparison:
    table = TABLES[config.table](items)
    if config.rows_file:
        table = table.with_file(config.rows_file, items)
    return table.chosen(config.rows)


def _with(row: Row, values: Mapping[str, float]) -> Row:
    training = {
        "dense_lr": values["dense_lr"],
        "tables": replace(TABLE_OPTIMIZER, lr=values["tables_lr"]),
        "epochs": int(values["epochs"]),
    }
    model = replace(row.model, dim=int(values["dim"]))
    return replace(row, model=model, training={**row.training, **training})


def _tried(row: Row, values: Mapping[str, float]) -> Row:
    return replace(_with(row, values), name=_label(row.name, values), against=None)


def _label(name: str, values: Mapping[str, float]) -> str:
    return " ".join([name, *(f"{axis} {values[axis]:g}" for axis, _ in AXES)])


def _reading(values: Mapping[str, float], run: Path) -> dict[str, Any]:
    file = run / "metrics.json"
    metrics = json.loads(file.read_text())
    assert metrics["evaluated_on"] == "valid"
    whole, cold = metrics["slices"]["all"], metrics["slices"]["cold"]
    read = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(file.stat().st_mtime))
    return {
        "values": dict(values),
        "ne": whole["ne"],
        "ne_cold": cold["ne"],
        "split": "valid",
        "read": read,
        "run": str(run),
    }


def _chosen(readings: list[dict[str, Any]]) -> dict[str, Any]:
    best = min(readings, key=lambda reading: reading["ne"])
    values = best["values"]
    edge = [axis for axis, tried in AXES if values[axis] in (min(tried), max(tried))]
    return {
        "chosen": values,
        "ne": best["ne"],
        # There is nothing below one pass.
        "at_edge": [axis for axis in edge if (axis, values[axis]) != ("epochs", 1)],
        "readings": readings,
    }


if __name__ == "__main__":
    main()
