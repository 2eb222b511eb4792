"""The list of changes fits the code, and a change is tried as the command does."""

from collections import Counter
from pathlib import Path

import pytest

from tests.mutants import ROOT, Change, read_changes
from tests.mutants.__main__ import copy_tree, try_change

CHANGES = read_changes()


@pytest.mark.parametrize("room", sorted({change.room for change in CHANGES}))
def test_the_changes_of_a_room_can_be_made(room: str) -> None:
    for change in (change for change in CHANGES if change.room == room):
        assert (ROOT / change.file).read_text().count(change.old) == 1, change
        assert change.new != change.old
        for test in change.tests:
            assert (ROOT / test.partition("::")[0]).exists(), test


def test_every_room_and_kind_has_some() -> None:
    rooms = Counter(change.room for change in CHANGES)
    parts = {path.parent.name for path in (ROOT / "torchrec_sid").glob("*/__init__.py")}
    assert parts | {"apps"} <= set(rooms)
    kinds = Counter(change.kind for change in CHANGES)
    assert {f"E{i}" for i in range(1, 8)} | {f"C{i}" for i in range(1, 17)} <= set(kinds)
    assert len(CHANGES) >= 60 and sum(n for kind, n in kinds.items() if kind[0] == "C") >= 20


def test_a_change_is_noticed_or_not(tmp_path: Path) -> None:
    copy_tree(tmp_path)
    seen = Change(
        "spec", "plain", "torchrec_sid/spec.py", "def pack(", "def other(", ("tests/test_spec.py",)
    )
    assert try_change(seen, tmp_path) == "noticed"
    comment = seen._replace(old='"""', new='"""The ', file="torchrec_sid/artifact/typed.py")
    text = (tmp_path / comment.file).read_text()
    first = text.partition("\n")[0]
    unseen = comment._replace(old=first, new=f"{first}  ")
    assert try_change(unseen, tmp_path) == "unnoticed"
    assert (tmp_path / comment.file).read_text() == text
