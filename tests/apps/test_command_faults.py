"""A sample of what goes wrong around commands; `python -m tests.apps.command_faults` does the rest."""

from pathlib import Path

import pytest

from tests.apps.command_faults import COMMANDS, FAULTS, LOG, applies, make_home, try_fault, undisturbed
from torchrec_sid.data.synthetic import write_synthetic

QUICK = [("prepare_log", "quota"), ("quantize", "killed"), ("quantize", "changed input")]
NEEDS_ROOT = ("full disk", "read-only")
ALL = [(name, fault) for name in COMMANDS for fault in FAULTS if applies(name, fault)]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("commands") / "home"
    folder.mkdir()
    make_home(folder)
    return folder


@pytest.mark.parametrize(("name", "fault"), QUICK)
def test_a_fault_is_named_and_the_command_goes_on(tmp_path: Path, name: str, fault: str) -> None:
    home = tmp_path / "home"
    write_synthetic(home / "log", LOG)
    assert try_fault(name, fault, home, undisturbed(name, home)) in (
        "right result",
        "named error",
        "goes on",
    )


@pytest.mark.slow
@pytest.mark.parametrize(("name", "fault"), [case for case in ALL if case[1] not in NEEDS_ROOT])
def test_every_fault_of_every_command(home: Path, name: str, fault: str) -> None:
    try_fault(name, fault, home, undisturbed(name, home))
