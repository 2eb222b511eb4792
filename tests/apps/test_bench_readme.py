"""The table of benches names every bench, and pages that cite it."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_bench_is_in_the_table_with_the_page_that_cites_it() -> None:
    benches = {
        path.stem for path in (ROOT / "apps/bench").glob("*.py") if "\nif __name__" in path.read_text()
    }
    table = (ROOT / "apps/bench/README.md").read_text()
    rows = re.findall(r"^\| (\w+) \|.*\]\(\.\./\.\./(docs/\w+\.md)\) \| `(.*)` \|$", table, re.MULTILINE)
    assert {name for name, _, _ in rows} == benches
    for name, page, command in rows:
        assert f"apps.bench.{name}" in (ROOT / page).read_text(), page
        assert f"apps.bench.{name}" in command
