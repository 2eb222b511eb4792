"""Plugins: files and installed packages that add to a registry, once, and what is wrong with them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from torchrec_sid import plugins
from torchrec_sid.errors import SidError
from torchrec_sid.plugins import Registry, load_plugins


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(plugins.VARIABLE, "")
    monkeypatch.setattr(plugins, "_loaded", set())


PARTS: Registry[int] = Registry("part")
PLUGIN = "from tests.test_plugins import PARTS\nPARTS.add({name!r}, {value})\n"


def _write(path: Path, name: str, value: int = 1) -> Path:
    path.write_text(PLUGIN.format(name=name, value=value))
    return path


def test_a_file_adds_to_a_registry_once_and_its_path_travels(tmp_path: Path) -> None:
    file = _write(tmp_path / "mine.py", "from a file", 7)
    load_plugins(file)
    assert PARTS["from a file"] == 7 and "from a file" in list(PARTS)
    file.write_text("raise RuntimeError('imported again')")
    load_plugins(file)
    assert os.environ[plugins.VARIABLE] == str(file), "once, as an absolute path"
    # A process that is started afterwards has it without being told.
    _write(file, "in a child")
    program = "from tests.test_plugins import PARTS; print('in a child' in PARTS)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


def test_files_of_one_name_do_not_meet(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        load_plugins(_write(tmp_path / folder / "same.py", f"same {folder}"))
    assert "same a" in PARTS and "same b" in PARTS


def test_an_installed_package_is_found_by_its_entry_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write(tmp_path / "installed_plugin.py", "installed")
    info = tmp_path / "toy-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{plugins.GROUP}]\ntoy = installed_plugin\n")
    assert "installed" not in PARTS
    monkeypatch.syspath_prepend(tmp_path)
    assert "installed" in PARTS


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    with pytest.raises(SidError, match=r"gone\.py: no such file"):
        load_plugins(tmp_path / "gone.py")
    broken = tmp_path / "broken.py"
    broken.write_text("import nothing_of_that_name")
    with pytest.raises(SidError, match=r"broken\.py: ModuleNotFoundError.*nothing_of_that_name"):
        load_plugins(broken)
    broken.write_text("x = 1")
    load_plugins(broken)  # mended: it is tried again
    PARTS.add("prefix", 1)
    with pytest.raises(SidError, match="part 'prefix': is 1 already, not 2"):
        PARTS.add("prefix", 2)
    with pytest.raises(SidError, match="no 'prefxi'. Did you mean 'prefix'?"):
        PARTS["prefxi"]
    with pytest.raises(SidError, match="no 'zzz'. Choose one of .*prefix"):
        PARTS["zzz"]
    assert len(PARTS) >= 1
