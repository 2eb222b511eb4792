"""The Python of the pages about quantizers runs."""

import re
from pathlib import Path

import pytest
import torch

from torchrec_sid.quantizers import QUANTIZERS


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = Path(__file__).parents[2] / "docs" / "quantizers.md"
    code = "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
    monkeypatch.chdir(tmp_path)
    # The page registers a quantizer: only here.
    monkeypatch.setattr(QUANTIZERS, "_parts", dict(QUANTIZERS._parts))
    names: dict[str, object] = {}
    exec(compile(code, str(page), "exec"), names)
    codes, again = names["codes"], names["again"]
    assert isinstance(codes, torch.Tensor) and codes.shape == (5000, 3)
    assert torch.equal(again.encode(names["x"]), codes)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["rq_vae", "dpca", "vq_fusion"])
def test_the_pages_of_single_quantizers_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = Path(__file__).parents[2] / "docs" / f"{name}.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert blocks
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile("\n".join(blocks), str(page), "exec"), names)
    codes = names["codes"]
    assert isinstance(codes, torch.Tensor) and codes.dtype == torch.int64
