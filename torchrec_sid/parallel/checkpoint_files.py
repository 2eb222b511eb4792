"""The files of one checkpoint: names, manifest, hashes. Knows nothing of processes.

A checkpoint is a folder ``NNNNNN-step-S`` (N counts the checkpoints of a run, S the training steps) with
the files of torch.distributed.checkpoint, one ``local-R.safetensors`` per rank that has state of its own,
and ``manifest.json``, written last. On a local disk it gets that name by one rename, after everything in it
is on the disk; what is being written or deleted has a name that starts with a dot. On object storage, which
does not rename, a folder without a manifest is not a checkpoint yet.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torchrec_sid.artifact import (
    Contents,
    FileRecord,
    Place,
    RemotePath,
    SealedFolder,
    has_manifest,
    open_folder,
    seal_folder,
)
from torchrec_sid.artifact.disk import sync_directory
from torchrec_sid.artifact.folder import MANIFEST
from torchrec_sid.artifact.place import member_size, open_member
from torchrec_sid.artifact.sealed import check_kind
from torchrec_sid.errors import ArtifactError

KIND = "checkpoint"
VERSION = 2
_NAME = re.compile(r"(\d{6,18})-step-(\d{1,18})")
_WRITING, _DELETED = ".writing-", ".deleted-"


class _Config(NamedTuple):
    """The configuration in the manifest."""

    step: int
    world_size: int
    identity: dict[str, str]
    metadata: dict[str, Any]


@dataclass(frozen=True)
class CheckpointInfo:
    """A complete checkpoint, as its manifest describes it."""

    path: Place
    """Its directory."""
    step: int
    """Training steps done when it was made."""
    world_size: int
    """Processes that wrote it."""
    identity: dict[str, str]
    """What the run depends on: name -> fingerprint, e.g. of the catalog."""
    metadata: dict[str, Any]
    """The caller's JSON: data position, metrics, plan, configuration."""
    folder: SealedFolder
    """Its files, checked as they are opened."""

    @property
    def files(self) -> dict[str, FileRecord]:
        """Every file but the manifest, by name."""
        return self.folder.files

    @property
    def total_bytes(self) -> int:
        """Bytes of all its files."""
        return self.folder.total_bytes


def list_checkpoints(directory: Place) -> list[Place]:
    """Directories of complete checkpoints, oldest first; empty if there is no such directory."""
    if not directory.is_dir():
        return []
    paths: list[Place] = [*directory.iterdir()]
    found = [(int(m.group(1)), p) for p in paths if (m := _NAME.fullmatch(p.name)) and p.is_dir()]
    whole = [(n, p) for n, p in found if isinstance(p, Path) or has_manifest(p)]
    return [path for _, path in sorted(whole, key=lambda pair: pair[0])]


def next_name(directory: Place, step: int) -> str:
    """Name of the next checkpoint: numbered past every one that is there."""
    existing = list_checkpoints(directory)
    number = int(existing[-1].name.split("-")[0]) + 1 if existing else 1
    return f"{number:06d}-step-{step}"


def begin(directory: Place, step: int) -> Place:
    """An empty folder to write the next checkpoint in."""
    name = next_name(directory, step)
    if isinstance(directory, RemotePath):
        (directory / name).remove_tree()
        return directory / name
    temporary = directory / f"{_WRITING}{name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    return temporary


def write_manifest(
    directory: Place,
    *,
    step: int,
    world_size: int,
    identity: Mapping[str, str],
    metadata: Mapping[str, Any],
    files: Mapping[str, FileRecord],
) -> None:
    """Write ``manifest.json`` and flush it and the directory to the disk."""
    config = _Config(step, world_size, dict(identity), dict(metadata))
    seal_folder(directory, kind=KIND, version=VERSION, config=config._asdict(), files=files)


