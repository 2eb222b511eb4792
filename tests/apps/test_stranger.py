"""A stranger's folder: inspected and compared without a cast, a specification or another step."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from apps.compare import CompareConfig, compare
from apps.inspect import main as inspect
from apps.prepare_log import main as prepare_log
from tests.data.test_engines import contents
from tests.stranger import write_stranger
from torchrec_sid.data import PreparedLog, Specification
from torchrec_sid.errors import SidError


def test_a_strangers_folder_is_compared_in_one_step(tmp_path: Path) -> None:
    folder = write_stranger(tmp_path / "shop")
    before = sorted(folder.rglob("*"))
    console = Console(record=True, width=120)
    config = CompareConfig(
        str(tmp_path / "out"),
        str(folder),
        arms=("full_id", "full_id+side"),
        processes=1,
        slices=("brand",),
    )
    compare(config, console)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [arm["name"] for arm in report["arms"]] == ["full_id", "full_id+side"]
    for arm in report["arms"]:
        assert arm["ne"] < 1.05
        rows = {name: part["rows"] for name, part in arm["slices"].items() if name.startswith("brand=")}
        assert sum(rows.values()) == arm["slices"]["all"]["rows"] == 600 and rows["brand=naïve"] > 0
    said = console.export_text()
    assert "7 features guessed, 1 columns left out" in said
    assert "no embeddings: 120 items are embedded by title" in said
    # What is theirs stays as it is.
    assert sorted(folder.rglob("*")) == before
    guessed = Specification.read(tmp_path / "out" / "specification.yaml")
    log = PreparedLog.open(tmp_path / "out" / "prepared-features")
    assert log.specification == guessed
    assert log.item_keys.to_pylist()[:2] == ["SKU-00000", "SKU-00001"]
    assert log.user_keys[0].as_py().startswith("user:")


def test_inspect_writes_a_draft_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_stranger(tmp_path / "shop")
    draft = tmp_path / "draft.yaml"
    inspect(["--data", str(folder), "--output", str(draft)])
    said = capsys.readouterr().out
    assert "events: 6,000 rows in 20 files" in said and "a time" in said and "33.3%" in said
    assert Specification.read(draft).columns.item == "sku"
    with pytest.raises(SystemExit, match="exists"):
        inspect(["--data", str(folder), "--output", str(draft)])
    inspect(["--data", str(folder), "--output", str(draft), "--overwrite"])


def test_prepare_log_takes_engine_specification_and_guess(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = write_stranger(tmp_path / "shop"), tmp_path / "out"
    options = ["--data", str(folder), "--prepare.buckets", "2"]
    prepare_log([*options, "--output", str(out), "--guess"])
    assert "test: 600 examples" in capsys.readouterr().out
    assert PreparedLog.open(out).buckets == 2
    own = folder / "specification.yaml"
    own.write_text((tmp_path / "out.specification.yaml").read_text())
    prepare_log([*options, "--output", str(tmp_path / "own")])
    assert PreparedLog.open(tmp_path / "own").fingerprint == PreparedLog.open(out).fingerprint
    prepare_log([*options, "--output", str(tmp_path / "bare"), "--specification", "none"])
    assert PreparedLog.open(tmp_path / "bare").specification is None
    with pytest.raises(SystemExit, match=r"missing.yaml: cannot be read"):
        prepare_log([*options, "--output", str(out), "--specification", str(tmp_path / "missing.yaml")])
    with pytest.raises(SystemExit):
        prepare_log([*options, "--output", str(out), "--prepare.engine", "sparc"])
    assert "spark" in capsys.readouterr().err


def test_events_on_unknown_items_are_named_by_their_own_id(tmp_path: Path) -> None:
    folder = write_stranger(tmp_path / "shop")
    items = pq.read_table(folder / "items.parquet")
    pq.write_table(items.slice(1), folder / "items.parquet")
    with pytest.raises(
        SidError, match=r"item SKU-00000 at row \d+ of day=2026-01-\d\d/part-0.parquet is not in items"
    ):
        compare(CompareConfig(str(tmp_path / "out"), str(folder)), Console())


@pytest.mark.slow
def test_spark_by_the_command_line_gives_the_same_files(tmp_path: Path) -> None:
    pytest.importorskip("pyspark", reason="the extra spark is not installed")
    folder = write_stranger(tmp_path / "shop", events=600)
    logs = []
    for engine in ("duckdb", "spark"):
        out = tmp_path / engine
        options = ["--data", str(folder), "--output", str(out), "--guess", "--prepare.engine", engine]
        prepare_log([*options, "--prepare.buckets", "2"])
        logs.append(PreparedLog.open(out, verify=True))
    assert contents(logs[0]) == contents(logs[1])
    assert logs[0].fingerprint == logs[1].fingerprint
