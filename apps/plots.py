"""Charts of a comparison, as PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

_SLICES = ("all", "warm", "cold", "head", "torso", "tail")


def plot_slices(arms: Sequence[Mapping[str, Any]], path: Path) -> None:
    """NE of each arm by slice: a bar for the mean, a whisker for the spread over seeds."""
    slices = [s for s in _SLICES if any(arm["slices"][s]["ne"] is not None for arm in arms)]
    figure, axes = plt.subplots(figsize=(10, 4.2), layout="constrained")
    width = 0.8 / len(arms)
    for number, arm in enumerate(arms):
        at = [x + (number - (len(arms) - 1) / 2) * width for x in range(len(slices))]
        means = [arm["slices"][s]["ne"] or float("nan") for s in slices]
        spread = [arm["slices"][s]["ne_std"] or 0.0 for s in slices]
        axes.bar(at, means, width * 0.92, yerr=spread, label=arm["name"], error_kw={"lw": 1})
    values = [arm["slices"][s]["ne"] for arm in arms for s in slices if arm["slices"][s]["ne"]]
    axes.set_ylim(min(values) - 0.03, max(values) + 0.02)
    axes.set_xticks(range(len(slices)), slices)
    axes.set_ylabel("normalized entropy (lower is better)")
    axes.legend(ncols=len(arms), loc="upper center", bbox_to_anchor=(0.5, 1.12), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def plot_cost(arms: Sequence[Mapping[str, Any]], path: Path) -> None:
    """NE of each arm against the bytes that one history event costs."""
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for arm in arms:
        if arm["ne"] is None:
            continue
        axes.errorbar(arm["bytes_per_event"], arm["ne"], yerr=arm["ne_std"] or 0.0, fmt="o", ms=7)
        axes.annotate(
            arm["name"], (arm["bytes_per_event"], arm["ne"]), xytext=(7, 5), textcoords="offset points"
        )
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xlabel("bytes per history event (item only)")
    axes.set_ylabel("normalized entropy (lower is better)")
    axes.margins(x=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_gains(rows: Sequence[Mapping[str, Any]], cost: str, path: Path) -> None:
    """NE of each row of a table, overall and cold, with its spread over seeds; its cost beside its name.

    Args:
        rows: of :func:`apps.paper_report.paper_report`.
        cost: key of what a row costs, e.g. ``bytes_per_event``.
        path: PNG to write.
    """
    size = (11, 1.2 + 0.3 * len(rows))
    figure, panels = plt.subplots(1, 2, figsize=size, sharey=True, layout="constrained")
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
    _save(figure, path)
