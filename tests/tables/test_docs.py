"""The example of docs/sid_tables.md runs and prints what its comments say."""

import re
from pathlib import Path

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "sid_tables.md").read_text()


def test_the_example_runs(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(example, "docs/sid_tables.md", "exec"), {"__name__": "example"})
    said = re.findall(r"# (\[.*|torch\.Size.*)", example)
    assert capsys.readouterr().out.splitlines() == said
    assert len(said) == 2
