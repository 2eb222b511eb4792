"""What the checks of artefacts cost: `python -m apps.bench.opening --before CHECKOUT --json FILE`.

Opens a catalog, a prepared log and a checkpoint, each made and opened by this release and, with `--before`,
by that of a checkout of another one with its environment, in turns, each in a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from torchrec_sid.artifact import write_json
from torchrec_sid.errors import SidError

from ..cli import parse_config, plain_errors

_TIMED = """
import json, os, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from torchrec_sid.catalog import SidCatalog
from torchrec_sid.data.prepare import PrepareConfig, prepare
from torchrec_sid.data.prepared import PreparedLog
from torchrec_sid.data.synthetic import SyntheticConfig, write_synthetic
from torchrec_sid.parallel.checkpoint import CheckpointManager
from torchrec_sid.parallel.checkpoint_files import list_checkpoints, read_checkpoint, verify_files
from torchrec_sid.spec import SidSpec

home, items, events, rows = Path(sys.argv[1]), *map(int, sys.argv[2:5])
spec = SidSpec((256, 256, 256))
if not (home / "catalog").exists():
    ids = torch.arange(items)
    codes = torch.stack([ids * p % 256 for p in (1, 7, 13)], 1)
    SidCatalog.create(home / "catalog", spec, ids, codes, "ab" * 32)
    write_synthetic(home / "log", SyntheticConfig(items=1000, users=max(200, events // 60), events=events))
    prepare(home / "log", home / "prepared", PrepareConfig())
    with CheckpointManager(home / "run") as manager:
        manager.save(1, {"model": {"w": torch.ones(rows, 64)}}, {})

def checkpoint():
    info = read_checkpoint(list_checkpoints(home / "run")[-1])
    verify_files(info, info.files)

opened = {
    "catalog": lambda: SidCatalog.open(home / "catalog", verify=False),
    "catalog, every byte": lambda: SidCatalog.open(home / "catalog"),
    "prepared log": lambda: PreparedLog.open(home / "prepared"),
    "prepared log, used again": lambda: prepare(home / "log", home / "prepared", PrepareConfig()),
    "checkpoint": lambda: read_checkpoint(list_checkpoints(home / "run")[-1]),
    "checkpoint, every byte": checkpoint,
}
found = {}
for name, call in opened.items():
    call()
    began = time.perf_counter()
    call()
    found[name] = 1000 * (time.perf_counter() - began)
print(json.dumps(found))
"""
"""Runs in either release: what it calls has not changed its name."""


@dataclass(frozen=True)
class OpeningConfig:
    """What to open."""

    items: int = 10_000_000
    """Of the catalog."""
    events: int = 1_000_000
    """Of the log."""
    rows: int = 1_000_000
    """Of a table of 64 floats in the checkpoint."""
    rounds: int = 5
    """Processes of each release."""
    before: str | None = None
    """Checkout of another release, with its environment in .venv; default: this release alone."""
    json: str | None = None
    """File for the figures."""

    def __post_init__(self) -> None:
        if min(self.items, self.events, self.rows, self.rounds) < 1:
            raise SidError("OpeningConfig", f"{self}", "Choose 1 or more of each.")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    with plain_errors():
        config = parse_config(OpeningConfig, __doc__, argv)
        rows = compare(config)
    print(f"{'milliseconds, median':<28}{'now':>10}{'before':>10}")
    for row in rows:
        before = "" if row["before"] is None else f"{row['before']:10.2f}"
        print(f"{row['opened']:<28}{row['now']:10.2f}{before}")
    if config.json:
        write_json(Path(config.json), {"rows": rows})


def compare(config: OpeningConfig) -> list[dict[str, Any]]:
    """Milliseconds of each opening, now and before.

    Raises:
        SidError: the other checkout does not run.
    """
    releases = {"now": (sys.executable, Path(__file__).parents[2])}
    if config.before is not None:
        checkout = Path(config.before)
        releases["before"] = (str(checkout / ".venv" / "bin" / "python"), checkout)
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in releases}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(config.rounds):
            for name, (python, checkout) in releases.items():
                taken[name].append(_time(python, checkout, Path(folder) / name, config))
    rows = []
    for opened in taken["now"][0]:
        times = {name: median(turn[opened] for turn in turns) for name, turns in taken.items()}
        rows.append({"opened": opened, "now": times["now"], "before": times.get("before")})
    return rows


def _time(python: str, checkout: Path, home: Path, config: OpeningConfig) -> dict[str, float]:
    home.mkdir(exist_ok=True)
    sizes = [str(config.items), str(config.events), str(config.rows)]
    command = [python, "-c", _TIMED, str(home), *sizes]
    try:
        done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)
    except OSError as error:
        raise SidError(python, f"does not run ({error})", "Give the checkout an environment.") from error
    if done.returncode:
        raise SidError(str(checkout), done.stderr.strip()[-500:], "See that its own tests run.")
    times: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return times


if __name__ == "__main__":
    main()
