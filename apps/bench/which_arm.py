"""Ids, tables, SIDE, or both? Which arm wins where, as the planted truth of synthetic logs is turned.

    python -m apps.bench.which_arm --output out/which_arm --seeds 3

Each setting is the log of the first line with one thing changed. The table has the gain over ids of every
arm with its 95% interval over users and seeds, and which arm is best on cold items; ``which_arm.png`` shows
gains on all items and on cold ones in one picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from apps.cli import parse_config, plain_errors
from apps.harness import Effort, run_rows
from apps.report import summarise
from apps.rows import Comparison, Row
from torchrec_sid.artifact import write_json
from torchrec_sid.data.synthetic import SyntheticConfig, write_synthetic
from torchrec_sid.errors import SidError
from torchrec_sid.learn import SidRecipe
from torchrec_sid.models.build import RankingConfig
from torchrec_sid.quantizers import ResidualKMeansConfig, VqFusionConfig
from torchrec_sid.training.train_config import TrainConfig

SETTINGS: dict[str, dict[str, Any]] = {
    "as planted": {},
    "clear content": {"noise": 0.1},
    "noisy content": {"noise": 1.5},
    "no new items": {"new_items": 0.0, "freshness": 0.0},
    "mostly new items": {"new_items": 0.7, "freshness": 0.4},
    "tastes of 10 days": {"taste_days": 10},
    "20 times the items": {"items": 100_000},
    "a fifth of the traffic": {"events": 60_000},
    "items are what matters": {"quality_signal": 2.0, "topic_signal": 0.3, "subtopic_signal": 0.3},
}
"""Name -> what differs from the first."""
ARMS = (
    "known_id",
    "hashed_prefix+overlap",
    "side",
    "known_id+hashed_prefix+overlap",
    "known_id+side",
    "dense+cosine",
)


@dataclass(frozen=True)
class WhichArmConfig:
    """One sweep."""

    output: str
    """Folder of logs, runs and the table."""
    settings: tuple[str, ...] = ()
    """Names of settings; default: all."""
    seeds: int = 3
    """Trainings of each arm."""
    jobs: int = 2
    """Trainings at a time."""
    epochs: int = 2
    """Passes at most; a training ends with its best validation."""
    max_steps: int | None = None
    """Stop each training after so many steps: for a quick look."""
    log: SyntheticConfig = field(default_factory=SyntheticConfig)
    """The first log."""

    def __post_init__(self) -> None:
        if unknown := set(self.settings) - set(SETTINGS):
            raise SidError("settings", f"{sorted(unknown)}", f"Choose from {'; '.join(SETTINGS)}.")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    with plain_errors():
        config = parse_config(WhichArmConfig, __doc__, argv)
        found = which_arm(config, Console())
    print("| setting | base NE |", " | ".join(ARMS[1:]), "| best cold |")
    print("|---|---:|" + "---:|" * len(ARMS[1:]) + "---|")
    for name, rows in found.items():
        cells = [f"{row['gain']:+.2f} {_interval(row)}" for row in rows[1:]]
        cold = min(rows, key=lambda row: row["ne_cold"] or 9.0)
        print(f"| {name} | {rows[0]['ne']:.4f} |", " | ".join(cells), f"| {cold['name']} |")


def which_arm(config: WhichArmConfig, console: Console) -> dict[str, list[dict[str, Any]]]:
    """Make the logs, train every arm on each, and write ``which_arm.json`` and ``which_arm.png``.

    Returns:
        Setting -> rows of a report, the arm of ids first.
    """
    output = Path(config.output)
    found = {}
    for name in config.settings or tuple(SETTINGS):
        home = output / name.replace(" ", "-")
        write_synthetic(home / "log", replace(config.log, **SETTINGS[name]))
        base = TrainConfig(
            data=str(home / "log"),
            output=str(home / "runs"),
            specification="none",
            epochs=config.epochs,
            evaluate_every=200,
            patience=3,
            max_steps=config.max_steps,
        )
        trained = run_rows(_rows, base, Effort(config.seeds, jobs=config.jobs), home, console)
        keys = ("name", "ne", "ne_cold", "gain", "gain_interval", "gain_cold", "gain_cold_interval")
        found[name] = [{key: row[key] for key in keys} for row in summarise(trained)["rows"]]
    write_json(output / "which_arm.json", found)
    plot(found, output / "which_arm.png")
    return found


def _rows(items: int) -> Comparison:
    rows = tuple(
        Row(
            arm,
            RankingConfig(arm=arm, table_rows=max(256, items // 4)),
            "tables" if "hashed_prefix" in arm else None,
            "side" if "side" in arm.split("+") else None,
        )
        for arm in ARMS
    )
    sids = {
        "tables": SidRecipe(ResidualKMeansConfig((16, 16, 16))),
        "side": SidRecipe(VqFusionConfig(codebooks=(), stages=((25, 3),))),
    }
    return Comparison("Which arm wins where", rows, sids)


def plot(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Gains over ids as a picture: a line of points a setting, intervals as bars, cold items beside."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.5 + 0.7 * len(found)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, key, title in zip(panels, ("gain", "gain_cold"), ("all items", "cold items"), strict=True):
        for number, arm in enumerate(ARMS[1:]):
            rows = [next(row for row in mine if row["name"] == arm) for mine in found.values()]
            places = [-place - 0.13 * number for place in range(len(rows))]
            known = [(row, at) for row, at in zip(rows, places, strict=True) if row[key] is not None]
            bars = [[], []]  # type: ignore[var-annotated]
            for row, _ in known:
                low, high = row[f"{key}_interval"] or (row[key], row[key])
                bars[0].append(max(0.0, row[key] - low))
                bars[1].append(max(0.0, high - row[key]))
            axes.errorbar(
                [row[key] for row, _ in known], [at for _, at in known], xerr=bars, fmt="o", ms=4, label=arm
            )
        axes.axvline(0, color="0.6", lw=0.8)
        axes.set_xlabel("gain in NE over ids, %")
        axes.set_title(title)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks([-place - 0.26 for place in range(len(found))], list(found))
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _interval(row: dict[str, Any]) -> str:
    found = row["gain_interval"]
    return "" if found is None else f"[{found[0]:+.2f}, {found[1]:+.2f}]"


if __name__ == "__main__":
    main()
