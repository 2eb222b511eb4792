"""One command: what it lists, finds and runs; and what the wheel holds."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from apps.__main__ import commands, main, overview

ROOT = Path(__file__).resolve().parents[2]
EXPECTED = {
    "compare",
    "doctor",
    "embed",
    "evaluate",
    "export",
    "paper",
    "plan",
    "quantize",
    "served",
    "train",
}


def test_commands_are_found_not_listed() -> None:
    found = dict(commands())
    assert set(found) >= EXPECTED
    assert found["doctor"] == "torchrec_sid.doctor" and found["train"] == "apps.train"
    # What only helps a command is none.
    assert not {"cli", "torchrun", "components", "session"} & set(found)
    for line in overview().splitlines()[2:]:
        name, _, summary = line.strip().partition(" ")
        assert name in found and len(summary.split()) > 2, line


def test_a_module_with_a_main_is_a_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "greet.py").write_text(
        '"""Say hello."""\n\n\ndef main(argv=None):\n    print("hello", *argv)\n'
    )
    monkeypatch.setitem(sys.modules["apps.__main__"]._HOMES, "greetings", tmp_path)
    assert dict(commands())["greet"] == "greetings.greet"
    assert "Say hello." in overview()


@pytest.mark.parametrize(
    ("word", "hint"),
    [("quantise", "Did you mean quantize?"), ("zzz", "There are compare, "), ("cli", "There")],
)
def test_an_unknown_command_is_answered_shortly(
    word: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main([word])
    said = capsys.readouterr().err
    assert end.value.code == 2 and hint in said and len(said.splitlines()) == 1


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--help"], ["help"]):
        main(words)
        assert "compare" in capsys.readouterr().out
    main(["--version"])
    assert capsys.readouterr().out.startswith("torchrec-sid 0")


def test_a_command_runs_with_its_options_and_its_status() -> None:
    command = [sys.executable, "-m", "apps"]
    good = subprocess.run([*command, "doctor", "--no-imports", "--json"], cwd=ROOT, capture_output=True)
    assert good.stdout.startswith(b"{")
    bad = subprocess.run([*command, "served"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert bad.returncode == 2 and "--folders" in bad.stderr


@pytest.mark.slow
def test_the_wheel_holds_the_commands_but_no_package_called_apps(tmp_path: Path) -> None:
    source = tmp_path / "source"
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in files.splitlines():
        if name.startswith(("apps/", "torchrec_sid/", "packaging/", "pyproject", "setup.py", "README")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    build = "from setuptools.build_meta import build_wheel; print(build_wheel('..'))"
    # Without the kernels, whose place in the wheel has tests of its own.
    environment = {**os.environ, "TORCHREC_SID_NO_COMPILE": "1"}
    command = [sys.executable, "-c", build]
    subprocess.run(command, cwd=source, env=environment, capture_output=True, check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        points = next(archive.read(n).decode() for n in names if n.endswith("entry_points.txt"))
    assert "torchrec-sid = torchrec_sid.apps.__main__:main" in points
    assert "_torchrec_sid = torchrec_sid.apps.components" in points
    assert {f"torchrec_sid/apps/{name}.py" for name in ("train", "compare", "components")} <= set(names)
    assert not [name for name in names if name.startswith(("apps/", "tests/"))]
