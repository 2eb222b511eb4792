"""A plan as a page: plots of memory, time and the side by side, embedded in one HTML file."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

_GIB = 2**30
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse;font-variant-numeric:tabular-nums}"
    "td,th{padding:.3em .7em;text-align:right;border-bottom:1px solid #ddd}"
    "td:first-child,th:first-child{text-align:left}img{max-width:100%;margin:1em 0}"
    "code,pre{background:#f4f4f4;padding:.1em .3em;overflow-x:auto}"
)
_COLUMNS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("arm", "arm", str),
    ("items", "items", "{:,}".format),
    ("GPUs needed", "gpus", "{:,}".format),
    ("rows", "table_rows", "{:,}".format),
    ("table GiB", "table_bytes", lambda v: f"{v / _GIB:,.2f}"),
    ("planned GiB", "planned_bytes", lambda v: f"{v / _GIB:,.2f}"),
    ("bytes/event", "bytes_per_event", "{:,}".format),
    ("wire MiB/batch", "wire_bytes_per_batch", lambda v: f"{v / 2**20:,.0f}"),
    ("table ms/step", "step_ms", "{:,.2f}".format),
)


def side_by_side_table(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The side by side as text cells, the heading first; a dash where it does not fit."""
    cells = [[heading for heading, _, _ in _COLUMNS]]
    for row in rows:
        cells.append(["-" if row[key] is None else show(row[key]) for _, key, show in _COLUMNS])
    return cells


def plan_page(report: Mapping[str, Any], summary_text: str) -> str:
    """The page.

    Args:
        report: what ``report.json`` holds: command, planner, summary, wire_bytes, side_by_side.
        summary_text: the plan, as lines of text.
    """
    summary = report["summary"]
    pictures = [_picture(_plot_memory, summary), _picture(_plot_time, summary)]
    body = ""
    if rows := report["side_by_side"]:
        pictures.append(_picture(_plot_side_by_side, rows))
        lines = side_by_side_table(rows)
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in lines[0])
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>"
            for line in lines[1:]
        )
        body = f"<h2>Side by side</h2><table><tr>{head}</tr>{body}</table>"
    images = "".join(f'<img alt="plot" src="data:image/png;base64,{picture}">' for picture in pictures)
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in report["assumptions"])
    return (
        f"<!doctype html><meta charset='utf-8'><title>Sharding plan</title><style>{_STYLE}</style>"
        f"<h1>{summary['world_size']} ranks, {html.escape(summary['device'])}</h1>"
        f"<p>Made by <code>{html.escape(report['command'])}</code>.</p>"
        f"<pre>{html.escape(summary_text)}</pre>{body}{images}<h2>What is assumed</h2><ul>{notes}</ul>"
    )


def _picture(plot: Callable[[Any, Any], None], data: Any) -> str:
    figure = plt.figure(figsize=(10, 3.8), layout="constrained")
    plot(figure, data)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    plt.close(figure)
    return base64.b64encode(stream.getvalue()).decode()


def _plot_memory(figure: Any, summary: Mapping[str, Any]) -> None:
    axes = figure.subplots()
    kind = "ddr" if summary["device"] == "cpu" else "hbm"
    ranks = [load["rank"] for load in summary["ranks"]]
    tables = [load[f"{kind}_bytes"] / _GIB for load in summary["ranks"]]
    kept = summary["reserved_bytes"] / _GIB
    axes.bar(ranks, tables, 0.9, label="tables, optimizer, buffers")
    axes.bar(ranks, [kept] * len(ranks), 0.9, tables, color="0.8", label="reserved")
    axes.axhline(summary[f"{kind}_capacity"] / _GIB, color="crimson", lw=1, label="capacity")
    axes.set(xlabel="rank", ylabel=f"{kind.upper()} GiB")
    axes.set_title("Memory per rank", loc="left")
    axes.legend(frameon=False, ncols=3, loc="lower right", bbox_to_anchor=(1, 1))
    axes.spines[["top", "right"]].set_visible(False)


def _plot_time(figure: Any, summary: Mapping[str, Any]) -> None:
    axes = figure.subplots()
    ranks = [load["rank"] for load in summary["ranks"]]
    base = [0.0] * len(ranks)
    parts = ("forward_compute", "forward_comms", "backward_compute", "backward_comms", "prefetch")
    for part in parts:
        values = [load["time"][part] for load in summary["ranks"]]
        if any(values):
            axes.bar(ranks, values, 0.9, base, label=part.replace("_", " "))
        base = [a + b for a, b in zip(base, values, strict=True)]
    balance = f"balance {summary['balance']:.2f}"
    axes.set(xlabel="rank", ylabel="predicted ms per step")
    axes.set_title(f"Time in tables per rank, {balance}", loc="left")
    if any(base):
        axes.legend(frameon=False, ncols=4, loc="lower right", bbox_to_anchor=(1, 1))
    axes.spines[["top", "right"]].set_visible(False)


def _plot_side_by_side(figure: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    left, middle, right = figure.subplots(1, 3)
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    for number, arm in enumerate(arms):
        mine = [row for row in rows if row["arm"] == arm]
        items = [row["items"] for row in mine]
        # Arms that coincide stay visible: each marker is smaller than the one below it.
        style = {"marker": "o", "ms": 4 + 3 * (len(arms) - number)}
        left.plot(items, [row["gpus"] or float("nan") for row in mine], label=arm, **style)
        middle.plot(items, [row["table_bytes"] / _GIB for row in mine], **style)
    left.set(xscale="log", yscale="log", xlabel="items", title="GPUs needed")
    left.set_yscale("log", base=2)
    middle.set(xscale="log", xlabel="items", title="table GiB")
    middle.set_yscale("symlog", linthresh=0.1)
    middle.set_ylim(bottom=0)
    last = {row["arm"]: row for row in rows}
    wire = [(last[arm]["wire_bytes_per_batch"] or 0) / 2**20 for arm in arms]
    right.barh(arms, wire)
    right.set(title="MiB over the wire per batch")
    left.legend(frameon=False, fontsize=8, labelspacing=1)
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
