"""What goes wrong around a command, done to every command.

`python -m tests.apps.command_faults [--command train] [--fault killed]` prints the table of docs/trust.md:
each fault must end in one named error, or in the right result; then the same command must go through,
with the answer of a run that nobody disturbed. A full and a read-only disk are mounted, for which it must
be root on Linux. tests/apps/test_command_faults.py runs a sample; tests/apps/fault_matrix.py does more to a
training of several processes.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from apps.__main__ import main as torchrec_sid
from torchrec_sid.artifact import folder_lock
from torchrec_sid.artifact.sealed import KEY_VARIABLE
from torchrec_sid.catalog import SidCatalog
from torchrec_sid.data.prepared import PreparedLog
from torchrec_sid.data.synthetic import SyntheticConfig, write_synthetic
from torchrec_sid.serving.ranker import Ranker

LIMIT_SECONDS = 300
_FORK = multiprocessing.get_context("fork")
LOG = SyntheticConfig(items=200, users=60, events=2000, topics=6, subtopics=2, dim=8)
_MODEL = ["--model.dim", "8", "--model.heads", "2", "--model.history_length", "4"]


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    """Negative: by a signal."""
    text: str
    """What it printed, errors included."""
    seconds: float

    @property
    def said(self) -> str:
        """The error that it ended with; empty for none, or for what is no named error."""
        lines = [line for line in self.text.splitlines() if line.strip()]
        named = ("SidError: ", "ArtifactError: ", "torchrec-sid ")
        if "Traceback (most recent call last)" in self.text or not lines:
            return ""
        return lines[-1] if lines[-1].startswith(named) else ""


class Command(NamedTuple):
    """A command, and what is right about what it writes."""

    words: Callable[[Path], list[str]]
    """Its words, given the home folder."""
    output: str
    """Folder below home that it writes in."""
    answer: Callable[[Path], Any]
    """What it wrote, to be compared; given that folder."""
    changed: str | None = None
    """File below home that it reads, whose rows are cut for the fault "changed input"."""
    lock: str | None = None
    """Below ``output``: what it holds a lock of; "" for ``output`` itself."""


def _slices(file: str) -> Callable[[Path], Any]:
    return lambda folder: json.loads((folder / file).read_text())["slices"]["all"]["ne"]


def _reported(folder: Path) -> Any:
    rows = json.loads((folder / "report.json").read_text())["rows"]
    return [row["ne"] for row in rows]


def _scores(folder: Path) -> Any:
    return pq.read_table(sorted(folder.glob("part-*.parquet"))).column("scores").to_pylist()


COMMANDS = {
    "prepare_log": Command(
        lambda home: ["--data", f"{home}/log", "--output", f"{home}/new/prepared"],
        "new",
        lambda new: PreparedLog.open(new / "prepared", verify=True).fingerprint,
        "log/events.parquet",
        "prepared",
    ),
    "embed": Command(
        lambda home: ["--data", f"{home}/log", "--output", f"{home}/new", "--dim", "4", "--overwrite"],
        "new",
        lambda new: np.load(new / "item_emb.npy").tolist(),
        "log/items.parquet",
    ),
    "quantize": Command(
        lambda home: (
            ["--data", f"{home}/log", "--output", f"{home}/new/sids", "--report", "false"]
            + ["--residual_kmeans.cardinalities", "4", "4"]
        ),
        "new",
        lambda new: SidCatalog.open(new / "sids" / "catalog").fingerprint,
        "log/events.parquet",
        "sids",
    ),
    "train": Command(
        lambda home: (
            ["--data", f"{home}/log", "--output", f"{home}/new/run", "--max_steps", "6"]
            + ["--checkpoint_every", "2", "--batch_size", "64", "--model.arm", "full_id", *_MODEL]
        ),
        "new",
        _slices("run/metrics.json"),
        "log/events.parquet",
        "run/checkpoints",
    ),
    "evaluate": Command(
        lambda home: ["--run", f"{home}/run", "--split", "valid"],
        "run",
        _slices("metrics-valid.json"),
        "log/events.parquet",
        "checkpoints",
    ),
    "compare": Command(
        lambda home: (
            ["--data", f"{home}/log", "--output", f"{home}/new", "--arms", "none", "--processes", "1"]
            + ["--specification", "none", "--batch_size", "64", *_MODEL]
        ),
        "new",
        _reported,
        "log/events.parquet",
        "runs/none-seed0/checkpoints",
    ),
    "paper": Command(
        lambda home: (
            [
                "--data",
                f"{home}/log",
                "--output",
                f"{home}/new",
                "--table",
                "3-history",
                "--rows",
                "none 16",
            ]
            + ["--seeds", "1", "--jobs", "1", "--max_steps", "2", "--specification", "none"]
        ),
        "new",
        _reported,
        "log/events.parquet",
    ),
    "plan": Command(
        lambda home: (
            ["--output", f"{home}/new", "--world_size", "2", "--device", "cpu", "--items", "1000"]
            + ["--compare_items", "[]", "--prepared", f"{home}/run/prepared", "--model.table_rows", "100"]
        ),
        "new",
        lambda new: json.loads((new / "plan.json").read_text()),
    ),
    "export": Command(
        lambda home: (
            ["--run", f"{home}/run", "--output", f"{home}/new", "--precisions", "float"]
            + ["--rows", "64", "--batches", "1", "--rounds", "1"]
        ),
        "new",
        lambda new: Ranker.load_checked(new / "float").item_ids.tolist(),
        "run/prepared/items/train_events.npy",
        "float",
    ),
    "predict": Command(
        lambda home: (
            ["--folder", f"{home}/served/float", "--requests", f"{home}/requests.parquet"]
            + ["--output", f"{home}/new"]
        ),
        "new",
        _scores,
        "requests.parquet",
    ),
    "serve": Command(
        lambda home: ["--folder", f"{home}/served/float", "--http_port", "0"], "new", lambda new: None
    ),
}
"""Every command that reads or writes what others made."""


def make_home(home: Path) -> None:
    """A log, a trained run, an exported model and requests, for commands to work on."""
    write_synthetic(home / "log", LOG)
    train = COMMANDS["train"].words(home)
    export = COMMANDS["export"].words(home)
    for name, words, made, place in (
        ("train", train, "run", home / "run"),
        ("export", export, "", home / "served"),
    ):
        words = [word.replace(f"{home}/new/{made}".rstrip("/"), str(place)) for word in words]
        done = run(name, words)
        assert done.code == 0, done.text
    ids = np.load(home / "run" / "prepared" / "items" / "id.npy")
    dense = Ranker.load(home / "served" / "float").dense_names
    rows = {"candidates": [ids[:2].tolist(), ids[3:4].tolist()], "history": [[], ids[:1].tolist()]}
    rows |= {"history_action": [[], [1]], "history_ts": [[], [5]], "ts": [9, 9]}
    rows |= {name: [0.0, 1.0] for name in dense}
    pq.write_table(pa.table(rows), home / "requests.parquet")


def run(name: str, words: list[str], *, kill_after: float | None = None, limit: int | None = None) -> Ended:
    """Run a command in a process of its own, which has loaded what it needs.

    Args:
        name: of the command.
        words: after it.
        kill_after: kill it after so many seconds.
        limit: largest size of a file that it may write, as a quota sets one.
    """
    process, pipe = _start(name, words, limit)
    began = time.monotonic()
    reader, told = os.fdopen(pipe, "rb"), b""
    if kill_after is not None:
        process.join(kill_after)
        if process.is_alive():
            os.killpg(process.pid, signal.SIGKILL)
    deadline = began + LIMIT_SECONDS
    os.set_blocking(reader.fileno(), False)
    while process.is_alive() and time.monotonic() < deadline:
        process.join(0.02)
        told += reader.read() or b""
    if process.is_alive():
        os.killpg(process.pid, signal.SIGKILL)
    process.join()
    told += reader.read() or b""
    reader.close()
    return Ended(process.exitcode or 0, told.decode(errors="replace"), time.monotonic() - began)


def _start(name: str, words: list[str], limit: int | None = None) -> tuple[Any, int]:
    reading, writing = os.pipe()
    process = _FORK.Process(target=_child, args=(name, words, writing, limit))
    process.start()
    os.close(writing)
    return process, reading


def _child(name: str, words: list[str], writing: int, limit: int | None) -> None:
    os.setpgid(0, 0)
    os.dup2(writing, 1)
    os.dup2(writing, 2)
    os.close(writing)
    # What a test runner has put in their place may lead elsewhere.
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", closefd=False)
    os.environ.pop("MASTER_PORT", None)
    os.environ.pop(KEY_VARIABLE, None)
    torch.set_num_threads(1)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    code = 0
    try:
        torchrec_sid([name, *words])
    except SystemExit as end:
        if isinstance(end.code, str):
            sys.stderr.write(f"{end.code}\n")
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


# What goes wrong. Each is called with the command's name and its home, and returns how the command ended;
# afterwards everything is as if the fault had never been.


def _full_disk(name: str, home: Path) -> Ended:
    with _mounted(home / COMMANDS[name].output, read_only=False):
        return run(name, COMMANDS[name].words(home))


def _read_only(name: str, home: Path) -> Ended:
    with _mounted(home / COMMANDS[name].output, read_only=True):
        return run(name, COMMANDS[name].words(home))


@contextlib.contextmanager
def _mounted(folder: Path, *, read_only: bool) -> Iterator[None]:
    """A disk of its own in the place of a folder, with what was in it, that takes nothing more."""
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as aside:
        shutil.copytree(folder, Path(aside) / "copy")
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(folder)], check=True)
        try:
            shutil.copytree(Path(aside) / "copy", folder, dirs_exist_ok=True)
            if read_only:
                subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
            else:
                with (folder / ".filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
                    while file.write(b"0" * 4096):
                        pass
            yield
        finally:
            subprocess.run(["umount", str(folder)], check=True)


def _quota(name: str, home: Path) -> Ended:
    return run(name, COMMANDS[name].words(home), limit=256)


def _killed(name: str, home: Path) -> Ended:
    """At three moments, one after another, on the same output."""
    whole = run(name, COMMANDS[name].words(home)).seconds
    _forget(name, home)
    for share in (0.3, 0.6, 0.9):
        ended = run(name, COMMANDS[name].words(home), kill_after=share * whole)
    return ended


def _two_at_once(name: str, home: Path) -> Ended:
    """The one of two that did not end well, if one did not."""
    (other, reading), mine = _start(name, COMMANDS[name].words(home)), run(name, COMMANDS[name].words(home))
    other.join(LIMIT_SECONDS)
    with os.fdopen(reading, "rb") as reader:
        theirs = Ended(other.exitcode or 0, reader.read().decode(errors="replace"), 0)
    assert 0 in (mine.code, theirs.code), f"neither: {mine.text[-1000:]} {theirs.text[-1000:]}"
    return theirs if mine.code == 0 else mine


def _changed_input(name: str, home: Path) -> Ended:
    command = COMMANDS[name]
    done = run(name, command.words(home))
    assert done.code == 0, done.text
    assert command.changed is not None
    file, before = home / command.changed, contents(home / command.output)
    good, when = file.read_bytes(), file.stat()
    _cut(file)
    ended = run(name, command.words(home))
    after = contents(home / command.output)
    file.write_bytes(good)
    os.utime(file, ns=(when.st_atime_ns, when.st_mtime_ns))
    assert ended.code == 0 or after == before, "refused, and what was there has changed"
    return ended


def _refused(name: str, home: Path) -> Ended:
    """An option that does not exist, one with a wrong value, then an input that is not there."""
    command = COMMANDS[name]
    run(name, command.words(home))
    before = contents(home)
    words = command.words(home)
    wrongs = [[*words, "--no_such_option", "1"], [*words, words[0]]]
    if words[0] != "--output":  # a folder that is only written may have any name
        wrongs.append([words[0], f"{home}/gone", *words[2:]])
    for wrong in wrongs:
        ended = run(name, wrong)
        assert ended.code != 0, f"{wrong} was taken"
        assert "Traceback" not in ended.text, ended.text
    assert contents(home) == before, "refused, and something was written"
    return ended


def _lost_holder(name: str, home: Path) -> Ended:
    """A process that held the lock of what the command writes was killed."""
    command = COMMANDS[name]
    ready = _FORK.Event()
    place = home / command.output / (command.lock or "")

    def hold() -> None:
        with folder_lock(place):
            ready.set()
            signal.pause()

    holder = _FORK.Process(target=hold)
    holder.start()
    assert ready.wait(30)
    os.kill(holder.pid or 0, signal.SIGKILL)
    holder.join()
    ended = run(name, command.words(home))
    assert ended.code == 0, ended.text
    return ended


FAULTS: dict[str, Callable[[str, Path], Ended]] = {
    "full disk": _full_disk,
    "quota": _quota,
    "read-only": _read_only,
    "killed": _killed,
    "two at once": _two_at_once,
    "changed input": _changed_input,
    "refused": _refused,
    "lost holder": _lost_holder,
}


def applies(name: str, fault: str) -> bool:
    """Whether a fault can happen to a command: one that writes nothing has no full disk."""
    command = COMMANDS[name]
    if name == "serve":
        return fault == "refused"
    if fault == "changed input":
        return command.changed is not None
    return fault != "lost holder" or command.lock is not None


def contents(folder: Path) -> dict[str, bytes]:
    """Of every file but locks and logs."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    kept = (f for f in files if f.suffix not in (".lock", ".log"))
    return {str(file): file.read_bytes() for file in kept}


