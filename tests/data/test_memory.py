"""Memory does not grow with the log: peak resident size of a fresh process, at two sizes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import resource, sys
from torchrec_sid.data import (
    BatchConfig, BatchReader, PrepareConfig, SyntheticConfig, prepare, write_synthetic)

path, items, events, steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
log = write_synthetic(path + "/log", SyntheticConfig(
    items=items, users=2_000, events=events, dim=32, sources=("content",), max_history=100_000))
if steps == "all":
    small = PrepareConfig(memory="400MB", buckets=1, block_rows=1024, shuffle_window=1 << 14)
    for batch in BatchReader(prepare(log, path + "/out", small), "train", BatchConfig(1024, 64)):
        pass
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def peak(path: Path, items: int, events: int, steps: str) -> int:
    """Peak resident bytes of a process of its own."""
    path.mkdir()
    command = [sys.executable, "-c", PROGRAM, str(path), str(items), str(events), steps]
    # With one allocator and one arena, what is freed is used again, and runs compare.
    environment = os.environ | {"MALLOC_ARENA_MAX": "1", "ARROW_DEFAULT_MEMORY_POOL": "system"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return int(done.stdout)


@pytest.mark.slow
def test_events_stream_through_every_step(tmp_path: Path) -> None:
    """Written, prepared, read: an event takes over 200 bytes where a step holds all of them.

    Allowed is the history store, 13 bytes each, which is mapped.
    """
    small, large = (peak(tmp_path / f"{n}", 1_000, n, "all") for n in (200_000, 800_000))
    assert (large - small) / 600_000 < 32


@pytest.mark.slow
def test_a_million_items_are_written_in_bounded_memory(tmp_path: Path) -> None:
    """Per item: 12 bytes that stay, some more while they are sorted; the files hold over 80 of each."""
    sizes = (100_000, 1_000_000)
    small, large = (peak(tmp_path / f"{n}", n, 20_000, "write") for n in sizes)
    assert (large - small) / 900_000 < 40
