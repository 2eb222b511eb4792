"""The real command meets a failing rank: it says why, starts again, and ends as if nothing had happened.

`python -m tests.apps.fault_matrix` does more to it.
"""

import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist

from apps.torchrun import check_endpoint
from tests.apps.fault_matrix import FAULTS, launch
from tests.distributed.kill_matrix import last_weights, metrics_of, prepare_case, run
from torchrec_sid.errors import SidError


def test_a_run_restarts_after_a_rank_has_raised(tmp_path: Path) -> None:
    whole = prepare_case(tmp_path)
    assert run(whole) == [0, 0]
    raising = replace(whole, output=str(tmp_path / "raising"))
    with FAULTS["rank that raises"].damage(tmp_path) as arguments:
        done = launch(raising, tmp_path, (*arguments, "--max_restarts", "3"))
    assert done.code == 0, done.text
    assert done.text.count("ValueError: rank 1 raises in step 17") == 1, done.text
    assert "resuming after step 15" in done.text
    assert last_weights(raising) == last_weights(whole)
    assert metrics_of(raising) == metrics_of(whole)
    # What one rank saw goes into its log, the failure too.
    log = (tmp_path / "raising" / "logs" / "rank-1.log").read_text()
    assert "rank 1 raises in step 17" in log


def test_a_port_that_another_program_holds_is_named() -> None:
    with socket.socket() as other:
        other.bind(("localhost", 0))
        port = other.getsockname()[1]
        check_endpoint(f"localhost:{port}")  # nobody listens yet
        other.listen()
        with pytest.raises(SidError, match=f"port {port} of localhost: is in use by another program"):
            check_endpoint(f"localhost:{port}", seconds=0.5)


def test_a_store_of_another_machine_is_welcome() -> None:
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    check_endpoint(f"localhost:{store.port}", seconds=120)
    check_endpoint("localhost:0")
