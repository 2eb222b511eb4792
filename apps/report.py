"""The report of a comparison: numbers of every row, what won in a sentence, tables and a page."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.markup import escape
from rich.table import Table

from torchrec_sid.artifact import write_atomically, write_json
from torchrec_sid.data.prepared import PreparedLog
from torchrec_sid.models.channels import arm_named

from .harness import Trained
from .pages import Point, embedded, scatter, write_page
from .significance import Predicted, intervals

_SLICES = ("all", "warm", "cold", "head", "torso", "tail")


class Column(NamedTuple):
    """Of a table: what stands above it, which key of a row, and how it is written."""

    heading: str
    key: str
    form: str = "{}"


COLUMNS = (
    Column("row", "name"),
    Column("NE", "ne", "{:.4f}"),
    Column("±", "ne_std", "{:.4f}"),
    Column("gain %", "gain", "{:+.2f}"),
    Column("±", "gain_std", "{:.2f}"),
    Column("95%", "gain_interval", "[{0[0]:+.2f}, {0[1]:+.2f}]"),
    Column("p", "gain_p", "{:.4f}"),
    Column("NE cold", "ne_cold", "{:.4f}"),
    Column("gain cold %", "gain_cold", "{:+.2f}"),
    Column("95%", "gain_cold_interval", "[{0[0]:+.2f}, {0[1]:+.2f}]"),
    Column("cold over no item %", "cold_over_none", "{:+.2f}"),
    Column("95%", "cold_over_none_interval", "[{0[0]:+.2f}, {0[1]:+.2f}]"),
    Column("cold over no id %", "cold_over_features", "{:+.2f}"),
    Column("95%", "cold_over_features_interval", "[{0[0]:+.2f}, {0[1]:+.2f}]"),
    Column("NE head", "ne_head", "{:.4f}"),
    Column("NE torso", "ne_torso", "{:.4f}"),
    Column("NE tail", "ne_tail", "{:.4f}"),
    Column("AUC", "auc", "{:.4f}"),
    Column("AUC cold", "auc_cold", "{:.4f}"),
    Column("bytes/event", "bytes_per_event", "{:,}"),
    Column("bytes/item", "bytes_per_item", "{:,}"),
    Column("look-ups", "lookups_per_item", "{:.2f}"),
    Column("table rows", "table_rows", "{:,}"),
    Column("table MB", "table_mb", "{:.2f}"),
    Column("added MB", "added_mb", "{:+.2f}"),
    Column("gain % per MB", "gain_per_mb", "{:.2f}"),
    Column("parameters", "trained_parameters", "{:,}"),
    Column("seed diff", "prediction_difference", "{:.4f}"),
    Column("examples/s", "examples_per_second", "{:,.0f}"),
    Column("train s", "train_seconds", "{:.0f}"),
    Column("peak MB", "peak_rss_mb", "{:,.0f}"),
)
"""Of every report, in this order."""
_TERMINAL = {"name", "ne", "ne_std", "gain", "gain_std", "gain_interval", "ne_cold", "gain_cold_interval"}
_TERMINAL |= {"cold_over_none", "auc", "bytes_per_event"}
_TERMINAL |= {"table_mb", "examples_per_second"}
_COSTS = {
    "bytes_per_event",
    "bytes_per_item",
    "lookups_per_item",
    "table_rows",
    "table_mb",
    "trained_parameters",
}
_COSTS |= {"examples_per_second", "train_seconds", "peak_rss_mb"}


def summarise(trained: Trained) -> dict[str, Any]:
    """Means and spreads over seeds, gains and costs of every row.

    Returns:
        ``title``, ``cost``, ``negatives``, ``verdict`` and ``rows`` (also as ``arms``). A gain is the mean
        over seeds of ``1 - NE / NE of the reference with the same seed``, in percent. ``added_mb`` is what
        the row holds beyond its reference: bytes per event times the events of all histories, bytes per
        item times the items, and the rows of its tables, in 10^6 bytes. Intervals (``gain_interval`` and
        the like, and all of them under ``intervals``) are those of
        :func:`apps.significance.intervals`. ``prediction_difference`` is the mean over examples of
        ``|p - q|`` for two trainings that differ by seed only, over all pairs; None without predictions.
    """
    comparison, log = trained.comparison, trained.log
    found = intervals(comparison, trained.runs)
    metrics = {
        name: [json.loads((run / "metrics.json").read_text()) for run in mine]
        for name, mine in trained.runs.items()
    }
    costs = {row.name: _costs(metrics[row.name], row.model.dim, log) for row in comparison.rows}
    rows = []
    for row in comparison.rows:
        mine, against = metrics[row.name], comparison.against(row)
        gain = _gain(mine, metrics[against])
        added = costs[row.name]["footprint_mb"] - costs[against]["footprint_mb"]
        rows.append(
            {
                "name": row.name,
                "arm": row.model.arm,
                "explanation": explain(row.model.arm),
                "against": against,
                **_quality(mine),
                **gain,
                **_intervals(found.get(row.name, {})),
                **costs[row.name],
                "added_mb": added,
                "gain_per_mb": gain["gain"] / added if gain["gain"] is not None and added > 0 else None,
                "prediction_difference": _difference(trained.runs[row.name]),
                "runs": [str(run) for run in trained.runs[row.name]],
            }
        )
    return {
        "title": comparison.title,
        "cost": comparison.cost,
        "negatives": log.manifest.get("negatives"),
        "verdict": verdict(rows),
        "rows": rows,
        "arms": rows,
    }


def explain(arm: str) -> str:
    """In a line, how the ranker of an arm gets to know an item."""
    channels = arm_named(arm).channels
    if not channels:
        return "no item at all: actions, times and dense features alone"
    return "; and ".join(channel.about or f"the channel {channel.name}" for channel in channels)


def verdict(rows: Sequence[Mapping[str, Any]]) -> str:
    """What won and by how much, with the spread over seeds where there is one."""
    by_name = {row["name"]: row for row in rows}
    known = [row for row in rows if row["ne"] is not None]
    if not known:
        return "No row has a NE: the evaluated split has a single label."
    best = min(known, key=lambda row: row["ne"])
    text = f"“{best['name']}” has the lowest NE, {best['ne']:.4f}"
    base = by_name[best["against"]]
    if base is best and len(known) > 1:
        second = min((row for row in known if row is not best), key=lambda row: row["ne"])
        text += (
            f"; next is “{second['name']}”, {100 * (second['ne'] / best['ne'] - 1):.2f}% above it "
            f"({second['ne']:.4f})"
        )
    elif base is not best and best["gain"] is not None:
        text += f": {best['gain']:.2f}% {_spread(best)}below “{base['name']}” ({base['ne']:.4f})"
    text += "."
    cold = [row for row in rows if row["ne_cold"] is not None]
    if cold:
        winner = min(cold, key=lambda row: row["ne_cold"])
        also = "it is best there too" if winner is best else f"“{winner['name']}” is best"
        text += f" On items that training never saw {also}: NE {winner['ne_cold']:.4f}"
        if winner["gain_cold"] is not None and winner["against"] != winner["name"]:
            text += f", {winner['gain_cold']:+.2f}% against “{winner['against']}”"
        text += "."
    if len(best["runs"]) == 1:
        text += " One seed: small differences may be chance of the training; --seeds 3 tells."
    return text


def write_report(
    report: Mapping[str, Any], output: Path, stem: str = "report", pictures: Sequence[Path] = ()
) -> None:
    """Write ``STEM.json``, ``STEM.md`` and ``STEM.html`` into ``output``.

    Args:
        report: of :func:`summarise`, with dataset, world_size, seeds, command, git, evaluated_on.
        output: folder.
        stem: of the files' names.
        pictures: PNG files to show, each in a folder named after its SIDs.
    """
    write_json(output / f"{stem}.json", report)
    lines = [[column.heading for column in COLUMNS], ["---"] + ["---:"] * (len(COLUMNS) - 1)]
    lines += [cells(row, COLUMNS) for row in report["rows"]]
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    write_atomically(output / f"{stem}.md", lambda path: path.write_text(text))
    rows = report["rows"]
    best = best_name(rows)
    slices = [name for name in _SLICES if any(_slice_ne(row, name) is not None for row in rows)]
    costs = [column for column in COLUMNS if column.key in _COSTS]
    write_page(
        output / f"{stem}.html",
        "comparison.html",
        report=report,
        rows=[_shown(row, rows) for row in rows],
        best=best,
        slices=slices,
        by_slice=[(row["name"], [_heat(row, rows, name) for name in slices]) for row in rows],
        costs=[column.heading for column in costs],
        cost_rows=[(row["name"], cells(row, costs)) for row in rows],
        chart=_chart(rows, best),
        pictures=[(path.parent.name, embedded(path.read_bytes())) for path in pictures],
    )


def terminal_table(report: Mapping[str, Any]) -> Table:
    """The rows for a terminal, the best in bold; the Markdown file has all columns."""
    seeds = len(report["seeds"])
    title = f"{report['title']} - {report['dataset']}, {report['evaluated_on']}, {seeds} seed(s)"
    table = Table(title=escape(title))
    columns = [column for column in COLUMNS if column.key in _TERMINAL]
    for number, column in enumerate(columns):
        table.add_column(column.heading, justify="right" if number else "left")
    best = best_name(report["rows"])
    for row in report["rows"]:
        style = "bold" if row["name"] == best else None
        table.add_row(*map(escape, cells(row, columns)), style=style)
    return table


def best_name(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Name of the row with the lowest NE."""
    known = [row for row in rows if row["ne"] is not None]
    return min(known, key=lambda row: row["ne"])["name"] if known else None


