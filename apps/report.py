"""The report of a comparison: `report.json`, a self-contained `report.html`, a table for the terminal."""

from __future__ import annotations

import base64
import html
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from torchrec_sid.artifact import write_atomically, write_json

from .plots import plot_cost, plot_slices

_COLUMNS = (
    ("arm", "name", "{}"),
    ("NE", "ne", "{:.4f}"),
    ("+-", "ne_std", "{:.4f}"),
    ("NE cold", "ne_cold", "{:.4f}"),
    ("AUC", "auc", "{:.4f}"),
    ("AUC cold", "auc_cold", "{:.4f}"),
    ("bytes/event", "bytes_per_event", "{:,}"),
    ("table rows", "table_rows", "{:,}"),
    ("parameters", "trained_parameters", "{:,}"),
    ("examples/s", "examples_per_second", "{:,.0f}"),
    ("peak MB", "peak_rss_mb", "{:,.0f}"),
)


def summarise_arm(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One arm of the report from the ``metrics.json`` of its seeds: means, and spread of the NE."""
    slices = {name: _summarise_slice([run["slices"][name] for run in runs]) for name in runs[0]["slices"]}
    everything, warm, cold = slices["all"], slices["warm"], slices["cold"]
    return {
        "name": runs[0]["arm"],
        "ne": everything["ne"],
        "ne_cold": cold["ne"],
        "ne_std": everything["ne_std"],
        "auc": everything["auc"],
        "auc_warm": warm["auc"],
        "auc_cold": cold["auc"],
        "logloss": everything["logloss"],
        "bytes_per_event": runs[0]["bytes_per_event"],
        "table_rows": runs[0]["table_rows"],
        "trained_parameters": runs[0]["trained_parameters"],
        "examples_per_second": _mean(run["examples_per_second"] for run in runs),
        "peak_rss_mb": max(run["peak_rss_mb"] for run in runs),
        "slices": slices,
    }


def write_report(report: Mapping[str, Any], output: Path, pictures: Sequence[Path] = ()) -> None:
    """Write ``report.json``, the plots and ``report.html`` into ``output``.

    Args:
        report: what report.json holds.
        output: folder.
        pictures: further PNG files to show, e.g. of the SIDs' quality.
    """
    write_json(output / "report.json", report)
    slices, cost = output / "ne_by_slice.png", output / "ne_by_bytes.png"
    plot_slices(report["arms"], slices)
    plot_cost(report["arms"], cost)
    page = _page(report, [slices, cost, *pictures])
    write_atomically(output / "report.html", lambda path: path.write_text(page))


def terminal_table(report: Mapping[str, Any]) -> Table:
    """The arms as a table; the best NE in bold."""
    title = f"{report['dataset']}: {report['world_size']} processes, {len(report['seeds'])} seed(s)"
    table = Table(title=title)
    for heading, _, _ in _COLUMNS:
        table.add_column(heading, justify="left" if heading == "arm" else "right")
    best = min((arm["ne"] for arm in report["arms"] if arm["ne"] is not None), default=None)
    for arm in report["arms"]:
        table.add_row(*_cells(arm), style="bold" if arm["ne"] == best else None)
    return table


def markdown_table(report: Mapping[str, Any]) -> str:
    """The arms as a Markdown table."""
    rule = ["---"] + ["---:"] * (len(_COLUMNS) - 1)
    rows = [[heading for heading, _, _ in _COLUMNS], rule, *map(_cells, report["arms"])]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _summarise_slice(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    summary: dict[str, Any] = {"rows": runs[0]["rows"]}
    for name in ("ne", "auc", "calibration", "logloss"):
        values = [run[name] for run in runs if run[name] is not None]
        summary[name] = _mean(values)
        summary[f"{name}_std"] = statistics.stdev(values) if len(values) > 1 else None
    return summary


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return statistics.fmean(found) if found else None


def _cells(arm: Mapping[str, Any]) -> list[str]:
    return ["-" if arm[key] is None else form.format(arm[key]) for _, key, form in _COLUMNS]


def _page(report: Mapping[str, Any], pictures: Sequence[Path]) -> str:
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading, _, _ in _COLUMNS)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in _cells(arm)) + "</tr>"
        for arm in report["arms"]
    )
    images = "".join(
        f'<img alt="{picture.stem}" src="data:image/png;base64,'
        f'{base64.b64encode(picture.read_bytes()).decode()}">'
        for picture in pictures
    )
    return (
        "<!doctype html><meta charset='utf-8'><title>Semantic ID comparison</title><style>"
        "body{font:15px/1.5 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em}"
        "table{border-collapse:collapse;font-variant-numeric:tabular-nums}"
        "td,th{padding:.3em .7em;text-align:right;border-bottom:1px solid #ddd}"
        "td:first-child,th:first-child{text-align:left}img{max-width:100%;margin:1em 0}"
        "code{background:#f4f4f4;padding:.1em .3em}</style>"
        f"<h1>{html.escape(str(report['dataset']))}</h1>"
        f"<p>{report['world_size']} processes, seeds {html.escape(str(report['seeds']))}, commit "
        f"<code>{html.escape(str(report['git']))}</code>. Made by "
        f"<code>{html.escape(report['command'])}</code>. NE is normalized entropy, lower is better; "
        "cold items have no training event.</p>"
        f"<table><tr>{head}</tr>{body}</table>{images}"
    )
