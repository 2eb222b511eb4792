"""Hold a run, a catalog or a day of a log against thresholds: `torchrec-sid watch --run RUN`.

    torchrec-sid watch --run RUN --thresholds limits.yaml --output watch.json
    torchrec-sid watch --catalog CATALOG --against EARLIER --log PREPARED
    torchrec-sid watch --log PREPARED --against PREPARED_BEFORE --prometheus /var/lib/node_exporter/sid.prom

A file of thresholds has bounds by monitor, or by monitor and labels:

    ne: {max: 0.9}
    ne{slice=cold}: {max: 0.98}
    calibration: {min: 0.95, max: 1.05}

Exit status: 0 within all bounds, 3 where a reading crosses one, 1 where something cannot be read.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from torchrec_sid.artifact import write_atomically, write_json
from torchrec_sid.catalog import SidCatalog
from torchrec_sid.data.prepared import PreparedLog
from torchrec_sid.errors import ArtifactError, SidError
from torchrec_sid.monitors import (
    Reading,
    Thresholds,
    prometheus_text,
    read_catalog,
    read_coverage,
    read_drift,
    read_log,
    read_metrics,
    read_roll,
)
from torchrec_sid.options import read_mapping
from torchrec_sid.training.run_record import METRICS, trained_config

from .cli import parse_config, plain_errors, wide_console

CROSSED = 3
"""Exit status where a reading crosses a threshold."""


@dataclass(frozen=True)
class WatchConfig:
    """What is watched; a run, a catalog, a log or a rolling run, or several of them."""

    run: str | None = None
    """Run directory of torchrec-sid train: metrics, its log, its catalogs."""
    catalog: str | None = None
    """SidCatalog: code usage, collisions; with --log also examples without a SID."""
    log: str | None = None
    """Prepared log: unknown and missing values, distributions of features."""
    roll: str | None = None
    """roll.json of a rolling run: metrics of its last day."""
    against: str | None = None
    """What it is compared with: an earlier catalog for --catalog, else an earlier prepared log."""
    split: str = "test"
    """Split of the log that is watched: train, valid or test."""
    rows: int = 1_000_000
    """Examples of a log that are read, and of the training period that they are compared with."""
    thresholds: str | None = None
    """Bounds by monitor (YAML); none: readings alone."""
    output: str | None = None
    """File for the readings as JSON."""
    prometheus: str | None = None
    """File for the readings in the text format of Prometheus."""

    def __post_init__(self) -> None:
        if not (self.run or self.catalog or self.log or self.roll):
            raise SidError("watch", "nothing to watch", "Pass --run, --catalog, --log or --roll.")
        if self.against and not (self.catalog or self.log):
            raise SidError("--against", "nothing to compare", "Pass --catalog or --log with it.")
        if self.rows < 1:
            raise SidError("--rows", f"{self.rows}", "Read one example or more.")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    with plain_errors():
        config = parse_config(WatchConfig, __doc__, argv)
        crossed = watch(config)
    if crossed:
        sys.exit(CROSSED)


def watch(config: WatchConfig) -> list[Reading]:
    """Measure, print, write, and return the readings that cross a threshold.

    Raises:
        SidError: something cannot be read, or a threshold that means nothing.
    """
    # First what costs nothing: a misspelt threshold is not found after an hour of reading.
    bounds = Thresholds({})
    if config.thresholds is not None:
        bounds = Thresholds(read_mapping(config.thresholds), config.thresholds)
    readings = list(_readings(config))
    crossed = [each for each in readings if not _within(each, bounds)]
    wide_console(100).print(_shown(readings, bounds))
    for name in bounds.unread(readings):
        print(f"not measured here: {name}")
    for reading in crossed:
        print(f"CROSSED {reading.name}: {reading.value:.4f}, allowed {_allowed(reading, bounds)}")
    if config.output is not None:
        write_json(Path(config.output), _report(readings, bounds))
    if config.prometheus is not None:
        text = prometheus_text(readings, bounds)
        write_atomically(Path(config.prometheus), partial(_write, text))
    return crossed


def _readings(config: WatchConfig) -> Iterator[Reading]:
    log = None if config.log is None else PreparedLog.open(config.log)
    if config.run is not None:
        yield from _of_run(Path(config.run), config)
    if config.catalog is not None:
        catalog = SidCatalog.open(config.catalog)
        yield from read_catalog(catalog)
        if config.against is not None:
            yield from read_drift(SidCatalog.open(config.against), catalog, log)
        if log is not None:
            yield read_coverage(catalog, log, config.split)
    if log is not None:
        earlier = config.against if config.catalog is None else None
        reference = None if earlier is None else PreparedLog.open(earlier)
        yield from read_log(log, config.split, reference, config.rows)
    if config.roll is not None:
        file = Path(config.roll)
        yield from read_roll(file, _json(file).get("days"))


def _of_run(run: Path, config: WatchConfig) -> Iterator[Reading]:
    trained = trained_config(run)
    file = run / (METRICS if config.split == "test" else f"metrics-{config.split}.json")
    yield from read_metrics(_json(file)["slices"])
    log = PreparedLog.open(trained.prepared or run / "prepared")
    for name in ("catalog", "side_catalog"):
        path = getattr(trained, name)
        if path is not None:
            catalog = SidCatalog.open(path)
            yield from read_catalog(catalog, name)
            yield read_coverage(catalog, log, config.split, name)
    if config.log is None:
        yield from read_log(log, config.split, None, config.rows)


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        remedy = "Train the run, or evaluate it with torchrec-sid evaluate --split."
        raise ArtifactError(str(file), f"cannot be read ({error})", remedy) from error
    if not isinstance(found, dict):
        raise ArtifactError(str(file), "is no record", "Train or roll again.")
    return found


def _write(text: str, path: Path) -> None:
    path.write_text(text)


def _within(reading: Reading, bounds: Thresholds) -> bool:
    bound = bounds.bound(reading)
    return bound is None or bound.allows(reading.value)


def _allowed(reading: Reading, bounds: Thresholds) -> str:
    bound = bounds.bound(reading)
    if bound is None:
        return ""
    low = "" if bound.min is None else f"{bound.min:g} .."
    return f"{low or '..'}{'' if bound.max is None else f' {bound.max:g}'}"


def _report(readings: Sequence[Reading], bounds: Thresholds) -> dict[str, Any]:
    return {
        "readings": [
            {
                "monitor": each.monitor,
                "labels": each.labels,
                "value": each.value if math.isfinite(each.value) else None,
                "within": _within(each, bounds),
                "allowed": _allowed(each, bounds) or None,
            }
            for each in readings
        ],
        "crossed": [each.name for each in readings if not _within(each, bounds)],
        "not_measured": list(bounds.unread(readings)),
    }


def _shown(readings: Sequence[Reading], bounds: Thresholds) -> Table:
    table = Table("monitor", "value", "allowed", "")
    for each in readings:
        mark = "" if _within(each, bounds) else "CROSSED"
        table.add_row(each.name, f"{each.value:.4f}", _allowed(each, bounds), mark)
    return table


if __name__ == "__main__":
    main()
