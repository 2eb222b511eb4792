"""A checkpoint that somebody else made: it may be refused, it may not run code or read beyond its files."""

import io
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata

from tests.audit import strange, watched
from tests.earlier import ARTEFACTS
from torchrec_sid.artifact import RemotePath, record_file, sealed
from torchrec_sid.errors import ArtifactError, SidError
from torchrec_sid.parallel.checkpoint import CheckpointManager
from torchrec_sid.parallel.checkpoint_files import list_checkpoints, read_checkpoint
from torchrec_sid.parallel.dcp import read_metadata


class Bomb:
    """Unpickling it leaves a file."""

    def __init__(self, path: Path, how: str = "system") -> None:
        self.path, self.how = path, how

    def __reduce__(self):
        if self.how == "open":
            return open, (str(self.path), "w")
        if self.how == "eval":
            return eval, (f"open({str(self.path)!r}, 'w')",)
        return os.system, (f"touch {self.path}",)


def state(value: float = 0.0) -> dict:
    return {
        "model": {"w": torch.full((6, 2), value)},
        "optimizer": {"lr": value, "name": "sgd", "none": None},
    }


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    with CheckpointManager(tmp_path / "checkpoints") as manager:
        manager.save(3, state(0.5), {"epoch": 1})
    # What torch imports at its first load makes classes by exec.
    load_into(tmp_path / "checkpoints", state())
    return list_checkpoints(tmp_path / "checkpoints")[0]


def reseal(checkpoint: Path) -> None:
    """Compute every hash anew, as an attacker can."""
    file = checkpoint / "manifest.json"
    body = json.loads(file.read_text())
    files = {name: record_file(checkpoint, name)._asdict() for name in body["files"]}
    body = sealed.seal(body["kind"], body["version"], body["config"], {"files": files})
    file.write_text(sealed.to_text(body))


def try_to_load(checkpoint: Path) -> dict:
    found = state()
    load_into(checkpoint.parent, found)
    return found


def load_into(directory: Path, found: dict, identity: dict | None = None) -> None:
    with CheckpointManager(directory, identity=identity) as manager:
        manager.load(manager.latest(), found)


def test_plain_values_come_back_without_an_unpickler_of_anything(saved: Path) -> None:
    with watched() as events:
        found = try_to_load(saved)
    assert found["optimizer"] == {"lr": 0.5, "name": "sgd", "none": None}
    assert torch.equal(found["model"]["w"], torch.full((6, 2), 0.5))
    assert strange(events, saved.parent) == []


@pytest.mark.parametrize("how", ["system", "open", "eval"])
@pytest.mark.parametrize("place", ["whole", "storage_meta", "planner_data", "storage_data"])
def test_metadata_that_runs_code_is_refused(saved: Path, how: str, place: str) -> None:
    traces = saved.parent.parent / "traces"
    metadata = pickle.loads((saved / ".metadata").read_bytes())
    if place == "whole":
        metadata = Bomb(traces, how)
    else:
        setattr(metadata, place, Bomb(traces, how))
    (saved / ".metadata").write_bytes(pickle.dumps(metadata))
    reseal(saved)
    with watched() as events, pytest.raises(SidError, match=r"\.metadata: asks for"):
        try_to_load(saved)
    assert not traces.exists() and strange(events, saved.parent) == []


@pytest.mark.parametrize("how", ["system", "open", "eval"])
def test_a_byte_entry_that_runs_code_is_refused(saved: Path, tmp_path: Path, how: str) -> None:
    traces = tmp_path / "traces"
    shutil.rmtree(saved)
    with CheckpointManager(tmp_path / "checkpoints") as manager:
        manager.save(1, {"model": {"w": torch.ones(2)}, "optimizer": {"lr": Bomb(traces, how)}}, {})
    traces.unlink(missing_ok=True)
    found = {"model": {"w": torch.zeros(2)}, "optimizer": {"lr": 0.0}}
    with watched() as events, pytest.raises(SidError, match="[Ww]eights.only"):
        load_into(tmp_path / "checkpoints", found)
    assert not traces.exists() and strange(events, tmp_path / "checkpoints") == []


