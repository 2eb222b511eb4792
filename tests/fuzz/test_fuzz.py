"""A sample of every fuzzer, and the cases that were found; ``python -m tests.fuzz TARGET`` does more."""

from pathlib import Path

import pytest

from tests.fuzz.__main__ import try_case
from tests.fuzz.targets import TARGETS

FOUND = {"pieces": (11, 12, 13, 23, 25, 36)}
"""Cases that ended in a traceback once."""


@pytest.mark.parametrize("name", TARGETS)
def test_a_sample_ends_in_named_errors_or_the_right_answer(tmp_path: Path, name: str) -> None:
    target = TARGETS[name](tmp_path)
    for number in (*FOUND.get(name, ()), *range(100, 140)):
        assert (number, try_case(target, number)) == (number, None)
