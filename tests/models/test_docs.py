"""The examples of docs/models.md run, and its table names every channel."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.logs import small_log
from torchrec_sid.errors import SidError
from torchrec_sid.models.build import RankingConfig
from torchrec_sid.models.channels import CHANNELS
from torchrec_sid.plugins import load_plugins
from torchrec_sid.training.run import build_run, open_stores
from torchrec_sid.training.run_record import run_identity
from torchrec_sid.training.train_config import TrainConfig

_PAGE = (Path(__file__).resolve().parents[2] / "docs" / "models.md").read_text()
_EXAMPLES = re.findall(r"```python\n(.*?)```", _PAGE, flags=re.DOTALL)


def test_the_example_runs(capsys) -> None:
    exec(_EXAMPLES[0], {})
    printed = capsys.readouterr().out.splitlines()
    assert "history_bytes" in printed[0] and printed[1] == "13"


def test_every_channel_is_listed() -> None:
    table = "\n".join(line for line in _PAGE.splitlines() if line.startswith("| `"))
    known = {
        name for name in CHANNELS if not CHANNELS[name].store.__module__.startswith("torchrec_sid_plugin")
    }
    assert set(re.findall(r"`(\w+)`", table)) >= known


def test_a_channel_with_storage_of_its_own_comes_from_a_file(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("TORCHREC_SID_PLUGINS", "")
    (tmp_path / "prices.py").write_text(_EXAMPLES[1])
    load_plugins(tmp_path / "prices.py")
    log = small_log(tmp_path)
    prices = np.random.default_rng(0).uniform(1, 100, log.items)
    np.save(tmp_path / "prices.npy", prices)
    config = TrainConfig(
        str(tmp_path / "log"),
        str(tmp_path / "run"),
        artefacts={"prices": str(tmp_path / "prices.npy")},
        model=RankingConfig("full_id+price", dim=8, heads=2, history_length=8),
    )
    stores = open_stores(config, log)
    ranking = build_run(config, log, stores)
    assert ranking.bytes_per_event == 12
    assert ranking.fields[:4] == ("item", "history", "item_price", "history_price")
    assert float(prices.astype(np.float32).sum()) == pytest.approx(
        float(run_identity(config, log, stores)["prices"])
    )
    torch.testing.assert_close(
        ranking.item_values["price"][:, 0].double(), torch.from_numpy(np.log1p(prices)), atol=1e-5, rtol=0
    )
    with pytest.raises(SidError, match="prices: missing, but arm 'full_id.price' reads it"):
        open_stores(TrainConfig(config.data, config.output, model=config.model), log)
