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


def plot_gains(rows: Sequence[Mapping[str, Any]], x_axis: str, path: Path) -> None:
    """NE of each row of a paper's table, overall and cold, against what it costs."""
    figure, panels = plt.subplots(1, 2, figsize=(13, 5.2), layout="constrained")
    for axes, key, title in zip(panels, ("ne", "ne_cold"), ("all examples", "cold items"), strict=True):
        for row in rows:
            if row[key] is None:
                continue
            axes.errorbar(row[x_axis], row[key], yerr=row[f"{key}_std"] or 0.0, fmt="o", ms=5, lw=1)
            axes.annotate(
                row["name"], (row[x_axis], row[key]), xytext=(5, 3), textcoords="offset points", fontsize=7
            )
        axes.set_xscale("symlog", linthresh=1)
        axes.set_xlabel(x_axis.replace("_", " "))
        axes.set_ylabel("normalized entropy (lower is better)")
        axes.set_title(title)
        axes.margins(x=0.15)
        axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)
