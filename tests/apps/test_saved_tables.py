"""Saved tables: pages quote them, and what a page says otherwise is found."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from apps.harness import Trained
from apps.report import COLUMNS
from apps.rows import Comparison, Row
from apps.rundir import library_fingerprint
from apps.saved_tables import SavedTablesConfig, main, quote, save_table
from torchrec_sid.errors import SidError
from torchrec_sid.models.build import RankingConfig

ROOT = Path(__file__).resolve().parents[2]


class _Log:
    fingerprint = "abc"


def _report(*names: str, ne: float = 0.8) -> dict:
    row = dict.fromkeys(column.key for column in COLUMNS) | {"arm": "none", "against": names[0]}
    row |= {"ne": ne, "gain": 1.25, "gain_interval": [0.5, 2.0], "gain_cold_p": None, "intervals": {}}
    return {
        "rows": [{**row, "name": name} for name in names],
        **{
            "seeds": [0, 1],
            "command": "c",
            "git": None,
            "title": "t",
            "dataset": "d",
            "evaluated_on": "test",
        },
    }


def _trained(*names: str, **changes) -> Trained:
    rows = tuple(Row(name, RankingConfig(arm="none", **changes)) for name in names)
    return Trained(Comparison("t", rows), {}, _Log(), {})  # type: ignore[arg-type]


PAGE = """# Page
<!-- table log-2: ne gain_interval rows: + side; base -->
<!-- end -->
SIDE gains 9.99 <!-- log-2 | + side | gain --> percent.
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    save_table(tmp_path / "tables", "log-2", _report("base", "+ side"), _trained("base", "+ side"))
    (tmp_path / "page.md").write_text(PAGE)
    return tmp_path


def _config(home: Path, **changes) -> SavedTablesConfig:
    return replace(SavedTablesConfig((str(home / "page.md"),), str(home / "tables")), **changes)


def test_a_page_takes_its_numbers_from_the_table_and_a_change_is_found(home: Path) -> None:
    assert len(quote(_config(home))) == 1 and (home / "page.md").read_text() == PAGE
    quote(_config(home, write=True))
    text = (home / "page.md").read_text()
    assert (
        "| row | NE | 95% |\n| --- | ---: | ---: |\n| + side | 0.8000 | [+0.50, +2.00] |\n| base |" in text
    )
    assert "SIDE gains +1.25 <!--" in text and quote(_config(home)) == []
    arguments = ["--pages", str(home / "page.md"), "--tables", str(home / "tables")]
    main(arguments)
    for said, other in (("| + side | 0.8000", "| + side | 0.7000"), ("+1.25 <", "+1.26 <")):
        (home / "page.md").write_text(text.replace(said, other))
        assert len(quote(_config(home))) == 1
        with pytest.raises(SystemExit):
            main(arguments)


def test_rows_of_other_calls_stay_and_those_of_the_same_name_are_replaced(home: Path) -> None:
    before = {r["name"]: r for r in json.loads((home / "tables/log-2.json").read_text())["rows"]}
    save_table(home / "tables", "log-2", _report("+ side", "+ mine", ne=0.7), _trained("+ side", "+ mine"))
    after = {r["name"]: r for r in json.loads((home / "tables/log-2.json").read_text())["rows"]}
    assert list(after) == ["base", "+ side", "+ mine"] and after["base"] == before["base"]
    assert (
        after["+ side"]["ne"] == 0.7 and after["+ side"]["fingerprint"] == before["+ side"]["fingerprint"]
    )
    save_table(home / "tables", "log-2", _report("+ side"), _trained("+ side", dim=16))
    again = {r["name"]: r for r in json.loads((home / "tables/log-2.json").read_text())["rows"]}
    assert again["+ side"]["fingerprint"] != after["+ side"]["fingerprint"], "of another recipe"
    assert len(library_fingerprint()) == 64


@pytest.mark.parametrize(
    ("page", "says"),
    [
        ("1 <!-- log-3 | base | ne -->", "log-3.json"),
        ("1 <!-- log-2 | nope | ne -->", "no row 'nope'.*base"),
        ("1 <!-- log-2 | base | nope -->", "no column 'nope'"),
        ("<!-- table log-2: nope -->\n<!-- end -->", "no column 'nope'"),
    ],
)
def test_a_quotation_of_nothing_is_refused(page: str, says: str, home: Path) -> None:
    (home / "page.md").write_text(page)
    with pytest.raises(SidError, match=says):
        quote(_config(home))
    (home / "tables/log-2.json").write_text("[]")
    with pytest.raises(SidError, match="is no saved table"):
        quote(_config(home))


def test_the_pages_of_this_project_have_the_numbers_of_its_tables() -> None:
    pages = (str(ROOT / "docs"), str(ROOT / "README.md"))
    assert quote(SavedTablesConfig(pages, str(ROOT / "docs/tables"))) == []


def test_what_time_did_not_allow_is_left_out_and_said(tmp_path: Path) -> None:
    def trained(done: dict[str, int]) -> Trained:
        runs = {}
        for name, count in done.items():
            runs[name] = [tmp_path / f"{done}" / f"{name}{seed}" for seed in range(3)]
            for run in runs[name][:count]:
                run.mkdir(parents=True)
                (run / "metrics.json").write_text("{}")
        rows = tuple(Row(name, RankingConfig(arm="none")) for name in done)
        return Trained(Comparison("t", rows, none="a"), runs, _Log(), {})  # type: ignore[arg-type]

    console = Console(quiet=True)
    whole = trained({"a": 3, "b": 3})
    assert whole.finished(console) is whole
    with console.capture() as shown:
        console.quiet = False
        some = trained({"a": 3, "b": 2, "c": 0}).finished(console)
    assert "4 trainings are left" in shown.get() and "2 seeds are reported" in shown.get()
    assert {name: len(runs) for name, runs in some.runs.items()} == {"a": 2, "b": 2}
    with pytest.raises(SidError, match="too few to train a"):
        trained({"a": 0, "b": 1}).finished(console)
