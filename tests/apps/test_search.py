"""A search: the same trainings for every row, none of which can open the test period."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

import apps.search
from apps.recipes import TABLES
from apps.rows import Comparison, Row
from apps.search import AXES, START, SearchConfig, search, with_choices
from apps.train import train
from tests.logs import small_log
from torchrec_sid.errors import SidError
from torchrec_sid.models.build import RankingConfig
from torchrec_sid.parallel.ranks import process_group
from torchrec_sid.training.train_config import TrainConfig

MODEL = RankingConfig("none", dim=8, heads=2, history_length=8)


def test_the_grid_begins_within_itself_and_is_wide_enough() -> None:
    assert [axis for axis, _ in AXES] == list(START)
    for axis, values in AXES:
        assert START[axis] in values and list(values) == sorted(values)
        assert axis == "epochs" or min(values) < START[axis] < max(values)
    # The first value of each axis after the first was read before.
    assert sum(len(values) for _, values in AXES) - (len(AXES) - 1) >= 12


def test_a_run_whose_test_period_is_closed_cannot_open_it(tmp_path: Path) -> None:
    log = small_log(tmp_path)
    shut = replace(log, closed=("test",))
    with pytest.raises(SidError, match="'test' is closed.*Tune on valid"):
        shut.rows("test")
    assert shut.rows("valid") == log.rows("valid")
    config = TrainConfig(
        str(tmp_path / "log"),
        str(tmp_path / "run"),
        prepared=str(tmp_path / "prepared"),
        model=MODEL,
        max_steps=2,
        closed_splits=("test",),
    )
    with process_group() as device, pytest.raises(SidError, match="'test' is closed"):
        train(config, device)
    with process_group() as device:
        report = train(replace(config, output=str(tmp_path / "other"), evaluate_on="valid"), device)
    assert report["evaluated_on"] == "valid"


@pytest.mark.slow
def test_every_row_is_read_equally_often_and_the_best_is_taken(tmp_path: Path, monkeypatch) -> None:
    small_log(tmp_path)
    rows = (Row("a", MODEL), Row("b", replace(MODEL, arm="full_id")))
    monkeypatch.setitem(TABLES, "small", lambda items: Comparison("t", rows))
    axes = (("dense_lr", (1e-3, 2e-3)), ("tables_lr", (0.02,)), ("epochs", (1,)), ("dim", (8, 16)))
    monkeypatch.setattr(apps.search, "AXES", axes)
    monkeypatch.setattr(apps.search, "START", {**START, "dim": 8})
    config = SearchConfig(
        str(tmp_path / "log"), "small", output=str(tmp_path / "out/small"), jobs=2, max_steps=3
    )
    report = search(config, Console(quiet=True))
    assert report == json.loads((tmp_path / "out/small/search.json").read_text())
    assert report["readings_per_row"] == 3
    for found in report["rows"].values():
        readings = found["readings"]
        assert len(readings) == 3 and {each["split"] for each in readings} == {"valid"}
        assert found["ne"] == min(each["ne"] for each in readings)
        assert {"dense_lr", "dim"} <= set(found["at_edge"]) and "epochs" not in found["at_edge"]
    table = with_choices(Comparison("t", rows), tmp_path / "out/small/search.json")
    chosen = report["rows"]["b"]["chosen"]
    assert table.rows[1].model.dim == chosen["dim"]
    assert table.rows[1].training["dense_lr"] == chosen["dense_lr"]
    assert table.rows[1].training["tables"].lr == chosen["tables_lr"]


def test_choices_of_something_else_are_refused(tmp_path: Path) -> None:
    table = Comparison("t", (Row("a", MODEL),))
    file = tmp_path / "search.json"
    for text, says in (("{", "is no search.json"), ('{"rows": {}}', "has no row of this table")):
        file.write_text(text)
        with pytest.raises(SidError, match=says):
            with_choices(table, file)
