"""A table of the papers as numbers: means and spreads over seeds, gains, costs, stability."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from torchrec_sid.artifact import load_artifact, write_atomically, write_json
from torchrec_sid.data.prepared import PreparedLog
from torchrec_sid.training.run import PREDICTIONS

from .plots import plot_gains
from .recipes import PaperTable

_SLICES = ("all", "cold", "head", "torso", "tail")
_COLUMNS = (
    ("row", "name", "{}"),
    ("NE", "ne", "{:.4f}"),
    ("+-", "ne_std", "{:.4f}"),
    ("gain %", "gain", "{:+.2f}"),
    ("+-", "gain_std", "{:.2f}"),
    ("NE cold", "ne_cold", "{:.4f}"),
    ("gain cold %", "gain_cold", "{:+.2f}"),
    ("NE head", "ne_head", "{:.4f}"),
    ("NE torso", "ne_torso", "{:.4f}"),
    ("NE tail", "ne_tail", "{:.4f}"),
    ("AUC cold", "auc_cold", "{:.4f}"),
    ("look-ups", "lookups_per_item", "{:.2f}"),
    ("bytes/event", "bytes_per_event", "{:,}"),
    ("table MB", "table_mb", "{:.2f}"),
    ("added MB", "added_mb", "{:+.2f}"),
    ("gain % per MB", "gain_per_mb", "{:.2f}"),
    ("seed diff", "prediction_difference", "{:.4f}"),
    ("examples/s", "examples_per_second", "{:,.0f}"),
    ("train s", "train_seconds", "{:.0f}"),
)


def paper_report(table: PaperTable, runs: Mapping[str, Sequence[Path]], log: PreparedLog) -> dict[str, Any]:
    """Summarise the trainings of a table.

    Args:
        table: the recipe.
        runs: row name -> run directories, one per seed.
        log: prepared; its sampling of negatives is stated.

    Returns:
        ``title``, ``cost``, ``negatives`` and ``rows``, each with the columns of the printed table. A
        gain is the mean over seeds of ``1 - NE / NE of the reference with the same seed``, in percent.
        ``added_mb`` is what the row holds beyond its reference: bytes per event times the events of all
        histories, and the rows of its tables, in 10^6 bytes.
        ``prediction_difference`` is the mean over examples of ``|p - q|`` for two trainings that differ
        by seed only, over all pairs.
    """
    metrics = {
        name: [json.loads((run / "metrics.json").read_text()) for run in mine]
        for name, mine in runs.items()
    }
    costs = {row.name: _costs(metrics[row.name], row.model.dim, log) for row in table.rows}
    rows = []
    for row in table.rows:
        mine, against = metrics[row.name], row.against or table.rows[0].name
        gain = _gain(mine, metrics[against])
        added = costs[row.name]["footprint_mb"] - costs[against]["footprint_mb"]
        rows.append(
            {
                "name": row.name,
                "arm": row.model.arm,
                "against": against,
                **_slices(mine),
                **gain,
                **costs[row.name],
                "added_mb": added,
                "gain_per_mb": gain["gain"] / added if gain["gain"] is not None and added > 0 else None,
                "prediction_difference": _difference(runs[row.name]),
                "runs": [str(run) for run in runs[row.name]],
            }
        )
    return {
        "title": table.title,
        "cost": table.cost,
        "negatives": log.manifest.get("negatives"),
        "rows": rows,
    }


_SHORT = ("name", "ne", "ne_std", "gain", "gain_std", "ne_cold", "bytes_per_event", "table_mb")
"""What fits a terminal."""


def paper_table(report: Mapping[str, Any]) -> Table:
    """The rows for a terminal; table.md has all columns."""
    seeds = len(report["seeds"])
    table = Table(
        title=f"{report['title']} - {report['dataset']}, {report['evaluated_on']}, {seeds} seed(s)"
    )
    columns = [column for column in _COLUMNS if column[1] in _SHORT]
    for number, (heading, _, _) in enumerate(columns):
        table.add_column(heading, justify="right" if number else "left")
    for row in report["rows"]:
        table.add_row(*_cells(row, columns))
    return table


def write_paper(report: Mapping[str, Any], output: Path) -> None:
    """Write ``table.json``, ``table.md`` and ``plot.png``."""
    write_json(output / "table.json", report)
    rule = ["---"] + ["---:"] * (len(_COLUMNS) - 1)
    lines = [[heading for heading, _, _ in _COLUMNS], rule, *map(_cells, report["rows"])]
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    write_atomically(output / "table.md", lambda path: path.write_text(text))
    plot_gains(report["rows"], report["cost"], output / "plot.png")


def _slices(runs: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for name in _SLICES:
        for metric in ("ne", "auc"):
            values = [run["slices"][name][metric] for run in runs]
            key = metric if name == "all" else f"{metric}_{name}"
            found[key], found[f"{key}_std"] = _mean_and_spread(values)
    return found


def _gain(mine: Sequence[Mapping[str, Any]], reference: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    found: dict[str, float | None] = {}
    for name, key in (("all", "gain"), ("cold", "gain_cold")):
        pairs = [
            (a["slices"][name]["ne"], b["slices"][name]["ne"]) for a, b in zip(mine, reference, strict=True)
        ]
        values = [None if a is None or b is None else 100 * (1 - a / b) for a, b in pairs]
        found[key], found[f"{key}_std"] = _mean_and_spread(values)
    return found


def _costs(runs: Sequence[Mapping[str, Any]], dim: int, log: PreparedLog) -> dict[str, Any]:
    first = runs[0]
    table_mb = first["table_rows"] * dim * 4 / 1e6
    return {
        "bytes_per_event": first["bytes_per_event"],
        "table_rows": first["table_rows"],
        "table_mb": table_mb,
        "footprint_mb": table_mb + first["bytes_per_event"] * log.manifest["history_events"] / 1e6,
        "lookups_per_item": first["lookups_per_item"],
        "trained_parameters": first["trained_parameters"],
        "examples_per_second": statistics.fmean(run["examples_per_second"] for run in runs),
        "train_seconds": statistics.fmean(run["train_seconds"] for run in runs),
    }


def _difference(runs: Sequence[Path]) -> float | None:
    predictions = [
        load_artifact(run / "predictions-rank-0.safetensors", kind=PREDICTIONS, version=1).tensors[
            "predictions"
        ]
        for run in runs
    ]
    pairs = [float((a - b).abs().mean()) for a, b in itertools.combinations(predictions, 2)]
    return statistics.fmean(pairs) if pairs else None


def _mean_and_spread(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    found = [value for value in values if value is not None]
    if not found:
        return None, None
    return statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else None


def _cells(row: Mapping[str, Any], columns: Sequence[tuple[str, str, str]] = _COLUMNS) -> list[str]:
    return ["-" if row[key] is None else form.format(row[key]) for _, key, form in columns]
