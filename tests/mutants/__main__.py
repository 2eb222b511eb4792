"""Try single changes to the code: ``python -m tests.mutants [--room catalog] [--kind C6] [--number 3 4]``.

Each is made in a copy of the tree, where its tests run one after another, with a time limit. Prints how
each ended (noticed, hung or unnoticed) and the score by room; ends with 1 where one went unnoticed.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from tests.mutants import ROOT, Change, read_changes
from torchrec_sid.artifact import write_json

_LIMIT_SECONDS = 300
_COPIED = ("torchrec_sid", "apps", "tests", "docs", "packaging")


def copy_tree(to: Path) -> None:
    """What tests need of the tree, below ``to``."""
    ignored = shutil.ignore_patterns("__pycache__", ".*")
    for name in _COPIED:
        shutil.copytree(ROOT / name, to / name, ignore=ignored)
    for file in ROOT.iterdir():
        if file.is_file() and not file.name.startswith("."):
            shutil.copy(file, to)


def try_change(change: Change, tree: Path, limit_seconds: float = _LIMIT_SECONDS) -> str:
    """Make a change in a copy of the tree, run its tests, and take it back; how they ended.

    Raises:
        RuntimeError: the tests did not run.
    """
    path = tree / change.file
    good = path.read_text()
    assert good.count(change.old) == 1, f"{change.file}: {good.count(change.old)} times {change.old!r}"
    path.write_text(good.replace(change.old, change.new))
    try:
        return _ended(change.tests, tree, limit_seconds)
    finally:
        path.write_text(good)


def require_passing(tests: tuple[str, ...], tree: Path, limit_seconds: float = 2 * _LIMIT_SECONDS) -> None:
    """Run tests on the code as it is: one that fails anyway notices nothing.

    Raises:
        RuntimeError: one fails.
    """
    if _ended(tests, tree, limit_seconds) != "unnoticed":
        raise RuntimeError(f"{' '.join(tests)} do not pass on the code as it is")


def _ended(tests: tuple[str, ...], tree: Path, limit_seconds: float) -> str:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=line", "--show-capture=no"]
    command += ["-m", "not slow", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            command,
            cwd=tree,
            env=environment,
            capture_output=True,
            text=True,
            timeout=limit_seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "hung"
    if done.returncode == 0:
        return "unnoticed"
    if done.returncode in (1, 2) or done.returncode < 0:
        return "noticed"
    raise RuntimeError(f"{tests}: {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def main() -> None:
    """Try those that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--room", nargs="*", help="those of these rooms only")
    parser.add_argument("--kind", nargs="*", help="those of these kinds only")
    parser.add_argument("--number", nargs="*", type=int, help="those with these numbers only")
    parser.add_argument("--json", type=Path, help="write the outcomes there")
    options = parser.parse_args()
    rows, passing = [], set[tuple[str, ...]]()
    with tempfile.TemporaryDirectory() as name:
        copy_tree(Path(name))
        for number, change in enumerate(read_changes()):
            if options.number and number not in options.number:
                continue
            if (options.room and change.room not in options.room) or (
                options.kind and change.kind not in options.kind
            ):
                continue
            if change.tests not in passing:
                require_passing(change.tests, Path(name))
                passing.add(change.tests)
            began = time.monotonic()
            outcome = try_change(change, Path(name))
            seconds = round(time.monotonic() - began)
            rows.append({"number": number, "room": change.room, "kind": change.kind, "outcome": outcome})
            line = (
                f"{number:4} {change.room:<11} {change.kind:<6} {outcome:<10}{seconds:5} s  {change.file}"
            )
            sys.stdout.write(f"{line}\n" if outcome != "unnoticed" else f"{line}\n     {change.new!r}\n")
            sys.stdout.flush()
    rooms: dict[str, list[bool]] = defaultdict(list)
    for row in rows:
        rooms[str(row["room"])].append(row["outcome"] != "unnoticed")
    for room, seen in sorted(rooms.items()):
        sys.stdout.write(f"{room:<12}{sum(seen):4} of {len(seen):3}  {sum(seen) / len(seen):.0%}\n")
    if options.json is not None:
        write_json(options.json, {"rows": rows})
    sys.exit(not all(all(seen) for seen in rooms.values()))


if __name__ == "__main__":
    main()