def change_path(metadata: Metadata) -> None:
    for info in metadata.storage_data.values():
        info.relative_path = "../../outside"


def change_end(metadata: Metadata) -> None:
    for info in metadata.storage_data.values():
        info.length += 1 << 40


def change_transform(metadata: Metadata) -> None:
    for info in metadata.storage_data.values():
        info.transform_descriptors = ["zstd"]


def leave_out(metadata: Metadata) -> None:
    metadata.state_dict_metadata["model.w"].chunks.clear()


def twice(metadata: Metadata) -> None:
    [chunk] = metadata.state_dict_metadata["model.w"].chunks
    chunk.sizes = torch.Size((3, 2))
    metadata.state_dict_metadata["model.w"].chunks.append(chunk)


def outside(metadata: Metadata) -> None:
    metadata.state_dict_metadata["model.w"].chunks[0].offsets = torch.Size((-1, 0))


def other_names(metadata: Metadata) -> None:
    metadata.planner_data = {"model.w": ("model", "w")}


def odd_entry(metadata: Metadata) -> None:
    metadata.state_dict_metadata["model.w"] = torch.Size((6, 2))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (change_path, "which the manifest does not list"),
        (change_end, "reads beyond the end of __0_0.distcp"),
        (change_transform, "asks for the transforms"),
        (leave_out, "do not make up the whole"),
        (twice, "do not make up the whole"),
        (outside, "do not make up the whole"),
        (other_names, "are not those of the state"),
        (odd_entry, "neither a tensor nor bytes"),
    ],
)
def test_metadata_that_contradicts_its_files_is_refused(saved: Path, change, words: str) -> None:
    metadata = pickle.loads((saved / ".metadata").read_bytes())
    change(metadata)
    (saved / ".metadata").write_bytes(pickle.dumps(metadata))
    reseal(saved)
    with pytest.raises(ArtifactError, match=words):
        try_to_load(saved)


@pytest.mark.parametrize("data", [b"", b"x", b"\x80\x04.", b"\x80\x04N.", b"\x80\x04P1\n.", b"(" * 5000])
def test_bytes_that_are_no_metadata_are_refused(saved: Path, data: bytes) -> None:
    (saved / ".metadata").write_bytes(data)
    reseal(saved)
    with pytest.raises(ArtifactError, match=r"\.metadata"):
        read_metadata(read_checkpoint(saved).folder)


def test_every_kind_of_entry_is_known(saved: Path) -> None:
    kinds = {
        type(entry) for entry in read_metadata(read_checkpoint(saved).folder).state_dict_metadata.values()
    }
    assert kinds == {TensorStorageMetadata, BytesStorageMetadata}
    assert isinstance(pickle.loads(pickle.dumps(_StorageInfo("x", 0, 1))), _StorageInfo)


def test_every_byte_of_a_manifest_is_sealed(saved: Path) -> None:
    file = saved / "manifest.json"
    good = file.read_bytes()
    for place in range(len(good)):
        bad = bytearray(good)
        bad[place] ^= 1
        file.write_bytes(bad)
        with pytest.raises(ArtifactError):
            read_checkpoint(saved)


def test_every_byte_of_a_file_is_sealed(saved: Path) -> None:
    for name in (".metadata", "__0_0.distcp"):
        good = (saved / name).read_bytes()
        for place in range(0, len(good), 97):
            bad = bytearray(good)
            bad[place] ^= 1
            (saved / name).write_bytes(bad)
            with pytest.raises(ArtifactError, match="do not match the manifest"):
                try_to_load(saved)
        (saved / name).write_bytes(good)
    try_to_load(saved)


def test_a_file_of_another_checkpoint_is_refused(saved: Path, tmp_path: Path) -> None:
    with CheckpointManager(tmp_path / "other") as manager:
        manager.save(3, state(0.25), {"epoch": 1})
    shutil.copy(list_checkpoints(tmp_path / "other")[0] / "__0_0.distcp", saved / "__0_0.distcp")
    with pytest.raises(ArtifactError, match="do not match the manifest"):
        try_to_load(saved)


