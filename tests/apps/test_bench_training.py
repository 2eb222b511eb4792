"""The bench of training, on a small log: its rows, and that pieces add up."""

import json
import sys
from pathlib import Path

import pytest

from apps.bench import training
from tests.logs import SMALL


def test_pieces_of_the_bench_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "QUICK", training.BenchConfig(steps=2, repeats=1, processes=(2,)))
    monkeypatch.setattr(training, "SyntheticConfig", lambda: SMALL)
    file = tmp_path / "training.json"
    for arm in ("none", "side"):
        monkeypatch.setattr(sys, "argv", ["bench", "--quick", "--arms", arm, "--json", str(file)])
        training.main()
    report = json.loads(file.read_text())
    assert report["loop_cpu_us_per_step"] > 0
    kinds = [(row["arm"], row["processes"], row["pipelined"], row["loop"]) for row in report["rows"]]
    assert kinds == [
        (arm, 2, pipelined, loop)
        for arm in ("none", "side")
        for pipelined in (False, True)
        for loop in ("ours", "bare")
    ]
    assert all(row["examples_per_second"] > 0 and row["peak_rss_mb"] > 100 for row in report["rows"])
