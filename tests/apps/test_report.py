"""The report of a comparison: what won in a sentence, the page, and what a phone shows of it."""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest
from rich.console import Console

from apps.harness import Trained
from apps.pages import Point, scatter
from apps.report import explain, summarise, terminal_table, verdict, write_report
from apps.rows import Comparison, Row
from tests.logs import small_log
from torchrec_sid.models.build import RankingConfig
from torchrec_sid.models.channels import CHANNELS

_KEYS = {
    "name",
    "ne",
    "ne_cold",
    "ne_std",
    "auc",
    "auc_warm",
    "auc_cold",
    "logloss",
    "bytes_per_event",
    "table_rows",
    "trained_parameters",
    "examples_per_second",
    "peak_rss_mb",
    "slices",
}
"""Of a row, since the first version."""


def _run(ne: float, cold: float | None = 0.95, rss: float = 500.0) -> dict:
    def piece(value: float | None) -> dict:
        return {"rows": 10, "ne": value, "auc": 0.7, "calibration": 1.0, "logloss": 0.5}

    names = ("all", "warm", "cold", "head", "torso", "tail")
    return {
        "bytes_per_event": 8,
        "table_rows": 100,
        "trained_parameters": 1000,
        "lookups_per_item": 1.0,
        "examples_per_second": 1e4,
        "train_seconds": 3.0,
        "peak_rss_mb": rss,
        "slices": {name: piece(cold if name == "cold" else ne) for name in names},
    }


def _report(folder: Path, runs: dict[str, list[dict]], reference: str | None = None) -> dict:
    """Of run directories in which nothing but the metrics lies; an arm is named like its row."""
    paths: dict[str, list[Path]] = {}
    for name, mine in runs.items():
        for seed, run in enumerate(mine):
            path = folder / "runs" / f"{name}-{seed}"
            path.mkdir(parents=True)
            (path / "metrics.json").write_text(json.dumps(run))
            paths.setdefault(name, []).append(path)
    rows = tuple(Row(name, RankingConfig(arm=name, dim=16)) for name in runs)
    log = small_log(folder)
    comparison = Comparison("Ways to <compare>", rows, reference=reference)
    return summarise(Trained(comparison, paths, log, {})) | {
        "dataset": "toy <log>",
        "world_size": 2,
        "seeds": list(range(len(next(iter(runs.values()))))),
        "command": "torchrec-sid compare",
        "git": None,
        "evaluated_on": "test",
    }


def test_a_row_is_the_mean_and_spread_of_its_seeds(tmp_path: Path) -> None:
    runs = {"none": [_run(1.0), _run(1.0)], "full_id": [_run(0.8, rss=400), _run(0.9, rss=600)]}
    report = _report(tmp_path, runs)
    none, row = report["arms"]
    assert set(row) >= _KEYS and report["rows"] == report["arms"]
    assert row["ne"] == pytest.approx(0.85) and row["ne_std"] == pytest.approx(0.0707, abs=1e-3)
    assert row["peak_rss_mb"] == 600
    assert row["gain"] == pytest.approx(15) and row["gain_std"] == pytest.approx(7.07, abs=0.01)
    assert row["against"] == "none" and none["gain"] == 0


def test_one_seed_has_no_spread_and_an_empty_slice_no_metric(tmp_path: Path) -> None:
    (row,) = _report(tmp_path, {"full_id": [_run(0.8, cold=None)]})["rows"]
    assert row["ne_std"] is None and row["ne_cold"] is None and row["gain_cold"] is None


def test_the_sentence_says_what_won_by_how_much_and_against_what(tmp_path: Path) -> None:
    runs = {"none": [_run(0.9, 0.9)], "full_id": [_run(0.8, 0.95)], "side": [_run(0.76, 0.93)]}
    said = _report(tmp_path / "a", runs, "full_id")["verdict"]
    assert "“side” has the lowest NE, 0.7600: 5.00% below “full_id” (0.8000)." in said
    assert "“none” is best: NE 0.9000, +5.26% against “full_id”" in said and "One seed" in said
    twice = {"full_id": [_run(0.8), _run(0.8)], "side": [_run(0.78, 0.9), _run(0.76, 0.9)]}
    said = _report(tmp_path / "b", twice)["verdict"]
    assert "3.75% (±1.77 over 2 seeds) below" in said and "it is best there too" in said
    assert "One seed" not in said
    noise = {"full_id": [_run(0.8), _run(0.8)], "side": [_run(0.82), _run(0.77)]}
    assert "no more than seeds differ" in _report(tmp_path / "c", noise)["verdict"]
    first = {"full_id": [_run(0.8, None)], "none": [_run(0.88, None)]}
    said = _report(tmp_path / "d", first)["verdict"]
    assert "“full_id” has the lowest NE, 0.8000; next is “none”, 10.00% above it (0.8800)." in said
    assert "never saw" not in said
    assert verdict([{"name": "a", "ne": None, "against": "a"}]).startswith("No row has a NE")


