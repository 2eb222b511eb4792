"""The library example of the README runs as it stands."""

import re
from pathlib import Path

import pytest
import torch
from torchrec import KeyedJaggedTensor

from torchrec_sid.catalog import SidCatalog
from torchrec_sid.spec import SidSpec

_README = Path(__file__).resolve().parents[1] / "README.md"


def test_the_example_makes_a_model_that_ranks_raw_ids(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", _README.read_text(), flags=re.DOTALL)
    ids = torch.arange(500) * 7 + 1_000_000_000
    codes = torch.randint(0, 16, (500, 3), generator=torch.Generator().manual_seed(0))
    SidCatalog.create(
        tmp_path / "out/synthetic/sids/tables/catalog", SidSpec((16, 16, 16)), ids, codes, "0" * 64
    )
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code, names)
    features = KeyedJaggedTensor.from_lengths_sync(
        keys=["item"], values=ids[[3, 400]], lengths=torch.tensor([1, 1])
    )
    logits = names["model"](torch.randn(2, 8), features)
    assert logits.shape == (2, 1)
    assert sum(p.shape[0] for p in names["bags"].parameters()) == 1000


def test_every_page_it_links_exists() -> None:
    text = _README.read_text()
    missing = [
        link
        for link in re.findall(r"\]\(((?!https?:)[^)#]+)\)", text)
        if not (_README.parent / link).exists()
    ]
    assert not missing
