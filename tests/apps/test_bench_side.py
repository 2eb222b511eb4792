"""The benchmark runs, its pooled features agree, and its rows have their fields."""

import json
from pathlib import Path

import pytest

from apps.bench import side


def test_quick_run_writes_every_section(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(
        "sys.argv", ["side", "--quick", "--rounds", "1", "--json", str(tmp_path / "a.json")]
    )
    side.main()
    report = json.loads((tmp_path / "a.json").read_text())
    assert {row["system"] for row in report["features"]} == {
        "side_digits",
        "side_one_hot",
        "side_basis",
        "tables_per_digit",
    }
    assert {row["system"] for row in report["similarity"]} == {
        "similarity_cpu",
        "similarity_torch",
        "decode_and_pool",
    }