def test_every_channel_is_explained() -> None:
    for name in [*CHANNELS, "none"]:
        assert len(explain(name).split()) > 5 and "the channel" not in explain(name)
    assert "; and " in explain("full_id+side")


def _six(folder: Path) -> dict:
    nes = {"none": 0.88, "random_hash": 0.82, "full_id": 0.81, "dense": 0.8, "hashed_prefix": 0.805}
    runs = {name: [_run(ne), _run(ne + 0.002)] for name, ne in nes.items()}
    runs["full_id+hashed_prefix+side"] = [_run(0.79), _run(0.793)]
    return _report(folder, runs, "full_id")


def test_the_report_is_written_whole(tmp_path: Path) -> None:
    report = _six(tmp_path)
    write_report(report, tmp_path)
    assert json.loads((tmp_path / "report.json").read_text()) == report
    page = (tmp_path / "report.html").read_text()
    assert "toy &lt;log&gt;" in page and "toy <log>" not in page and "<compare>" not in page
    assert 'src="http' not in page and "href" not in page, "not self-contained"
    assert report["verdict"] in unescape(page)
    # The best row is marked once in each of its tables, the reference is named, every row is explained.
    assert page.count('class="best"') == 4 and page.count(">best<") == 1 and page.count("reference") >= 1
    for row in report["rows"]:
        assert row["explanation"] in unescape(page)
    text = (tmp_path / "report.md").read_text()
    assert text.splitlines()[0].startswith("| row | NE | ± | gain % |") and len(text.splitlines()) == 8


def test_the_terminal_names_every_row_and_marks_the_missing(tmp_path: Path) -> None:
    report = _report(tmp_path, {"none": [_run(0.9, cold=None)], "full_id": [_run(0.8, cold=None)]})
    console = Console(width=200)
    with console.capture() as capture:
        console.print(terminal_table(report))
    assert "full_id" in capture.get() and "0.8000" in capture.get() and " - " in capture.get()


@pytest.mark.parametrize("bunch", [2, 6, 8])
def test_labels_of_a_chart_do_not_overlap(bunch: int) -> None:
    points = [
        Point(8.0, 0.8 + number * 1e-4, 0.0, f"row number {number}", False) for number in range(bunch)
    ]
    chart = scatter([*points, Point(1536.0, 0.9, 0.01, "far away and long", True)])
    boxes = [(m.label_x, m.label_y - 14, m.label_x + 8 * len(m.label), m.label_y + 4) for m in chart.marks]
    for i, a in enumerate(boxes):
        assert a[0] >= 0 and a[2] <= chart.width and a[1] >= 0 and a[3] <= chart.height
        for b in boxes[:i]:
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
    assert len(chart.x_ticks) >= 2 and len(chart.y_ticks) >= 3


_MEASURE = """<script>
  const wide = [...document.querySelectorAll("main *")].filter(
    e => !e.closest(".scroll, svg, pre") && e.getBoundingClientRect().right > innerWidth + 1);
  document.title = "seen " + innerWidth + " " + document.documentElement.scrollWidth + " ["
    + wide.map(e => e.tagName + "." + e.className).join() + "]";
</script>"""
"""What is wider than the page, unless it is in a box that scrolls by itself."""


def _too_wide(browser: str, folder: Path, page: str) -> tuple[int, str]:
    """How many pixels a page is wider than a phone, and what is."""
    # Chromium's own window is never narrower than 500 px: a frame is.
    (folder / "inner.html").write_text(page.replace("</main>", f"</main>{_MEASURE}"))
    frame = '<iframe src="inner.html" width="390" height="900" '
    frame += 'onload="document.title = this.contentDocument.title"></iframe>'
    (folder / "frame.html").write_text(f"<!doctype html><title>waiting</title>{frame}")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    command += [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=10000", "--dump-dom"]
    url = (folder / "frame.html").as_uri()
    done = subprocess.run([*command, url], capture_output=True, text=True, timeout=120, check=True)
    seen = re.search(r"<title>seen (\d+) (\d+) \[(.*?)\]</title>", done.stdout)
    assert seen is not None and int(seen[1]) == 390, done.stdout[:500]
    return max(0, int(seen[2]) - 390), seen[3]


def test_a_phone_shows_the_page_without_scrolling_sideways(tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium: apt-get install chromium")
    write_report(_six(tmp_path), tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert _too_wide(browser, tmp_path, page) == (0, "")
    broken = page.replace("</main>", '<div class="long" style="width: 500px">x</div></main>')
    assert _too_wide(browser, tmp_path, broken)[1] == "DIV.long", "the test would not notice"