def test_a_checkpoint_of_an_earlier_release_loads(tmp_path: Path) -> None:
    shutil.copytree(ARTEFACTS / "checkpoints", tmp_path / "c")
    with CheckpointManager(
        tmp_path / "c", identity={"catalog": "ab" * 32, "specification": "x"}
    ) as manager:
        info = manager.latest()
        found = {"model": {"w": torch.zeros(6)}, "optimizer": {"lr": 0.0, "name": ""}}
        assert manager.load(info, found) == {"epoch": 1, "best": float("inf")}
        assert torch.equal(found["model"]["w"], torch.arange(6.0)) and found["optimizer"]["name"] == "sgd"
        assert torch.equal(manager.load_local(info)[0]["x"], torch.ones(2))
    with pytest.raises(SidError, match="was trained with catalog abab"):
        load_into(tmp_path / "c", found, {"catalog": "cd" * 32})
    file = info.path / "manifest.json"
    file.write_text(file.read_text().replace('"step": 3', '"step": 4'))
    with pytest.raises(ArtifactError, match="was altered"):
        read_checkpoint(info.path)


def test_what_a_checkpoint_depends_on_is_compared_both_ways(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, identity={"log": "a", "pieces": "b"}) as manager:
        manager.save(1, state(), {})
    for identity, words in (({"log": "a"}, "pieces b, this run has no pieces"), ({}, "log a")):
        with pytest.raises(SidError, match=words):
            load_into(tmp_path, state(), identity)
    load_into(tmp_path, state())


def test_one_run_writes_at_a_time(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path / "c") as first:
        first.claim()
        with CheckpointManager(tmp_path / "c") as second:
            assert second.latest() is None, "reading needs no lock"
            with pytest.raises(SidError, match=f"is in use by process {os.getpid()} of .* on "):
                second.save(1, state(), {})
        first.save(1, state(), {})
    with CheckpointManager(tmp_path / "c") as third:
        third.save(2, state(), {})


@pytest.mark.parametrize("asynchronous", [False, True])
def test_checkpoints_live_on_object_storage(asynchronous: bool, tmp_path: Path) -> None:
    uri = f"memory://runs/{tmp_path.name}/{asynchronous}"
    with CheckpointManager(uri, keep=2, asynchronous=asynchronous) as manager:
        assert manager.latest() is None
        for step in (1, 2, 3):
            manager.save(step, state(step), {"step": step}, local={"x": torch.ones(step)})
        info = manager.latest()
        found = state()
        assert manager.load(info, found) == {"step": 3} and found["optimizer"]["lr"] == 3
        assert len(manager.load_local(info)[0]["x"]) == 3
    assert [path.name for path in list_checkpoints(RemotePath(uri))] == ["000002-step-2", "000003-step-3"]
    half = RemotePath(uri) / "000004-step-4"
    (half / "__0_0.distcp").write_bytes(b"half of it")
    with CheckpointManager(uri) as manager:
        assert manager.latest().step == 3
        manager.save(4, state(4), {})
        assert manager.latest().step == 4
    shard = list_checkpoints(RemotePath(uri))[-1] / "__0_0.distcp"
    with shard.open_bytes() as file:
        data = bytearray(file.read())
    data[-3] ^= 1
    shard.write_bytes(bytes(data))
    with CheckpointManager(uri) as manager, pytest.raises(ArtifactError, match="do not match the manifest"):
        manager.load(manager.latest(), state())


def test_a_key_signs_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with CheckpointManager(tmp_path / "plain") as manager:
        manager.save(1, state(), {})
    monkeypatch.setenv("TORCHREC_SID_KEY", "0123456789abcdef")
    with CheckpointManager(tmp_path / "plain") as manager, pytest.raises(ArtifactError, match="not signed"):
        manager.latest()
    with CheckpointManager(tmp_path / "c") as manager:
        manager.save(1, state(1), {})
        manager.load(manager.latest(), state())
    monkeypatch.setenv("TORCHREC_SID_KEY", "another 16 bytes")
    with CheckpointManager(tmp_path / "c") as manager, pytest.raises(ArtifactError, match="another key"):
        manager.latest()


def test_io_is_left_as_it_was() -> None:
    assert pickle.load(io.BytesIO(pickle.dumps([1]))) == [1], "only our own unpickler is restricted"
