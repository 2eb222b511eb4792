"""The bench of openings times every artefact, here small ones."""

import pytest

from apps.bench.opening import OpeningConfig, compare
from torchrec_sid.errors import SidError


def test_every_opening_is_timed() -> None:
    rows = compare(OpeningConfig(items=1000, events=2000, rows=10, rounds=1))
    assert [row["opened"].partition(",")[0] for row in rows] == [
        *("catalog", "catalog", "prepared log", "prepared log", "checkpoint", "checkpoint")
    ]
    assert all(row["now"] > 0 and row["before"] is None for row in rows)


def test_a_checkout_that_does_not_run_is_named() -> None:
    with pytest.raises(SidError, match="nowhere/.venv/bin/python: does not run"):
        compare(OpeningConfig(items=10, events=2000, rows=10, rounds=1, before="nowhere"))
