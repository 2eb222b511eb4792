"""The Python of docs/quality.md runs."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.apps.test_quantize import write_items


def test_the_page_runs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_items(tmp_path / "shop", np.arange(300))
    monkeypatch.chdir(tmp_path)
    page = Path(__file__).parents[2] / "docs" / "quality.md"
    code = "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
    torch.manual_seed(0)
    names: dict[str, object] = {}
    exec(compile(code, str(page), "exec"), names)
    assert capsys.readouterr().out.startswith("healthy - ")
    assert names["report"].prefixes[0].purity["topic"] > 0.9  # type: ignore[attr-defined]
    assert len(names["learned"].report().levels) == 2  # type: ignore[attr-defined]
