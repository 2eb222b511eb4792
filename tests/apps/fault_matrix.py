"""Each thing that can go wrong with a run, done to the real command.

`python -m tests.apps.fault_matrix --json FILE` trains for a while under the TorchX component, breaks
something, and starts the same command again: it must end non-zero within a minute, with a message that
names the cause, with every earlier checkpoint whole; and go on to the end once the fault is gone.
tests/apps/test_faults.py runs the cheap ones. A full and a read-only disk are mounted, for which it must be
root on Linux.
"""

import argparse
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from rich.console import Console

from tests.distributed.kill_matrix import prepare_case
from torchrec_sid.artifact import write_json
from torchrec_sid.catalog import SidCatalog
from torchrec_sid.parallel.checkpoint_files import list_checkpoints, read_checkpoint, verify_files
from torchrec_sid.spec import SidSpec
from torchrec_sid.training.train_config import TrainConfig

ROOT = Path(__file__).resolve().parents[2]
BEFORE, AFTER = 12, 24
LIMIT_SECONDS = 60

Damage = Callable[[Path], contextlib.AbstractContextManager[tuple[str, ...]]]


class Fault(NamedTuple):
    """One thing that goes wrong."""

    damage: Damage
    """What is done to the run; yields more arguments of the command. It is undone at the end."""
    message: str
    """What the command must say."""
    damaged: bool = False
    """Whether the newest checkpoint itself is what was damaged."""


class Outcome(NamedTuple):
    """How a command ended."""

    code: int
    seconds: float
    text: str
    """Standard output and error."""


@contextlib.contextmanager
def _full_disk(run: Path) -> Iterator[tuple[str, ...]]:
    used = sum(file.stat().st_size for file in (run / "checkpoints").rglob("*") if file.is_file())
    with _mounted(run / "checkpoints", f"size={used + 100_000}"):
        yield ()


@contextlib.contextmanager
def _read_only(run: Path) -> Iterator[tuple[str, ...]]:
    with _mounted(run / "checkpoints", "size=100m"):
        subprocess.run(["mount", "-o", "remount,ro", str(run / "checkpoints")], check=True)
        yield ()
        subprocess.run(["mount", "-o", "remount,rw", str(run / "checkpoints")], check=True)


@contextlib.contextmanager
def _mounted(folder: Path, options: str) -> Iterator[None]:
    """A file system of its own under a folder, with what was in it."""
    with tempfile.TemporaryDirectory() as aside:
        shutil.copytree(folder, Path(aside) / "copy")
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)
        try:
            shutil.copytree(Path(aside) / "copy", folder, dirs_exist_ok=True)
            yield
            shutil.rmtree(Path(aside) / "copy")
            shutil.copytree(folder, Path(aside) / "copy")
        finally:
            subprocess.run(["umount", str(folder)], check=True)
        shutil.copytree(Path(aside) / "copy", folder, dirs_exist_ok=True)


