"""The bench of requests writes the published rows, and every system computes what it should."""

import json
from pathlib import Path

import pytest
import torch

from apps.bench import requests
from apps.bench.kernel_before import KernelBefore
from torchrec_sid.errors import SidError

_ROOT = Path(__file__).resolve().parents[2]
FIELDS = (
    "events candidates heads code_bytes actions age_buckets distinct_events threads system pass ms peak_mb "
    "max_error"
)


def test_rows_have_the_published_fields(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small = [requests.Request(300, 20, 5, 2, 8, False), requests.Request(300, 20, 1, 2, 8, True)]
    monkeypatch.setattr(requests, "requests", lambda config: small)
    # The checkout of this file stands for the one before: its operator is asked in the same way.
    options = ["--quick", "--before", str(_ROOT), "--json", str(tmp_path / "rows.json")]
    monkeypatch.setattr("sys.argv", ["requests", *options])
    requests.main()
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert all(list(row) == FIELDS.split() for row in rows)
    systems = {"code_space", "code_space_rows", "sdpa_dense", "sdpa_narrow", "absorbed_dense"}
    assert {row["system"] for row in rows} == systems
    assert {row["pass"] for row in rows} == {"forward", "forward+backward"}
    assert all(row["max_error"] < 1e-5 and row["ms"] > 0 for row in rows)
    assert {row["distinct_events"] < 300 for row in rows} == {False, True}


def test_a_folder_that_is_no_checkout_is_named(tmp_path: Path) -> None:
    nothing = torch.zeros(1, 1, 1)
    with pytest.raises(SidError, match="holds no torchrec_sid"):
        KernelBefore(str(tmp_path), nothing, nothing[0].to(torch.uint8), nothing, "3x3x3x3x3", 1)
