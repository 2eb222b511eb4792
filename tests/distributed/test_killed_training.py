"""`kill -9` of one and of all processes, in a step and in a checkpoint; `kill_matrix` runs many more."""

from pathlib import Path

import pytest

from tests.distributed.kill_matrix import STEPS, Case, cases, check_case, prepare_case, run


@pytest.mark.slow
def test_killed_runs_end_with_the_same_weights(tmp_path: Path) -> None:
    whole = prepare_case(tmp_path)
    assert run(whole) == [0, 0]
    seen = [
        check_case(case, whole, tmp_path / f"killed-{number}")
        for number, case in enumerate(
            (
                # whole, rank, step, moment, event, delay, asynchronous
                Case(False, 1, 13, "forward", 3, 0.0, False),
                Case(True, 0, 9, "checkpoint", 6, 0.0, False),
                Case(False, 0, 12, "checkpoint", 9, 0.01, True),
            )
        )
    ]
    assert seen[0]["resumed_from"] == 12
    assert all(0 < row["resumed_from"] < STEPS for row in seen)
    assert seen[1]["half_written"], "it was to die while a checkpoint was being written"


def test_the_matrix_covers_every_kind() -> None:
    drawn = list(cases(20))
    assert len(drawn) == 40 and len({case.step for case in drawn}) > 10
    assert {(c.whole, c.moment, c.asynchronous) for c in drawn} == {
        (whole, moment, background)
        for whole in (False, True)
        for moment in ("forward", "checkpoint")
        for background in (False, True)
    }
    assert list(cases(20)) == drawn
