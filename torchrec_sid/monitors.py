"""What is watched of a run, a catalog or a day of a log, as readings that thresholds are held against."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from torchrec_sid.artifact.typed import MismatchError, read_typed
from torchrec_sid.catalog import ItemValues, SidCatalog, measure_drift
from torchrec_sid.data.batch import BatchConfig
from torchrec_sid.data.example_features import dense_names, log_features, looks_up
from torchrec_sid.data.parquet import Array
from torchrec_sid.data.prepared import SEGMENTS, PreparedLog
from torchrec_sid.data.reader import BatchReader
from torchrec_sid.data.specification import MISSING_ROW, UNKNOWN_ROW, CategoricalFeature
from torchrec_sid.errors import SidError

MONITORS = {
    "ne": "normalized entropy of the predictions",
    "auc": "area under the ROC curve",
    "calibration": "mean prediction over mean label",
    "unknown_rate": "share of the examples whose item training never saw, or whose value has no row",
    "without_sid_rate": "share of the examples whose item the catalog lacks",
    "missing_rate": "share of the examples without a value",
    "feature_drift": "population stability index of a feature against the reference period",
    "code_usage": "share of the codes of a level that items have",
    "code_perplexity": "perplexity of the codes of a level over its cardinality",
    "collision_rate": "share of the items whose SID another item has too",
    "sid_drift": "share of the items whose SID changed up to a level, against the earlier catalog",
    "sid_traffic_drift": "the same, by the items' training events",
}
"""Name -> what it is, for thresholds and for Prometheus."""

_BATCH, _BINS, _KEPT = 16_384, 10, 100


class Reading(NamedTuple):
    """One number that was measured."""

    monitor: str
    """Key of :data:`MONITORS`."""
    labels: dict[str, str]
    """Of what: slice, feature, level, arm."""
    value: float

    @property
    def name(self) -> str:
        """As thresholds and reports write it, e.g. ``ne{slice=cold}``."""
        inner = ",".join(f"{key}={value}" for key, value in sorted(self.labels.items()))
        return f"{self.monitor}{{{inner}}}" if inner else self.monitor


class Bound(NamedTuple):
    """What a reading may be."""

    min: float | None = None
    max: float | None = None

    def allows(self, value: float) -> bool:
        """Whether a reading is within; one that is not a number never is."""
        low = -math.inf if self.min is None else self.min
        high = math.inf if self.max is None else self.max
        return low <= value <= high


class Thresholds:
    """Bounds by monitor, ``ne``, or by monitor and labels, ``ne{slice=cold}``; the most labels win.

    Args:
        bounds: name -> ``{min: .., max: ..}``, either or both.
        where: where they come from, for errors.

    Raises:
        SidError: a monitor that does not exist, or a bound that is none.
    """

    def __init__(self, bounds: Mapping[str, Any], where: str = "thresholds") -> None:
        self._bounds: list[tuple[str, str, dict[str, str], Bound]] = []
        if not isinstance(bounds, Mapping):
            raise SidError(where, "is no mapping", "Write a bound a line, such as ne: {max: 0.9}.")
        for name, bound in bounds.items():
            monitor, labels = _parsed(str(name), where)
            if not isinstance(bound, Mapping) or not bound or set(bound) - {"min", "max"}:
                raise SidError(f"{where}: {name}", f"{bound!r}", "Write {min: A}, {max: B} or both.")
            try:
                limits = Bound(**{key: read_typed(float, value) for key, value in bound.items()})
            except MismatchError as error:
                raise SidError(f"{where}: {name}", f"{bound!r}", "A bound is a number.") from error
            self._bounds.append((str(name), monitor, labels, limits))
        self._bounds.sort(key=lambda found: len(found[2]))

    def bound(self, reading: Reading) -> Bound | None:
        """The bound that holds for a reading; None where none does."""
        fits = [bound for _, name, labels, bound in self._bounds if _fits(reading, name, labels)]
        return fits[-1] if fits else None

    def unread(self, readings: Iterable[Reading]) -> tuple[str, ...]:
        """Names of the bounds that no reading is held against."""
        seen = list(readings)
        return tuple(
            name
            for name, monitor, labels, _ in self._bounds
            if not any(_fits(reading, monitor, labels) for reading in seen)
        )


def _fits(reading: Reading, monitor: str, labels: Mapping[str, str]) -> bool:
    return reading.monitor == monitor and labels.items() <= reading.labels.items()


def _parsed(name: str, where: str) -> tuple[str, dict[str, str]]:
    monitor, brace, inner = name.partition("{")
    if monitor not in MONITORS:
        near = difflib.get_close_matches(monitor, MONITORS, 1)
        hint = f"Did you mean {near[0]}?" if near else f"There are {', '.join(MONITORS)}."
        raise SidError(where, f"no monitor {monitor!r}", hint)
    pairs = [pair.partition("=") for pair in inner.removesuffix("}").split(",")] if brace else []
    if (brace and not inner.endswith("}")) or not all(key and equals for key, equals, _ in pairs):
        raise SidError(where, f"{name!r}", "Write monitor{label=value,label=value}.")
    return monitor, {key.strip(): value.strip() for key, _, value in pairs}


def read_metrics(slices: Mapping[str, Mapping[str, Any]], **labels: str) -> Iterator[Reading]:
    """Readings of the metrics of an evaluation.

    Args:
        slices: name of the slice -> its metrics, as in metrics.json; a metric that is None (a slice with a
            single label) is no reading.
        labels: of every reading.
    """
    for name, metrics in slices.items():
        for monitor in ("ne", "auc", "calibration"):
            if metrics.get(monitor) is not None:
                yield Reading(monitor, {**labels, "slice": name}, float(metrics[monitor]))


def read_catalog(catalog: SidCatalog, name: str = "catalog") -> Iterator[Reading]:
    """How a catalog uses its codes."""
    cardinalities = catalog.spec.cardinalities
    counts = [torch.zeros(size, dtype=torch.int64) for size in cardinalities]
    for batch in catalog.batches():
        for level, count in enumerate(counts):
            count += torch.bincount(batch.codes[:, level], minlength=len(count))
    for level, count in enumerate(counts, 1):
        labels = {"catalog": name, "level": str(level)}
        share = count[count > 0].double() / max(int(count.sum()), 1)
        perplexity = math.exp(-float((share * share.log()).sum()))
        yield Reading("code_usage", labels, float((count > 0).double().mean()))
        yield Reading("code_perplexity", labels, perplexity / len(count))
    if catalog.spec.bits <= 63:
        sids = catalog.lookup(catalog.item_ids())
        _, size = sids.unique(return_counts=True)
        shared = float(size[size > 1].sum()) / max(len(sids), 1)
        yield Reading("collision_rate", {"catalog": name}, shared)


def read_drift(
    before: SidCatalog, after: SidCatalog, log: PreparedLog | None = None, name: str = "catalog"
) -> Iterator[Reading]:
    """What changed from one catalog to another, by level; by traffic too where a log tells it."""
    traffic = None
    if log is not None:
        traffic = ItemValues(torch.tensor(log.item_ids), torch.tensor(log.item_train_events).double())
    changed = measure_drift(before, after, traffic=traffic).changed
    for level, share in enumerate(changed.items, 1):
        yield Reading("sid_drift", {"catalog": name, "level": str(level)}, share)
    if log is not None:
        for level, share in enumerate(changed.traffic, 1):
            yield Reading("sid_traffic_drift", {"catalog": name, "level": str(level)}, share)


def read_coverage(catalog: SidCatalog, log: PreparedLog, split: str, name: str = "catalog") -> Reading:
    """Share of the examples of a split whose item a catalog lacks."""
    lacks = ~catalog.contains(torch.tensor(log.item_ids))
    missing = rows = 0
    for batch in BatchReader(log, split, BatchConfig(_BATCH, 1, ("item",))):
        kept = batch.weights > 0
        missing += int(lacks[batch.features["item"].values()[kept]].sum())
        rows += int(kept.sum())
    return Reading("without_sid_rate", {"catalog": name}, missing / max(rows, 1))


def read_log(
    log: PreparedLog, split: str, reference: PreparedLog | None = None, rows: int = 1_000_000
) -> Iterator[Reading]:
    """How the examples of a split differ from those that a model was trained on.

    Args:
        log: prepared.
        split: whose examples are watched.
        reference: the log whose train split they are compared with, of the same features; None: this one.
        rows: examples of each that are read, from the first on.

    Raises:
        SidError: the reference has other features.
    """
    reference = log if reference is None else reference
    if _keys(log) != _keys(reference) or dense_names(log) != dense_names(reference):
        raise SidError(
            str(reference.path),
            "has other features than the log that is watched",
            "Compare logs that were prepared with one specification.",
        )
    before, now = _Distributions(reference, "train", rows), _Distributions(log, split, rows)
    yield Reading("unknown_rate", {"feature": "item"}, now.cold / max(now.rows, 1))
    for key in _keys(log):
        share = now.counts[key].astype(np.float64) / max(int(now.counts[key].sum()), 1)
        if isinstance(log_features(log)[key], CategoricalFeature):
            yield Reading("missing_rate", {"feature": key}, float(share[MISSING_ROW]))
            yield Reading("unknown_rate", {"feature": key}, float(share[UNKNOWN_ROW]))
        yield Reading("feature_drift", {"feature": key}, _stability(before.counts[key], now.counts[key]))
    for column, name in enumerate(dense_names(log)):
        old, new = before.dense[:, column], now.dense[:, column]
        edges = np.unique(np.quantile(old, np.arange(1, _BINS) / _BINS)) if len(old) else np.empty(0)
        binned = [
            np.bincount(np.searchsorted(edges, each), minlength=len(edges) + 1) for each in (old, new)
        ]
        yield Reading("feature_drift", {"feature": name}, _stability(*binned))


def _keys(log: PreparedLog) -> tuple[str, ...]:
    """Features that are rows of tables, those of events apart: a history belongs to many days."""
    return tuple(
        key
        for key, feature in log_features(log).items()
        if looks_up(feature) and feature.source != "history"
    )


class _Distributions:
    """Counts of the rows of every feature, and the dense inputs, over the first examples of a split."""

    def __init__(self, log: PreparedLog, split: str, most: int) -> None:
        keys = _keys(log)
        self.rows = self.cold = 0
        self.counts = {key: np.zeros(UNKNOWN_ROW + 1, np.int64) for key in keys}
        dense: list[Array] = [np.empty((0, len(dense_names(log))))]
        size = min(_BATCH, max(log.rows(split), 1))
        for batch in BatchReader(log, split, BatchConfig(size, 1, ("item", *keys)), drop_last=False):
            kept = batch.weights > 0
            self.rows += int(kept.sum())
            self.cold += int((batch.segment[kept] == SEGMENTS.index("cold")).sum())
            for key in keys:
                feature = batch.features[key]
                values = feature.values()[kept.repeat_interleave(feature.lengths())].numpy()
                self.counts[key] = _sum(self.counts[key], np.bincount(values))
            dense.append(batch.dense[kept].numpy())
            if self.rows >= most:
                break
        self.dense: Array = np.concatenate(dense)


def _sum(a: Array, b: Array) -> Array:
    size = max(len(a), len(b))
    return np.pad(a, (0, size - len(a))) + np.pad(b, (0, size - len(b)))


def _stability(before: Array, now: Array) -> float:
    """Population stability index, ``sum (q - p) ln(q / p)`` over bins: over .25 is a change.

    The values that were most frequent before have a bin each, all others one together; half a row more in
    every bin keeps the logarithm finite.
    """
    size = max(len(before), len(now))
    before, now = (np.pad(each, (0, size - len(each))).astype(np.float64) for each in (before, now))
    order = np.argsort(-before, kind="stable")
    binned = [np.append(each[order[:_KEPT]], each[order[_KEPT:]].sum()) for each in (before, now)]
    p, q = ((each + 0.5) / (each.sum() + 0.5 * len(each)) for each in binned)
    return float(((q - p) * np.log(q / p)).sum())


def prometheus_text(readings: Iterable[Reading], thresholds: Thresholds) -> str:
    """Readings in the text format of Prometheus, for a file that node_exporter collects.

    ``torchrec_sid_MONITOR`` is the reading, ``torchrec_sid_within_bounds`` 0 where it crosses its bound.
    """
    lines, bounded = [], []
    found = list(readings)
    for monitor, about in MONITORS.items():
        own = [reading for reading in found if reading.monitor == monitor]
        if own:
            lines += [f"# HELP torchrec_sid_{monitor} {about}", f"# TYPE torchrec_sid_{monitor} gauge"]
        lines += [f"torchrec_sid_{monitor}{_labels(each.labels)} {each.value!r}" for each in own]
    for reading in found:
        bound = thresholds.bound(reading)
        if bound is not None:
            labels = _labels({"monitor": reading.monitor, **reading.labels})
            bounded.append(f"torchrec_sid_within_bounds{labels} {int(bound.allows(reading.value))}")
    if bounded:
        lines += [
            "# HELP torchrec_sid_within_bounds 0 where a reading crosses its threshold",
            "# TYPE torchrec_sid_within_bounds gauge",
            *bounded,
        ]
    return "\n".join(lines) + "\n"


def _labels(labels: Mapping[str, str]) -> str:
    # Backslash, quote and newline are what the format escapes.
    quoted = (
        (key, value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n"))
        for key, value in labels.items()
    )
    inner = ",".join(f'{key}="{value}"' for key, value in quoted)
    return f"{{{inner}}}" if inner else ""


def read_roll(file: Path, days: Any) -> Iterator[Reading]:
    """Readings of the last day of a rolling run, ``{"days": [{"day", "arm", "ne", ...}]}``.

    Raises:
        SidError: no such record.
    """
    try:
        last = max(row["day"] for row in days)
        rows = [row for row in days if row["day"] == last]
        arms = [(str(row["arm"]), row) for row in rows]
    except (TypeError, KeyError, ValueError) as error:
        raise SidError(
            str(file), f"has no days ({error})", "Pass the roll.json of a rolling run."
        ) from error
    for arm, row in arms:
        yield from read_metrics({"all": row, "cold": {"ne": row.get("ne_cold")}}, arm=arm)
