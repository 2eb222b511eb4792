"""The bench of requests writes the published rows, and every system computes what it should."""

import json
from pathlib import Path

import pytest

from apps.bench import requests

FIELDS = (
    "events candidates heads code_bytes actions age_buckets distinct_events threads system pass ms peak_mb "
    "max_error"
)


def test_rows_have_the_published_fields(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small = [requests.Request(300, 20, 5, 2, 8, False), requests.Request(300, 20, 1, 2, 8, True)]
    monkeypatch.setattr(requests, "requests", lambda config: small)
    monkeypatch.setattr("sys.argv", ["requests", "--quick", "--json", str(tmp_path / "rows.json")])
    requests.main()
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert all(list(row) == FIELDS.split() for row in rows)
    systems = {"code_space", "code_space_rows", "sdpa_dense", "sdpa_narrow", "absorbed_dense"}
    assert {row["system"] for row in rows} == systems
    assert {row["pass"] for row in rows} == {"forward", "forward+backward"}
    assert all(row["max_error"] < 1e-5 and row["ms"] > 0 for row in rows)
    assert {row["distinct_events"] < 300 for row in rows} == {False, True}
