"""The bench of preparation on a small log, with this checkout as the earlier one."""

import json
import subprocess
import sys
from pathlib import Path

from apps.bench.prepare_events import write_wide_log
from torchrec_sid.data import Specification

ROOT = Path(__file__).resolve().parents[2]


def test_rows_say_rate_cpu_memory_and_equal_counts(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "apps.bench.prepare_events", "--events", "3000", "--features"]
    command += ["--old", str(ROOT), "--folder", str(tmp_path), "--json", str(tmp_path / "rows.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    before, now = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert (before["system"], now["system"]) == ("before", "duckdb")
    assert now["equal_counts"] and sum(rows for rows, _ in now["counts"].values()) == 3000
    for row in (before, now):
        assert row["seconds"] > 0 and row["cpu_seconds"] > 0 and row["peak_mb"] > 50
    assert "preparation of 3,000 events" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"], "nothing is left behind"


def test_forty_features_of_their_kinds(tmp_path: Path) -> None:
    file = write_wide_log(tmp_path / "log", 1000, features=True)
    assert file is not None
    features = Specification.read(file).features
    numeric = [f for f in features if type(f).__name__ == "NumericFeature"]
    multi = [f for f in features if getattr(f, "multi", False)]
    assert (len(features), len(numeric), len(multi)) == (40, 15, 5)
    assert write_wide_log(tmp_path / "narrow", 1000, features=False) is None
