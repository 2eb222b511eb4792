"""The bench of moved tables: moved ones are nearest to what was before, cold ones farthest."""

import json
from pathlib import Path

import pytest

from apps.bench import table_moves


def test_moved_tables_stay_near_and_cold_ones_do_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "a.json"
    monkeypatch.setattr(
        "sys.argv",
        ["table_moves", "--events", "60000", "--finetune", "[20]", "--json", str(out)],
    )
    table_moves.main()
    rows = json.loads(out.read_text())["rows"]
    percent = {(row["arm"], row["sids"], row["tables"]): row["percent"] for row in rows}
    assert len(percent) == 19
    assert abs(percent["prefix", "aligned", "moved"]) < 0.3
    for arm in ("prefix", "pieces"):
        moved = percent[arm, "unaligned", "moved"]
        assert moved < percent[arm, "unaligned", "left as they are"]
        assert moved < percent[arm, "aligned", "cold"]
        # Rows move by items: names make no difference to them.
        assert moved == pytest.approx(percent[arm, "aligned", "moved"], abs=0.1)