def read_checkpoint(path: Place) -> CheckpointInfo:
    """Read a checkpoint's manifest and check that its files are there with the right sizes.

    Raises:
        ArtifactError: no manifest, an unreadable or altered one, a newer layout, a missing or truncated
            file, each named.
    """
    try:
        folder = open_folder(
            path,
            kind=KIND,
            version=VERSION,
            earlier=_earlier,
            remedy="It is not a checkpoint of this package: check the path.",
        )
        config: _Config = folder.read_config(_Config)
        if config.step < 0 or config.world_size < 1:
            raise ArtifactError(
                f"{path}/{MANIFEST}", f"step {config.step} of {config.world_size} processes", ""
            )
    except ArtifactError as error:
        if has_manifest(path) and not error.remedy.startswith("Upgrade"):
            raise ArtifactError(error.where, error.found, _fall_back(path)) from error
        raise
    return CheckpointInfo(path, *config, folder)


def _earlier(body: dict[str, Any], where: str) -> Contents:
    """A manifest of layout 1, whose seal stood under another name and bound less."""
    check_kind(where, body.get("kind", KIND), body["version"], wanted=KIND, newest=1, holder="folder")
    seal = body.pop("sha256")
    if seal != _seal_of_layout_1(body):
        raise ArtifactError(where, "was altered after it was written", "")
    files = {name: FileRecord(f["bytes"], f["sha256"]) for name, f in body["files"].items()}
    names = ("step", "world_size", "identity", "metadata")
    return Contents(1, {name: body[name] for name in names}, files)


def _seal_of_layout_1(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def verify_files(info: CheckpointInfo, names: Iterable[str]) -> None:
    """Read the named files and compare their SHA-256 with the manifest.

    Raises:
        ArtifactError: naming the first file whose contents changed.
    """
    try:
        info.folder.verify(names)
    except ArtifactError as error:
        raise ArtifactError(error.where, error.found, _fall_back(info.path)) from error


def require_visible(directory: Place, files: Mapping[str, FileRecord], timeout_seconds: float = 30) -> None:
    """Wait until every file is there with its size: a network file system may be late.

    Raises:
        ArtifactError: naming the first that is not, after the time-out.
    """
    deadline = time.monotonic() + timeout_seconds
    for name, record in files.items():
        while not _has_size(directory, name, record.bytes):
            if time.monotonic() > deadline:
                raise ArtifactError(
                    f"{directory}/{name}",
                    "was written by another rank and is not visible on rank 0",
                    "Put the checkpoints on a file system that all machines share.",
                )
            time.sleep(0.1)


def _has_size(directory: Place, name: str, size: int) -> bool:
    try:
        with open_member(directory, name) as file:
            return member_size(file) == size
    except ArtifactError:
        return False


def publish(temporary: Place) -> None:
    """Give a finished directory its final name, durably."""
    if isinstance(temporary, Path):
        temporary.rename(temporary.with_name(temporary.name.removeprefix(_WRITING)))
        sync_directory(temporary.parent)


def discard(temporary: Place) -> None:
    """Remove a directory that could not be finished."""
    if isinstance(temporary, RemotePath):
        temporary.remove_tree()
    else:
        shutil.rmtree(temporary, ignore_errors=True)


def prune(directory: Place, keep: int) -> None:
    """Delete all but the newest ``keep`` checkpoints; a crash in between leaves no half checkpoint."""
    for path in list_checkpoints(directory)[:-keep]:
        if isinstance(path, RemotePath):
            (path / MANIFEST).unlink()
            path.remove_tree()
            continue
        doomed = path.with_name(f"{_DELETED}{path.name}")
        path.rename(doomed)
        shutil.rmtree(doomed)


def remove_leftovers(directory: Place) -> None:
    """Delete what a killed run left: checkpoints half written or half deleted."""
    paths: list[Place] = [*directory.iterdir()] if directory.is_dir() else []
    for path in paths:
        if isinstance(path, RemotePath):
            if _NAME.fullmatch(path.name) and not has_manifest(path):
                path.remove_tree()
        elif path.name.startswith((_WRITING, _DELETED)) and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)


def _fall_back(path: Place) -> str:
    others = [other for other in list_checkpoints(path.parent) if other != path]
    if not others:
        return "Restore it from a copy, or start the run again in an empty directory."
    return f"Restore it from a copy, or delete {path.name} to resume from {others[-1].name}."
