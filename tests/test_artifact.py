"""Artefacts: whole or not at all, and refused when they are not what they say."""

import errno
import json
import multiprocessing
import os
import signal
import stat
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from torchrec_sid import artifact
from torchrec_sid.errors import ArtifactError, SidError

TENSORS = {"weight": torch.arange(600.0), "flag": torch.tensor(True), "none": torch.zeros(0, 3)}


def save(path: Path, **changes: object) -> str:
    arguments = {"kind": "thing", "version": 1, "config": {"a": 1, "t": (1, 2)}, "tensors": TENSORS}
    return artifact.save_artifact(path, **{**arguments, **changes})  # type: ignore[arg-type]


def load(path: Path, kind: str = "thing", version: int = 1, verify: bool = True) -> artifact.Artifact:
    return artifact.load_artifact(path, kind=kind, version=version, verify=verify)


def test_round_trip(tmp_path: Path) -> None:
    mark = save(tmp_path / "a" / "x.safetensors")
    loaded = load(tmp_path / "a" / "x.safetensors")
    assert loaded.fingerprint == mark and len(mark) == 64
    assert loaded.config == {"a": 1, "t": [1, 2]}
    assert all(
        torch.equal(loaded.tensors[k], v) and loaded.tensors[k].dtype == v.dtype for k, v in TENSORS.items()
    )
    assert [f.name for f in (tmp_path / "a").iterdir()] == ["x.safetensors"], "no temporary file is left"


def test_the_fingerprint_names_kind_version_configuration_and_every_byte(tmp_path: Path) -> None:
    other = dict(TENSORS, weight=TENSORS["weight"] + torch.eye(600)[3] * 1e-3)
    reshaped = dict(TENSORS, weight=TENSORS["weight"].view(2, 300))
    changes: list[dict[str, object]] = [
        {},
        {"kind": "other"},
        {"version": 2},
        {"config": {"a": 2, "t": (1, 2)}},
        {"tensors": other},
        {"tensors": reshaped},
        {"tensors": {"renamed" if k == "flag" else k: v for k, v in TENSORS.items()}},
    ]
    assert len({save(tmp_path / "x", **change) for change in changes}) == len(changes)
    backwards = dict(reversed(list(TENSORS.items())))
    assert save(tmp_path / "x", tensors=backwards, config={"t": [1, 2], "a": 1}) == save(tmp_path / "y")


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_any_altered_byte_is_noticed(
    tmp_path_factory: pytest.TempPathFactory, place: int, mask: int
) -> None:
    path = tmp_path_factory.mktemp("artefact") / "x"
    save(path)
    data = bytearray(path.read_bytes())
    data[place % len(data)] ^= mask
    path.write_bytes(data)
    with pytest.raises(ArtifactError):
        load(path)


def test_every_byte_of_a_header_is_sealed(tmp_path: Path) -> None:
    save(tmp_path / "x", tensors={"a": torch.arange(3), "b": torch.arange(3) + 7, "c": torch.ones(2)})
    good = (tmp_path / "x").read_bytes()
    for place in range(8 + int.from_bytes(good[:8], "little")):
        for mask in (1, 32):
            bad = bytearray(good)
            bad[place] ^= mask
            (tmp_path / "y").write_bytes(bad)
            with pytest.raises(ArtifactError):
                load(tmp_path / "y", verify=False)


@given(st.integers(0, 3000))
def test_any_truncation_is_noticed(tmp_path_factory: pytest.TempPathFactory, length: int) -> None:
    path = tmp_path_factory.mktemp("artefact") / "x"
    save(path)
    data = path.read_bytes()
    path.write_bytes(data[: length % len(data)])
    with pytest.raises(ArtifactError, match="not a complete safetensors file"):
        load(path)


def test_other_kind_newer_version_and_foreign_files_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "x", version=3)
    with pytest.raises(ArtifactError, match="holds a 'thing', not a 'catalog'"):
        load(tmp_path / "x", kind="catalog", version=3)
    with pytest.raises(ArtifactError, match=r"layout version 3.*reads up to 2.*Upgrade"):
        load(tmp_path / "x", version=2)
    assert load(tmp_path / "x", version=4).config["a"] == 1, "older layouts can be read"
    with pytest.raises(ArtifactError, match="no such file"):
        load(tmp_path / "gone")
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign")
    with pytest.raises(ArtifactError, match="without a torchrec_sid manifest"):
        load(tmp_path / "foreign")
    for name, text in {"json": "{}", "list": "[1]", "words": "hello"}.items():
        save_file({"a": torch.zeros(1)}, tmp_path / name, metadata={"torchrec_sid": text})
        with pytest.raises(ArtifactError, match="manifest"):
            load(tmp_path / name)


def test_verify_false_trusts_the_header(tmp_path: Path) -> None:
    save(tmp_path / "x")
    data = bytearray((tmp_path / "x").read_bytes())
    data[-2] ^= 64
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(ArtifactError, match="altered after it was written"):
        load(tmp_path / "x")
    assert not all(
        torch.equal(load(tmp_path / "x", verify=False).tensors[k], v) for k, v in TENSORS.items()
    )


def test_an_interrupted_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = save(tmp_path / "x")

    def full_disk(tensors: object, path: Path, metadata: object) -> None:
        Path(path).write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(artifact.tensor_file, "save_file", full_disk)
    with pytest.raises(SidError, match=r"x: cannot be written \(No space left on device"):
        save(tmp_path / "x", config={"a": 2})
    assert load(tmp_path / "x").fingerprint == old and [f.name for f in tmp_path.iterdir()] == ["x"]


def _write_and_wait(path: Path) -> None:
    def write(temporary: Path) -> None:
        temporary.write_bytes(b"half of it")
        (path.parent / "started").touch()
        time.sleep(60)

    artifact.write_atomically(path, write)


def test_a_killed_save_leaves_the_old_file(tmp_path: Path) -> None:
    old = save(tmp_path / "x")
    process = multiprocessing.get_context("fork").Process(target=_write_and_wait, args=(tmp_path / "x",))
    process.start()
    while not (tmp_path / "started").exists():
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert load(tmp_path / "x").fingerprint == old


def test_files_are_as_readable_as_any(tmp_path: Path) -> None:
    save(tmp_path / "x")
    (tmp_path / "plain").write_text("")
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == stat.S_IMODE(
        (tmp_path / "plain").stat().st_mode
    )


def test_json_is_strict_and_atomic(tmp_path: Path) -> None:
    artifact.write_json(tmp_path / "x.json", {"a": [1, 2]})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [1, 2]}
    with pytest.raises(ValueError, match="JSON"):
        artifact.write_json(tmp_path / "x.json", {"a": float("nan")})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [1, 2]}


def _hold(path: Path, log: Path) -> None:
    with artifact.folder_lock(path), log.open("a") as file:
        file.write("in ")
        file.flush()
        time.sleep(0.05)
        file.write("out ")


def test_a_folder_lock_lets_one_process_in_at_a_time(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    work = [context.Process(target=_hold, args=(tmp_path / "folder", tmp_path / "log")) for _ in range(3)]
    for process in work:
        process.start()
    for process in work:
        process.join()
    assert (tmp_path / "log").read_text().split() == ["in", "out"] * 3


def test_errors_survive_a_process_boundary() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(ArtifactError("file", "found", "Do this.")))
    assert isinstance(error, ArtifactError) and isinstance(error, SidError)
    assert str(error) == "file: found. Do this." and error.remedy == "Do this."
