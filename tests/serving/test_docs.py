"""The two ways to load a program that docs/serving.md shows."""

import re
from pathlib import Path

import torch

from tests.serving.models import HISTORY, make_request
from torchrec_sid.serving.exporter import ExportOptions, export_model

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "serving.md").read_text()


class Small(torch.nn.Module):
    def forward(self, dense, features, item_bytes):
        return dense.sum(1) + features["history"].lengths()


def test_both_ways_give_the_same(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    request = make_request()
    report = export_model(Small(), request, "served/int8", ExportOptions("int8"), max_lengths=HISTORY)
    with_package, without = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    features = {name: tuple(bags) for name, bags in request.features.items()}
    names = {"dense": request.dense, "features": features, "extras": request.extras}
    for block in (with_package, without):
        exec(compile(block, "docs/serving.md", "exec"), names)
        assert torch.equal(names["logits"], report.outputs)
    assert "'history'" in capsys.readouterr().out
