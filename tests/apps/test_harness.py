"""What comparisons share: rows from a file; run directories resumed, moved aside or refused."""

import json
from pathlib import Path

import pytest

from apps.harness import STAMP, claim_run
from apps.recipes import TABLES
from apps.rows import Comparison, Row
from torchrec_sid.errors import SidError
from torchrec_sid.models.build import RankingConfig
from torchrec_sid.quantizers import ResidualKMeansConfig
from torchrec_sid.training.run_record import seal_run
from torchrec_sid.training.train_config import TrainConfig

MINE = """
from apps.rows import Row
from torchrec_sid import ResidualKMeansConfig
from torchrec_sid.learn import SidRecipe
from torchrec_sid.models.build import RankingConfig

SIDS = {"mine": SidRecipe(ResidualKMeansConfig((8, 8)))}


def rows(items):
    return [Row("+ my prefixes", RankingConfig("full_id+hashed_prefix", table_rows=items // 2), "mine")]
"""


def test_a_file_adds_rows_to_a_table(tmp_path: Path) -> None:
    file = tmp_path / "my_rows.py"
    file.write_text(MINE)
    assert len([line for line in MINE.splitlines() if line.strip()]) <= 10
    table = TABLES["2-bare"](4000).with_file(file, 4000).chosen(("my prefixes",))
    assert [row.name for row in table.rows] == ["full_id", "+ my prefixes"]
    assert table.rows[1].model.table_rows == 2000 and table.against(table.rows[1]) == "full_id"
    assert table.sids["mine"].quantizer == ResidualKMeansConfig((8, 8))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "no such file"),
        ("x = 1", "has no function rows"),
        ("1 / 0", "ZeroDivisionError"),
        ("def rows(items): return 1 / 0", "Mend its rows"),
        (MINE.replace("+ my prefixes", "full_id"), "'full_id'. are names of this table"),
        (MINE.replace('{"mine"', '{"prefix 2 bytes"'), "'prefix 2 bytes'. are names of this table"),
    ],
)
def test_a_file_that_gives_no_rows_is_refused(text: str | None, says: str, tmp_path: Path) -> None:
    file = tmp_path / "my_rows.py"
    if text is not None:
        file.write_text(text)
    with pytest.raises(SidError, match=says):
        TABLES["2-bare"](4000).with_file(file, 4000)


def test_gains_are_measured_against_the_row_that_is_named() -> None:
    model = RankingConfig()
    rows = (Row("a", model), Row("b", model), Row("c", model, against="a"))
    table = Comparison("t", rows, reference="b")
    assert [table.against(row) for row in rows] == ["b", "b", "a"]
    assert [row.name for row in table.chosen(("c",)).rows] == ["a", "c"]
    assert Comparison("t", rows).against(rows[1]) == "a"
    for bad in ((Row("a", model), Row("a", model)), (Row("a", model, against="z"),)):
        with pytest.raises(SidError, match="Name each row once"):
            Comparison("t", bad)
    with pytest.raises(SidError, match="Name each row once"):
        Comparison("t", rows, reference="z")


def test_on_a_log_with_features_the_row_without_items_is_the_base_without_ids() -> None:
    model = RankingConfig(arm="none")
    table = Comparison("t", (Row("none", model), Row("a", model)), none="none")
    assert (table.with_features().none, table.with_features().features) == (None, "none")
    bare = Comparison("t", (Row("none", model, bare=True), Row("a", model)), none="none", features="a")
    assert bare.with_features() == bare
    assert Comparison("t", (Row("a", model),)).with_features().features is None


def _run(folder: Path, **options: object) -> TrainConfig:
    return TrainConfig(data="log", output=str(folder / "run"), **options)  # type: ignore[arg-type]


def test_a_run_is_made_resumed_and_done(tmp_path: Path) -> None:
    run, marks = _run(tmp_path), {"log": "a"}
    assert not claim_run(run, 2, marks)
    kept = tmp_path / "run" / "checkpoints" / "5"
    kept.mkdir(parents=True)
    assert not claim_run(run, 2, marks) and kept.is_dir(), "a begun run is resumed"
    (tmp_path / "run" / "metrics.json").write_text("{}")
    seal_run(tmp_path / "run", run, marks)
    assert not claim_run(run, 2, marks), "metrics of a training that has begun again"
    seal_run(tmp_path / "run", run, marks, finished=True)
    assert claim_run(run, 2, marks)
    (tmp_path / "run" / "metrics.json").write_text("[]")
    assert not claim_run(run, 2, marks), "metrics that nobody measured"


@pytest.mark.parametrize("change", ["seed", "processes", "log"])
def test_another_run_is_moved_aside_and_nothing_is_lost(change: str, tmp_path: Path) -> None:
    claim_run(_run(tmp_path), 2, {"log": "a"})
    (tmp_path / "run" / "metrics.json").write_text('{"old": 1}')
    (tmp_path / "run" / "logs").mkdir()
    (tmp_path / "run" / "logs" / "my notes.txt").write_text("keep")
    options = {"seed": 1} if change == "seed" else {}
    marks = {"log": "b" if change == "log" else "a"}
    for number in (1, 2):
        assert not claim_run(_run(tmp_path, **options), 3 if change == "processes" else 2, marks)
        assert not (tmp_path / "run" / "metrics.json").exists()
        aside = tmp_path / "run.old-1"
        assert json.loads((aside / "metrics.json").read_text()) == {"old": 1}
        assert (aside / "logs" / "my notes.txt").read_text() == "keep"
        assert (tmp_path / "run.old-2").exists() == (number == 2)
        marks = {"log": "c"}


def test_a_folder_with_something_of_a_user_is_refused_and_stays(tmp_path: Path) -> None:
    for name, stamped in (("thesis.tex", True), ("thesis.tex", False), ("metrics.json", False)):
        folder = tmp_path / f"{name}-{stamped}"
        run = _run(folder)
        if stamped:
            claim_run(run, 1, {})
        (folder / "run").mkdir(parents=True, exist_ok=True)
        (folder / "run" / name).write_text("mine")
        with pytest.raises(SidError, match=f"{name}|was not made") as refused:
            claim_run(run, 2, {})
        assert "--output" in refused.value.remedy
        assert (folder / "run" / name).read_text() == "mine"
    target = tmp_path / "elsewhere"
    target.mkdir()
    (tmp_path / "run").symlink_to(target)
    with pytest.raises(SidError, match="not a folder of ours"):
        claim_run(_run(tmp_path), 1, {})
    (tmp_path / "run").unlink()
    (tmp_path / "run").write_text("a file")
    with pytest.raises(SidError, match="not a folder of ours"):
        claim_run(_run(tmp_path), 1, {})


def test_a_damaged_stamp_is_not_trusted(tmp_path: Path) -> None:
    claim_run(_run(tmp_path), 1, {})
    (tmp_path / "run" / STAMP).write_text("{")
    assert not claim_run(_run(tmp_path), 1, {})
    assert (tmp_path / "run.old-1" / STAMP).read_text() == "{"
