"""The Python of docs/catalog.md runs."""

import re
from pathlib import Path

import pytest
import torch


def test_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = Path(__file__).parents[2] / "docs" / "catalog.md"
    code = "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, object] = {}
    exec(compile(code, str(page), "exec"), names)
    assert names["unique"].spec.cardinalities == (16, 16, 64)  # type: ignore[attr-defined]
    assert "1000 items in both" in capsys.readouterr().out