def try_fault(name: str, fault: str, home: Path, right: Any) -> str:
    """Do a fault to a command; what a table says of it.

    Args:
        name: of the command.
        fault: see :data:`FAULTS`.
        home: of :func:`make_home`; it is as before afterwards.
        right: the answer of a run that nobody disturbed.

    Raises:
        AssertionError: it ended without a named error, broke something, or does not go on.
    """
    command = COMMANDS[name]
    with tempfile.TemporaryDirectory() as aside:
        shutil.copytree(home, Path(aside) / "home", symlinks=True)
        try:
            ended = FAULTS[fault](name, home)
            killed = fault == "killed"
            assert ended.code == 0 or ended.said or killed, f"no named error: {ended.text[-3000:]}"
            if name == "serve":
                return "refused by name"
            again = run(name, command.words(home))
            assert again.code == 0, f"does not go on: {again.text[-3000:]}"
            found = command.answer(home / command.output)
            assert found == right, f"another answer: {found} for {right}"
            left = [p.name for p in home.rglob(".*") if ".work-" in p.name or p.name.startswith(".writing")]
            assert not left, f"left behind: {left}"
        finally:
            shutil.rmtree(home)
            shutil.copytree(Path(aside) / "home", home, symlinks=True)
    if killed:
        return "goes on"
    return "right result" if ended.code == 0 else "named error"


