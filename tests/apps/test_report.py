"""The report of a comparison: its schema, its means, its page."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from apps.report import markdown_table, summarise_arm, terminal_table, write_report

_KEYS = {
    "name",
    "ne",
    "ne_cold",
    "ne_std",
    "auc",
    "auc_warm",
    "auc_cold",
    "logloss",
    "bytes_per_event",
    "table_rows",
    "trained_parameters",
    "examples_per_second",
    "peak_rss_mb",
}


def _run(arm: str, ne: float, cold: float | None = 0.95, rss: float = 500.0) -> dict:
    def piece(value: float | None) -> dict:
        return {"rows": 10, "ne": value, "auc": 0.7, "calibration": 1.0, "logloss": 0.5}

    names = ("all", "warm", "cold", "head", "torso", "tail")
    return {
        "arm": arm,
        "bytes_per_event": 8,
        "table_rows": 100,
        "trained_parameters": 1000,
        "examples_per_second": 1e4,
        "peak_rss_mb": rss,
        "slices": {name: piece(cold if name == "cold" else ne) for name in names},
    }


def _report(*arms: dict) -> dict:
    return {
        "dataset": "toy <log>",
        "world_size": 2,
        "seeds": [0, 1],
        "command": "python -m apps.compare",
        "git": None,
        "arms": list(arms),
    }


def test_an_arm_is_the_mean_and_spread_of_its_seeds() -> None:
    arm = summarise_arm([_run("full_id", 0.8, rss=400), _run("full_id", 0.9, rss=600)])
    assert set(arm) >= _KEYS
    assert arm["ne"] == pytest.approx(0.85)
    assert arm["ne_std"] == pytest.approx(0.0707, abs=1e-3)
    assert arm["peak_rss_mb"] == 600


def test_one_seed_has_no_spread_and_an_empty_slice_no_metric() -> None:
    arm = summarise_arm([_run("full_id", 0.8, cold=None)])
    assert arm["ne_std"] is None and arm["ne_cold"] is None


def test_the_report_is_written_whole(tmp_path: Path) -> None:
    report = _report(
        summarise_arm([_run("none", 0.9, cold=None)]),
        summarise_arm([_run("full_id", 0.8), _run("full_id", 0.81)]),
    )
    write_report(report, tmp_path)
    assert json.loads((tmp_path / "report.json").read_text()) == report
    page = (tmp_path / "report.html").read_text()
    assert "toy &lt;log&gt;" in page and "toy <log>" not in page
    assert page.count("data:image/png;base64,") == 2
    assert 'src="http' not in page and "href" not in page, "not self-contained"


def test_the_tables_name_every_arm_and_mark_the_missing() -> None:
    report = _report(summarise_arm([_run("none", 0.9, cold=None)]), summarise_arm([_run("full_id", 0.8)]))
    assert markdown_table(report).splitlines()[2].startswith("| none | 0.9000 | - | - |")
    console = Console(width=200)
    with console.capture() as capture:
        console.print(terminal_table(report))
    assert "full_id" in capture.get() and "0.8000" in capture.get()
