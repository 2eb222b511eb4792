"""The example of docs/models.md runs, and its table names every channel."""

import re
from pathlib import Path

from torchrec_sid.models.channels import CHANNELS

_PAGE = (Path(__file__).resolve().parents[2] / "docs" / "models.md").read_text()


def test_the_example_runs(capsys) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", _PAGE, flags=re.DOTALL)
    exec(code, {})
    printed = capsys.readouterr().out.splitlines()
    assert "history_bytes" in printed[0] and printed[1] == "13"


def test_every_channel_is_listed() -> None:
    table = "\n".join(line for line in _PAGE.splitlines() if line.startswith("| `"))
    assert set(re.findall(r"`(\w+)`", table)) >= set(CHANNELS)
