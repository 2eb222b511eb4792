"""Every monitor has a log, a catalog or a run that trips it, and a clean one that does not."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apps.watch import WatchConfig, main, watch
from tests.data.logs import SPLITS, write_log
from torchrec_sid.catalog import SidCatalog
from torchrec_sid.data.prepare import prepare
from torchrec_sid.data.prepared import PreparedLog
from torchrec_sid.data.specification import Specification
from torchrec_sid.errors import ArtifactError, SidError
from torchrec_sid.monitors import (
    MONITORS,
    Reading,
    Thresholds,
    prometheus_text,
    read_catalog,
    read_log,
    read_metrics,
    read_roll,
)
from torchrec_sid.spec import SidSpec

ROWS, ITEMS, SPEC = 3000, 40, SidSpec((4, 4))
FEATURES = Specification.from_plain(
    {
        "labels": {"label": {"column": "label"}},
        "features": {
            "context": {"device": {}, "price": {"kind": "numeric", "standardise": False}},
            "item": {"brand": {}},
        },
    }
)
BOUNDS = {
    "unknown_rate": {"max": 0.1},
    "missing_rate": {"max": 0.1},
    "feature_drift": {"max": 0.25},
    # Histories only grow in a log that begins with none.
    "feature_drift{feature=log_history_length}": {"max": 20},
    "feature_drift{feature=past_positive_rate}": {"max": 5},
    "without_sid_rate": {"max": 0.05},
    "code_usage": {"min": 0.9},
    "code_perplexity": {"min": 0.5},
    "collision_rate": {"max": 0.99},
    "sid_drift{level=1}": {"max": 0.2},
    "sid_traffic_drift{level=1}": {"max": 0.2},
}


def _log(folder: Path, *, changed: bool) -> PreparedLog:
    """A log whose last fifth is like the rest, or has new items, a new device, and dearer ones."""
    draw = np.random.default_rng(0)
    late = np.arange(ROWS) >= ROWS * 4 // 5
    other = late & changed
    item = np.where(other, draw.integers(ITEMS // 2, ITEMS, ROWS), draw.integers(0, ITEMS // 2, ROWS))
    device = np.where(other, draw.choice(["watch", "tv"], ROWS), draw.choice(["tv", "phone"], ROWS))
    events: dict[str, Any] = {
        "user": draw.integers(0, 50, ROWS).tolist(),
        "item": (item + 100).tolist(),
        "ts": list(range(ROWS)),
        "label": draw.integers(0, 2, ROWS).tolist(),
        "split": [SPLITS[int(i >= 0.6) + int(i >= 0.8)] for i in np.arange(ROWS) / ROWS],
        "device": [
            None if lost else str(name)
            for name, lost in zip(device, other & (draw.random(ROWS) < 0.3), strict=True)
        ],
        "price": (draw.normal(5, 1, ROWS) + 3 * other).tolist(),
    }
    brands = [f"b{i % 3}" for i in range(ITEMS)]
    write_log(folder / "log", events, ITEMS, item_columns={"brand": brands})
    return prepare(folder / "log", folder / "prepared", specification=FEATURES)


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PreparedLog]:
    folder = tmp_path_factory.mktemp("watch")
    return {name: _log(folder / name, changed=name == "changed") for name in ("clean", "changed")}


def _catalog(folder: Path, codes: torch.Tensor, mark: str) -> SidCatalog:
    return SidCatalog.create(folder, SPEC, torch.arange(len(codes)) + 100, codes, mark * 64)


@pytest.fixture(scope="module")
def catalogs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SidCatalog]:
    folder = tmp_path_factory.mktemp("catalogs")
    even = torch.stack([torch.arange(ITEMS) % 4, torch.arange(ITEMS) // 4 % 4], 1)
    lone = even.clone()
    lone[0] = torch.tensor([3, 3])
    # One item alone makes the rate of collisions differ from 1: 40 items share 16 SIDs.
    few = torch.zeros(ITEMS // 2, 2, dtype=torch.int64)
    return {
        "before": _catalog(folder / "before", even, "a"),
        "same": _catalog(folder / "same", even, "a"),
        "few": _catalog(folder / "few", few, "b"),
        "renamed": _catalog(folder / "renamed", (even + 1) % 4, "c"),
    }


def _crossed(config: WatchConfig) -> set[str]:
    return {reading.monitor for reading in watch(config)}


def _limits(folder: Path, bounds: dict[str, Any] = BOUNDS) -> str:
    (folder / "limits.yaml").write_text(json.dumps(bounds))
    return str(folder / "limits.yaml")


def test_a_day_like_the_others_is_within_and_a_changed_one_is_not(
    logs: dict[str, PreparedLog], tmp_path: Path
) -> None:
    limits = _limits(tmp_path)
    assert not _crossed(WatchConfig(log=str(logs["clean"].path), thresholds=limits))
    file = tmp_path / "watch.json"
    crossed = watch(WatchConfig(log=str(logs["changed"].path), thresholds=limits, output=str(file)))
    names = {reading.name for reading in crossed}
    assert {
        "unknown_rate{feature=item}",
        "unknown_rate{feature=device}",
        "missing_rate{feature=device}",
        "feature_drift{feature=device}",
        "feature_drift{feature=price}",
    } <= names
    assert set(json.loads(file.read_text())["crossed"]) == names
    # Against the changed log's own past the same day of the other log is no different.
    other = WatchConfig(log=str(logs["changed"].path), against=str(logs["clean"].path), thresholds=limits)
    assert {reading.name for reading in watch(other)} == names


def test_readings_of_a_log_are_those_counted_by_hand(logs: dict[str, PreparedLog]) -> None:
    found = {each.name: each.value for each in read_log(logs["changed"], "test")}
    test = [i for i in range(ROWS) if i >= ROWS * 4 // 5]
    assert found["unknown_rate{feature=item}"] == 1.0
    missing = found["missing_rate{feature=device}"]
    assert missing == pytest.approx(0.3, abs=0.06) and missing * len(test) == pytest.approx(
        round(missing * len(test))
    )
    few = {each.name: each.value for each in read_log(logs["clean"], "test", rows=1)}
    assert few["unknown_rate{feature=item}"] == 0.0  # the first batch, not nothing


def test_catalogs_are_held_to_their_usage_and_to_the_one_before(
    logs: dict[str, PreparedLog], catalogs: dict[str, SidCatalog], tmp_path: Path
) -> None:
    limits = _limits(tmp_path, {**BOUNDS, "collision_rate": {"max": 1.0}})
    clean = str(logs["clean"].path)

    def crossed(name: str) -> set[str]:
        catalog, against = str(catalogs[name].path), str(catalogs["before"].path)
        return _crossed(WatchConfig(catalog=catalog, against=against, log=clean, thresholds=limits))

    assert not crossed("same")
    assert crossed("renamed") == {"sid_drift", "sid_traffic_drift"}
    assert crossed("few") >= {"code_usage", "code_perplexity", "sid_drift"}
    changed = WatchConfig(
        catalog=str(catalogs["few"].path), log=str(logs["changed"].path), thresholds=limits
    )
    assert "without_sid_rate" in _crossed(changed)
    rates = [r.value for r in read_catalog(catalogs["few"]) if r.monitor == "collision_rate"]
    assert rates == [1.0]


METRICS = {"all": {"ne": 0.8, "auc": 0.7, "calibration": 1.0}, "cold": {"ne": 0.9, "auc": None}}


@pytest.mark.parametrize(
    ("bound", "crossed"),
    [
        ({"ne": {"max": 0.95}}, []),
        ({"ne": {"max": 0.85}}, ["ne{slice=cold}"]),
        ({"ne": {"max": 0.85}, "ne{slice=cold}": {"max": 0.95}}, []),
        ({"auc": {"min": 0.75}}, ["auc{slice=all}"]),
        ({"calibration": {"min": 0.9, "max": 1.1}}, []),
        ({"calibration": {"max": 0.9}}, ["calibration{slice=all}"]),
    ],
)
def test_metrics_are_held_to_the_bound_with_the_most_labels(bound: dict, crossed: list[str]) -> None:
    limits = Thresholds(bound)
    found = []
    for reading in read_metrics(METRICS):
        allowed = limits.bound(reading)
        if allowed is not None and not allowed.allows(reading.value):
            found.append(reading.name)
    assert found == crossed


def test_what_is_no_number_is_never_within() -> None:
    bound = Thresholds({"ne": {"max": 2}}).bound(Reading("ne", {}, math.nan))
    assert bound is not None and not bound.allows(math.nan)


def test_the_last_day_of_a_roll_is_watched(tmp_path: Path) -> None:
    days = [
        {"day": day, "arm": arm, "ne": ne, "ne_cold": None, "auc": 0.7, "calibration": 1.0}
        for day, arm, ne in ((1, "full_id", 2.0), (2, "full_id", 0.8), (2, "side", 0.7))
    ]
    file = tmp_path / "roll.json"
    file.write_text(json.dumps({"days": days}))
    limits = _limits(tmp_path, {"ne": {"max": 0.75}})
    crossed = watch(WatchConfig(roll=str(file), thresholds=limits))
    assert [reading.name for reading in crossed] == ["ne{arm=full_id,slice=all}"]
    with pytest.raises(SidError, match="has no days"):
        list(read_roll(file, None))


@pytest.mark.parametrize(
    ("bounds", "match"),
    [
        ({"nee": {"max": 1}}, "Did you mean ne"),
        ({"ne": 1}, "Write {min"),
        ({"ne": {"most": 1}}, "Write {min"),
        ({"ne": {"max": "low"}}, "A bound is a number"),
        ({"ne{cold}": {"max": 1}}, "label=value"),
        ([], "is no mapping"),
    ],
)
def test_bad_thresholds_are_named(bounds: Any, match: str) -> None:
    with pytest.raises(SidError, match=match):
        Thresholds(bounds)


def test_exit_status_and_prometheus_text(
    logs: dict[str, PreparedLog],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    file = tmp_path / "sid.prom"
    limits = _limits(tmp_path, {**BOUNDS, "ne": {"max": 1}})
    words = ["--thresholds", limits, "--prometheus", str(file), "--log"]
    main([*words, str(logs["clean"].path)])
    assert "not measured here: ne" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main([*words, str(logs["changed"].path)])
    assert ended.value.code == 3 and "CROSSED unknown_rate{feature=item}" in capsys.readouterr().out
    text = file.read_text()
    assert 'torchrec_sid_unknown_rate{feature="item"} 1.0' in text
    assert 'torchrec_sid_within_bounds{monitor="unknown_rate",feature="item"} 0' in text
    monkeypatch.setattr(sys, "argv", ["watch"])
    with pytest.raises(SystemExit, match="nothing to watch"):
        main([])
    with pytest.raises(ArtifactError, match="manifest"):
        watch(WatchConfig(log=str(tmp_path)))


@given(st.text(max_size=8), st.floats())
def test_prometheus_reads_every_label_and_value(label: str, value: float) -> None:
    parser = pytest.importorskip("prometheus_client.parser", reason="part of the server's environment")
    text = prometheus_text([Reading("ne", {"arm": label}, value)], Thresholds({}))
    (family,) = parser.text_string_to_metric_families(text)
    (sample,) = family.samples
    assert sample.labels == {"arm": label} and (sample.value == value or math.isnan(value))


def test_every_monitor_is_tried_here() -> None:
    tried = {name.partition("{")[0] for name in BOUNDS} | {"ne", "auc", "calibration"}
    assert tried == set(MONITORS)
