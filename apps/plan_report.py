"""A plan as a page: plots of memory, time and the side by side, embedded in one HTML file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .pages import drawn, write_page

_GIB = 2**30
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


def write_plan_page(path: Path, report: Mapping[str, Any], summary_text: str) -> None:
    """Write the page.

    Args:
        path: the HTML file.
        report: what ``report.json`` holds: command, planner, summary, wire_bytes, side_by_side.
        summary_text: the plan, as lines of text.
    """
    summary, rows = report["summary"], report["side_by_side"]
    pictures: list[tuple[str, Callable[[Any, Any], None], Any]] = [
        (f"Memory per rank, {'DDR' if summary['device'] == 'cpu' else 'HBM'}", _plot_memory, summary),
        (f"Time in tables per rank, balance {summary['balance']:.2f}", _plot_time, summary),
    ]
    if rows:
        pictures += [
            ("GPUs needed", _plot_gpus, rows),
            ("Table GiB", _plot_gib, rows),
            ("MiB over the wire per batch", _plot_wire, rows),
        ]
    write_page(
        path,
        "plan.html",
        report=report,
        text=summary_text,
        lines=side_by_side_table(rows) if rows else [],
        pictures=[
            (title, drawn(lambda axes, plot=plot, data=data: plot(axes, data)))  # type: ignore[misc]
            for title, plot, data in pictures
        ],
    )


def _plot_memory(axes: Any, summary: Mapping[str, Any]) -> None:
    kind = "ddr" if summary["device"] == "cpu" else "hbm"
    ranks = [load["rank"] for load in summary["ranks"]]
    tables = [load[f"{kind}_bytes"] / _GIB for load in summary["ranks"]]
    kept = summary["reserved_bytes"] / _GIB
    axes.bar(ranks, tables, 0.9, label="tables, optimizer, buffers")
    axes.bar(ranks, [kept] * len(ranks), 0.9, tables, color="0.8", label="reserved")
    axes.axhline(summary[f"{kind}_capacity"] / _GIB, color="crimson", lw=1, label="capacity")
    axes.set(xlabel="rank", ylabel=f"{kind.upper()} GiB")
    _legend_above(axes)


def _plot_time(axes: Any, summary: Mapping[str, Any]) -> None:
    ranks = [load["rank"] for load in summary["ranks"]]
    base = [0.0] * len(ranks)
    parts = ("forward_compute", "forward_comms", "backward_compute", "backward_comms", "prefetch")
    for part in parts:
        values = [load["time"][part] for load in summary["ranks"]]
        if any(values):
            axes.bar(ranks, values, 0.9, base, label=part.replace("_", " "))
        base = [a + b for a, b in zip(base, values, strict=True)]
    axes.set(xlabel="rank", ylabel="predicted ms per step")
    if any(base):
        _legend_above(axes)


def _plot_gpus(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    _plot_by_items(axes, rows, lambda row: row["gpus"] or float("nan"))
    axes.set_yscale("log", base=2)


def _plot_gib(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    _plot_by_items(axes, rows, lambda row: row["table_bytes"] / _GIB)
    axes.set_yscale("symlog", linthresh=0.1)
    axes.set_ylim(bottom=0)


def _plot_by_items(
    axes: Any, rows: Sequence[Mapping[str, Any]], value: Callable[[Mapping[str, Any]], float]
) -> None:
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    for number, arm in enumerate(arms):
        mine = [row for row in rows if row["arm"] == arm]
        # Arms that coincide stay visible: each marker is smaller than the one below it.
        size = 4 + 3 * (len(arms) - number)
        axes.plot(
            [row["items"] for row in mine], [value(row) for row in mine], marker="o", ms=size, label=arm
        )
    axes.set(xscale="log", xlabel="items")
    _legend_above(axes)


def _plot_wire(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    last = {row["arm"]: row for row in rows}
    axes.barh(list(last), [(row["wire_bytes_per_batch"] or 0) / 2**20 for row in last.values()])


def _legend_above(axes: Any) -> None:
    axes.legend(frameon=False, ncols=2, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1))
