"""Single changes to the code that tests must notice, and the command that tries them.

``changes/ROOM.toml`` holds those of one part of the tree; see :mod:`tests.mutants.__main__`.
"""

import tomllib
from pathlib import Path
from typing import NamedTuple

CHANGES = Path(__file__).parent / "changes"
ROOT = Path(__file__).resolve().parents[2]


class Change(NamedTuple):
    """One change, which makes the code wrong."""

    room: str
    """Part of the tree: the name of the file it is listed in."""
    kind: str
    """Of fault: E1 to E7 of how tests look away, C1 to C16 of what a reader must refuse, or "plain"."""
    file: str
    """Below the root."""
    old: str
    """Text that is there once."""
    new: str
    """What takes its place."""
    tests: tuple[str, ...]
    """What should notice: arguments of pytest."""


def read_changes() -> list[Change]:
    """Every change, room by room."""
    found = []
    for path in sorted(CHANGES.glob("*.toml")):
        for entry in tomllib.loads(path.read_text())["change"]:
            found.append(Change(path.stem, **{**entry, "tests": tuple(entry["tests"])}))
    return found
