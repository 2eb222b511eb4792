"""The main job, as a user runs it, on a small log."""

import html
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from apps.compare import CompareConfig, compare
from tests.logs import SMALL
from torchrec_sid.errors import SidError

_ROOT = Path(__file__).resolve().parents[2]
_OPTIONS = {
    "arms": ["none", "hashed_prefix"],
    "synthetic": {name: getattr(SMALL, name) for name in ("items", "users", "events", "topics", "dim")},
    "quantizer": {"cardinalities": [8, 8, 8]},
    "model": {"dim": 16, "history_length": 20, "table_rows": 100},
}


def _compare(options: dict, folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    file = folder / "options.yaml"
    file.write_text(yaml.safe_dump(options))
    command = [sys.executable, "-m", "apps.compare", "--config", str(file), *arguments]
    return subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, timeout=600)


def test_the_main_job_reports_every_arm_and_does_nothing_twice(tmp_path: Path) -> None:
    output = tmp_path / "out"
    done = _compare(_OPTIONS, tmp_path, "--output", str(output))
    assert done.returncode == 0, done.stderr
    assert "hashed_prefix" in done.stdout
    report = json.loads((output / "report.json").read_text())
    assert report["world_size"] == 2 and report["seeds"] == [0]
    assert [arm["name"] for arm in report["arms"]] == _OPTIONS["arms"]
    for arm in report["arms"]:
        assert 0.5 < arm["ne"] < 1.5 and arm["examples_per_second"] > 0 and arm["peak_rss_mb"] > 100
        assert arm["slices"]["cold"]["rows"] > 0
    assert report["arms"][1]["table_rows"] == 200 and report["arms"][1]["bytes_per_event"] == 2
    page = (output / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 1 and "<svg" in page
    assert report["verdict"] in html.unescape(page) and report["verdict"] in " ".join(done.stdout.split())
    assert [arm["against"] for arm in report["arms"]] == ["none", "none"]

    run = output / "runs" / "hashed_prefix-seed0"
    assert {"config.json", "environment.json", "plan.json", "plan.txt", "metrics.json"} <= {
        path.name for path in run.iterdir()
    }
    assert list((run / "tensorboard").iterdir()) and list((run / "logs").rglob("stderr.log"))

    command = [sys.executable, "-m", "apps.evaluate", "--run", str(run), "--split", "test"]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    alone, together = json.loads(done.stdout), json.loads((run / "metrics.json").read_text())
    assert alone["slices"]["all"]["ne"] == pytest.approx(together["slices"]["all"]["ne"], abs=1e-6)

    written = (run / "metrics.json").stat().st_mtime_ns
    again = _compare(_OPTIONS, tmp_path, "--output", str(output))
    assert again.returncode == 0, again.stderr
    assert (run / "metrics.json").stat().st_mtime_ns == written, "a finished run was repeated"


def test_an_unknown_arm_ends_it_before_any_work(tmp_path: Path) -> None:
    config = CompareConfig(output=str(tmp_path / "out"), arms=("none", "nope"))
    with pytest.raises(SidError, match="unknown name 'nope'.*full_id"):
        compare(config, Console())
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_failing_rank_fails_the_command_with_its_message(tmp_path: Path) -> None:
    options = {**_OPTIONS, "arms": ["none"], "batch_size": 333}
    done = _compare(options, tmp_path, "--output", str(tmp_path / "out"))
    assert done.returncode != 0
    assert "batch_size: 333 over 2 processes" in done.stderr