def plot_gains(rows: Sequence[Mapping[str, Any]], cost: str, path: Path) -> None:
    """NE of each row, overall and cold, with its spread over seeds, as a PNG; its cost beside its name."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.2 + 0.3 * len(rows)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    places = range(len(rows), 0, -1)
    for axes, key, title in zip(panels, ("ne", "ne_cold"), ("all examples", "cold items"), strict=True):
        for place, row in zip(places, rows, strict=True):
            if row[key] is not None:
                axes.errorbar(row[key], place, xerr=row[f"{key}_std"] or 0.0, fmt="o", ms=5, lw=1.5)
        axes.set_xlabel("normalized entropy (lower is better)")
        axes.set_title(title)
        axes.locator_params(axis="x", nbins=6)
        axes.grid(axis="y", lw=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(places, [f"{row['name']} ({row[cost]:,.0f})" for row in rows], fontsize=8)
    figure.suptitle(f"in brackets: {cost.replace('_', ' ')}", fontsize=8, x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _spread(row: Mapping[str, Any]) -> str:
    spread, interval = row["gain_std"], row["gain_interval"]
    if interval is not None:
        doubt = ", which holds 0" if interval[0] <= 0 <= interval[1] else ""
        return f"(95% interval over users and seeds [{interval[0]:+.2f}, {interval[1]:+.2f}]{doubt}) "
    if spread is None:
        return ""
    seeds = len(row["runs"])
    within = abs(row["gain"]) < 2 * spread / math.sqrt(seeds)
    doubt = ", no more than seeds differ" if within else ""
    return f"(±{spread:.2f} over {seeds} seeds{doubt}) "


def _quality(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    slices = {name: _summarise_slice([run["slices"][name] for run in runs]) for name in runs[0]["slices"]}
    found: dict[str, Any] = {}
    for name in _SLICES:
        for metric in ("ne", "auc"):
            key = metric if name == "all" else f"{metric}_{name}"
            found[key], found[f"{key}_std"] = slices[name][metric], slices[name][f"{metric}_std"]
    return {**found, "logloss": slices["all"]["logloss"], "slices": slices}


def _summarise_slice(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    summary: dict[str, Any] = {"rows": runs[0]["rows"]}
    for name in ("ne", "auc", "calibration", "logloss"):
        summary[name], summary[f"{name}_std"] = _mean_and_spread([run[name] for run in runs])
    return summary


def _gain(mine: Sequence[Mapping[str, Any]], reference: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    found: dict[str, float | None] = {}
    for name, key in (("all", "gain"), ("cold", "gain_cold")):
        pairs = [
            (a["slices"][name]["ne"], b["slices"][name]["ne"]) for a, b in zip(mine, reference, strict=True)
        ]
        values = [None if a is None or b is None else 100 * (1 - a / b) for a, b in pairs]
        found[key], found[f"{key}_std"] = _mean_and_spread(values)
    return found


def _intervals(found: Mapping[str, Any]) -> dict[str, Any]:
    """The intervals of a row that columns show, and all of them."""
    flat: dict[str, Any] = {"intervals": dict(found)}
    for key, name, piece in (
        ("gain", "gain", "all"),
        ("gain_cold", "gain", "cold"),
        ("cold_over_none", "cold_over_none", "cold"),
        ("cold_over_features", "cold_over_features", "cold"),
    ):
        interval = found.get(name, {}).get(piece)
        flat[f"{key}_interval"] = None if interval is None else [interval["low"], interval["high"]]
        flat[f"{key}_p"] = None if interval is None else interval["p"]
        if key not in ("gain", "gain_cold"):
            flat[key] = None if interval is None else interval["estimate"]
    return flat


def _costs(runs: Sequence[Mapping[str, Any]], dim: int, log: PreparedLog) -> dict[str, Any]:
    first = runs[0]
    table_mb = first["table_rows"] * dim * 4 / 1e6
    held = first["bytes_per_event"] * log.manifest["history_events"]
    held += first.get("bytes_per_item", 0) * log.items  # runs of earlier releases did not count them
    return {
        "bytes_per_event": first["bytes_per_event"],
        "bytes_per_item": first.get("bytes_per_item"),
        "table_rows": first["table_rows"],
        "table_mb": table_mb,
        "footprint_mb": table_mb + held / 1e6,
        "lookups_per_item": first["lookups_per_item"],
        "trained_parameters": first["trained_parameters"],
        "examples_per_second": statistics.fmean(run["examples_per_second"] for run in runs),
        "train_seconds": statistics.fmean(run["train_seconds"] for run in runs),
        "peak_rss_mb": max(run["peak_rss_mb"] for run in runs),
    }


def _difference(runs: Sequence[Path]) -> float | None:
    predicted = [Predicted.read(run) for run in runs]
    probabilities = [1 / (1 + np.exp(-each.logits)) for each in predicted if each is not None]
    if len(probabilities) < len(runs):
        return None
    pairs = [float(np.abs(a - b).mean()) for a, b in itertools.combinations(probabilities, 2)]
    return statistics.fmean(pairs) if pairs else None


def _mean_and_spread(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    found = [value for value in values if value is not None]
    if not found:
        return None, None
    return statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else None


def cells(row: Mapping[str, Any], columns: Sequence[Column]) -> list[str]:
    """The columns of a row as text, - where it has no value."""
    return ["-" if row[key] is None else form.format(row[key]) for _, key, form in columns]


def _shown(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A row of the page's first table: numbers as text, and its gain as a bar, in percent of the room."""
    largest = max((abs(other["gain"]) for other in rows if other["gain"] is not None), default=0.0) or 1.0
    gain = row["gain"]
    return {
        "name": row["name"],
        "explanation": row["explanation"],
        "ne": "-" if row["ne"] is None else f"{row['ne']:.4f}",
        "spread": "" if row["ne_std"] is None else f"±{row['ne_std']:.4f}",
        "gain": "-" if gain is None else "reference" if row["against"] == row["name"] else f"{gain:+.2f}%",
        "gain_spread": _shown_spread(row),
        "bar": 0.0 if gain is None else round(abs(gain) / largest * 50, 1),
        "worse": gain is not None and gain < 0,
        "against": row["against"],
        "cold": "-" if row["ne_cold"] is None else f"{row['ne_cold']:.4f}",
        "auc": "-" if row["auc"] is None else f"{row['auc']:.4f}",
    }


def _shown_spread(row: Mapping[str, Any]) -> str:
    if (interval := row["gain_interval"]) is not None:
        return f"[{interval[0]:+.2f}, {interval[1]:+.2f}]"
    return "" if not row["gain_std"] else f"±{row['gain_std']:.2f}"


def _slice_ne(row: Mapping[str, Any], name: str) -> float | None:
    value: float | None = row["slices"][name]["ne"]
    return value


def _heat(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], name: str) -> tuple[str, float]:
    """The NE of a slice as text, and how good it is among all rows: 0 to 1."""
    value = _slice_ne(row, name)
    values = [v for v in (_slice_ne(other, name) for other in rows) if v is not None]
    if value is None:
        return "-", 0.0
    width = max(values) - min(values)
    return f"{value:.4f}", round((max(values) - value) / width, 2) if width else 0.0


def _chart(rows: Sequence[Mapping[str, Any]], best: str | None) -> Any:
    points = [
        Point(
            float(row["bytes_per_event"]),
            row["ne"],
            row["ne_std"] or 0.0,
            row["name"] if len(rows) <= 8 else str(number),
            row["name"] == best,
        )
        for number, row in enumerate(rows, 1)
        if row["ne"] is not None
    ]
    return scatter(points) if points else None