@contextlib.contextmanager
def _flipped(path: Path) -> Iterator[tuple[str, ...]]:
    good = path.read_bytes()
    bad = bytearray(good)
    for at in range(len(bad) // 4, len(bad) * 3 // 4, 500):
        bad[at] ^= 255
    path.write_bytes(bad)
    yield ()
    path.write_bytes(good)


def _corrupted_shard(run: Path) -> contextlib.AbstractContextManager[tuple[str, ...]]:
    return _flipped(list_checkpoints(run / "checkpoints")[-1] / "__1_0.distcp")


@contextlib.contextmanager
def _missing_rank_file(run: Path) -> Iterator[tuple[str, ...]]:
    shard = list_checkpoints(run / "checkpoints")[-1] / "__1_0.distcp"
    aside = shutil.move(shard, run / "aside")
    yield ()
    shutil.move(aside, shard)


@contextlib.contextmanager
def _another_catalog(run: Path) -> Iterator[tuple[str, ...]]:
    catalog = SidCatalog.open(run.parent / "catalog")
    ids = catalog.item_ids()
    codes = (catalog.codes(ids) + 1) % 8
    SidCatalog.create(run / "other", SidSpec((8, 8, 8)), ids, codes, "1" * 64)
    yield ("--catalog", str(run / "other"))


@contextlib.contextmanager
def _port_in_use(run: Path) -> Iterator[tuple[str, ...]]:
    with socket.socket() as other:
        other.bind(("localhost", 0))
        other.listen()
        port = str(other.getsockname()[1])
        yield ("component", "--nnodes", "2", "--nproc_per_node", "1", "--rdzv_port", port)


def _unreadable_parquet(run: Path) -> contextlib.AbstractContextManager[tuple[str, ...]]:
    return _flipped(run / "prepared" / "train" / "00000" / "part-00000.parquet")


@contextlib.contextmanager
def _raising_rank(run: Path) -> Iterator[tuple[str, ...]]:
    yield ("component", "--module", "tests.apps.failing_train", "--env", f"FAIL=raise:{run / 'done'}")


@contextlib.contextmanager
def _killed_rank(run: Path) -> Iterator[tuple[str, ...]]:
    yield ("component", "--module", "tests.apps.failing_train", "--env", f"FAIL=kill:{run / 'done'}")


FAULTS = {
    "full disk": Fault(_full_disk, "No space left on device"),
    "read-only directory": Fault(_read_only, "Read-only file system"),
    "corrupted shard": Fault(
        _corrupted_shard, "__1_0.distcp: its contents do not match the manifest", True
    ),
    "missing rank file": Fault(_missing_rank_file, "__1_0.distcp: no such file", True),
    "another catalog": Fault(_another_catalog, "was trained with catalog"),
    "port in use": Fault(_port_in_use, "is in use by another program"),
    "unreadable Parquet": Fault(_unreadable_parquet, "part-00000.parquet: block"),
    "rank that raises": Fault(_raising_rank, "ValueError: rank 1 raises in step 17"),
    "killed rank": Fault(_killed_rank, "Signal 9 (SIGKILL)"),
}


def start(folder: Path) -> TrainConfig:
    """A run in ``folder / "run"`` that stopped half-way, and its configuration for the whole way."""
    config = prepare_case(folder)
    config = replace(config, output=str(folder / "run"), max_steps=AFTER)
    done = launch(replace(config, max_steps=BEFORE), folder)
    assert done.code == 0, done.text
    return config


def launch(config: TrainConfig, folder: Path, arguments: tuple[str, ...] = ()) -> Outcome:
    """Run the component on two processes."""
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(_plain(asdict(config)), sort_keys=False))
    own, app = (arguments[1:], ()) if arguments[:1] == ("component",) else ((), arguments)
    command = [sys.executable, "-m", "torchx.cli.main", "run", "-s", "local_cwd"]
    command += ["-cfg", f"log_dir={folder / 'logs'}", "apps/components.py:train", *own]
    command += ["--", "--config", str(file), *app]
    began = time.monotonic()
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False, env=os.environ
    )
    return Outcome(done.returncode, time.monotonic() - began, done.stdout + done.stderr)


def check_fault(name: str, half: TrainConfig, folder: Path) -> dict[str, Any]:
    """Do a fault to a copy of a run, and see it fail as it should and go on afterwards.

    Returns:
        What was seen, for the report.
    """
    fault = FAULTS[name]
    run = Path(shutil.copytree(half.output, folder / name.replace(" ", "_")))
    config = replace(half, output=str(run), prepared=str(run / "prepared"))
    with fault.damage(run) as arguments:
        failed = launch(config, folder, arguments)
        whole = list_checkpoints(run / "checkpoints")
        for path in whole[:-1] if fault.damaged else whole:
            info = read_checkpoint(path)
            verify_files(info, info.files)
    assert failed.code != 0, f"{name}: it succeeded"
    assert fault.message in failed.text, f"{name}: {failed.text[-4000:]}"
    assert whole, f"{name}: the checkpoints are gone"
    again = launch(config, folder)
    assert again.code == 0, f"{name}: {again.text[-4000:]}"
    last = read_checkpoint(list_checkpoints(run / "checkpoints")[-1])
    assert last.step == AFTER
    said = next(line for line in failed.text.splitlines() if fault.message in line)
    return {
        "fault": name,
        "code": failed.code,
        "seconds": round(failed.seconds, 1),
        "said": said.split(" ", 1)[-1].replace(str(folder), "..."),
    }


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def main() -> None:
    """Every fault; ends with 1 if one of them is not handled, or not within a minute."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=list(FAULTS), choices=list(FAULTS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    console, rows = Console(soft_wrap=True), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        half = start(folder)
        for fault in options.only:
            try:
                rows.append(check_fault(fault, half, folder))
            except AssertionError as error:
                rows.append({"fault": fault, "failed": str(error)})
            console.print(rows[-1])
    if options.json is not None:
        write_json(options.json, {"rows": rows})
    sys.exit(any("failed" in row or row["seconds"] > LIMIT_SECONDS for row in rows))


if __name__ == "__main__":
    main()