def undisturbed(name: str, home: Path) -> Any:
    """The answer of a command; what it wrote is removed."""
    done = run(name, COMMANDS[name].words(home))
    if name == "serve":
        return None
    assert done.code == 0, done.text
    answer = COMMANDS[name].answer(home / COMMANDS[name].output)
    _forget(name, home)
    return answer


def _forget(name: str, home: Path) -> None:
    if COMMANDS[name].output == "new":
        shutil.rmtree(home / "new")
    (home / "run" / "metrics-valid.json").unlink(missing_ok=True)


def _cut(file: Path) -> None:
    """Fewer rows of a table, other numbers of an array."""
    if file.suffix == ".npy":
        np.save(file, np.load(file)[::-1])
        return
    table = pq.read_table(file)
    pq.write_table(table.slice(0, len(table) - len(table) // 20 - 1), file)


def main() -> None:
    """Print the table; ends with 1 if something is not handled."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--command", nargs="*", default=list(COMMANDS), choices=list(COMMANDS))
    parser.add_argument("--fault", nargs="*", default=list(FAULTS), choices=list(FAULTS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    wrong = []
    sys.stdout.write(f"| command | {' | '.join(options.fault)} |\n|---|{'---|' * len(options.fault)}\n")
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        make_home(home)
        for name in options.command:
            right = undisturbed(name, home)
            cells = []
            for fault in options.fault:
                cell = ""
                if applies(name, fault):
                    try:
                        cell = try_fault(name, fault, home, right)
                    except AssertionError as error:
                        cell = "WRONG"
                        wrong.append(f"{name}, {fault}: {error}")
                cells.append(cell)
            sys.stdout.write(f"| `{name}` | {' | '.join(cells)} |\n")
            sys.stdout.flush()
    sys.stdout.writelines(f"{line}\n" for line in wrong)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
