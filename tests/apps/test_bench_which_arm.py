"""The synthetic log as an instrument: settings that exist, a table and a picture of every arm."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from apps.bench.which_arm import ARMS, SETTINGS, WhichArmConfig, plot, which_arm
from tests.logs import SMALL
from torchrec_sid.data.synthetic import SyntheticConfig
from torchrec_sid.errors import SidError


def test_settings_are_logs_and_arms_have_equal_tools(tmp_path: Path) -> None:
    for changes in SETTINGS.values():
        assert changes == {} or SyntheticConfig(**changes) != SyntheticConfig()
    with pytest.raises(SidError, match="as planted"):
        WhichArmConfig("out", ("nowhere",))
    row = {"ne": 0.9, "ne_cold": None, "gain_cold": None, "gain_cold_interval": None}
    rows = [{**row, "name": arm, "gain": 1.0, "gain_interval": [0.5, 1.5]} for arm in ARMS]
    plot({"as planted": rows, "no new items": rows}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000


@pytest.mark.slow
def test_a_setting_is_trained_and_told(tmp_path: Path) -> None:
    config = WhichArmConfig(str(tmp_path), ("tastes of 10 days",), seeds=1, jobs=1, max_steps=4, log=SMALL)
    found = which_arm(config, Console(quiet=True))
    assert json.loads((tmp_path / "which_arm.json").read_text()) == found
    (rows,) = found.values()
    assert [row["name"] for row in rows] == list(ARMS) and rows[0]["gain"] == 0
    assert all(row["gain_interval"] is not None for row in rows)
