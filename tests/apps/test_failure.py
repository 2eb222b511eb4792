"""Of several processes that fail, one says why; the launcher is told as well."""

import json
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from apps.failure import one_message
from tests.distributed.launch import run_ranks
from torchrec_sid.errors import SidError


def _fail(error: Exception) -> object:
    """How the program ends."""
    try:
        with one_message():
            raise error
    except SystemExit as end:
        return end.code


def _fail_in_turn(folder: Path) -> tuple[object, bool]:
    """Rank 1 has the cause; rank 0 then sees it gone."""
    file = folder / f"error-{dist.get_rank()}.json"
    os.environ["TORCHELASTIC_ERROR_FILE"] = str(file)
    if dist.get_rank() == 1:
        code = _fail(SidError("part-7.parquet", "block 3 cannot be read", "Prepare the log again."))
        dist.barrier()
    else:
        dist.barrier()
        code = _fail(RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:2"))
    return code, file.is_file()


def test_the_first_rank_that_fails_speaks_for_all(tmp_path: Path) -> None:
    message = "SidError: part-7.parquet: block 3 cannot be read. Prepare the log again."
    (other, told), (cause, cause_told) = run_ranks(_fail_in_turn, 2, tmp_path)
    assert (other, told) == (1, False)
    assert (cause, cause_told) == (message, True)
    report = json.loads((tmp_path / "error-1.json").read_text())["message"]
    assert report["message"] == report["extraInfo"]["py_callstack"] == message
    assert int(report["extraInfo"]["timestamp"]) > 1_000_000_000


@pytest.mark.parametrize(
    ("error", "starts", "traced"),
    [
        (SidError("a", "b", "C."), "SidError: a: b. C.", False),
        (OSError(28, "No space left on device", "/x"), "OSError: [Errno 28] No space left on", False),
        (ConnectionResetError("Connection reset by peer"), "Another process of this run has ended", False),
        (ValueError("a bug"), "Traceback", True),
    ],
)
def test_what_one_process_says(
    error: Exception, starts: str, traced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    said = _fail(error)
    assert isinstance(said, str)
    assert said.startswith(starts)
    assert ("in _fail" in said) == traced
    assert said.splitlines()[-1].endswith(str(error)) or not traced


def test_nothing_happens_without_a_failure() -> None:
    with one_message():
        assert torch.ones(1).item() == 1
