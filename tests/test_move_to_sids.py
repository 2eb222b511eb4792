"""The program of docs/move_to_sids.md runs on two processes and prints what the page says."""

import contextlib
import io
import os
import re
from pathlib import Path

import torch

from tests.distributed.launch import run_ranks

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "move_to_sids.md").read_text()


def run_page(folder):
    os.chdir(folder)
    torch.manual_seed(0)
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names = {"__name__": "page"}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for block in blocks:
            exec(compile(block, "docs/move_to_sids.md", "exec"), names)
    return printed.getvalue()


def run_on_rank(folder):
    """Each process in a folder of its own but for the checkpoint, which they write together."""
    own = Path(folder) / os.environ["RANK"]
    own.mkdir()
    (Path(folder) / "checkpoint").mkdir(exist_ok=True)
    (own / "checkpoint").symlink_to(Path(folder) / "checkpoint")
    return run_page(own)


def test_the_page_runs_on_two_processes(tmp_path):
    first, second = run_ranks(run_on_rank, 2, str(tmp_path))
    expected = re.findall(r"^ *print\(.*\)  # (.*)$", PAGE, re.MULTILINE)
    report = re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)[0]
    said = "\n".join(line.rstrip() for line in first.splitlines())
    for line in report.splitlines():
        assert line in said
    rest = [line for line in said.splitlines() if line not in report.splitlines()]
    assert rest == [line.split(":")[0] for line in expected]
    assert second.splitlines() == first.splitlines()[:-1]
