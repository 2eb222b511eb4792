"""The examples of docs/side.md and docs/code_space_attention.md run as printed."""

import re
from pathlib import Path

import pytest


@pytest.mark.parametrize("page", ["side.md", "code_space_attention.md"])
def test_examples_run(page: str) -> None:
    text = (Path(__file__).parents[2] / "docs" / page).read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks
    for block in blocks:
        names: dict[str, object] = {}
        exec(compile(block, page, "exec"), names)
        if "features" in names:
            assert names["features"].shape == (2, len(names["similarity"].names))  # type: ignore[attr-defined]
        elif "requests" in names:
            assert names["requests"].shape == (4, 32)  # type: ignore[attr-defined]
        else:
            assert names["out"].shape == (2, 5, 32)  # type: ignore[attr-defined]
