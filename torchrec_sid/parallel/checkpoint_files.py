"""The files of one checkpoint: names, manifest, hashes. Knows nothing of processes.

A checkpoint is a directory ``NNNNNN-step-S`` (N counts the checkpoints of a run, S the training steps)
with the files of torch.distributed.checkpoint, one ``local-R.safetensors`` per rank that has state of its
own, and ``manifest.json``. It gets that name by one rename, after everything in it is on the disk: a
directory of that name is complete. What is being written or deleted has a name that starts with a dot.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torchrec_sid.errors import ArtifactError

MANIFEST = "manifest.json"
LAYOUT_VERSION = 1
_NAME = re.compile(r"^(\d{6,})-step-(\d+)$")
_BLOCK = 1 << 22


class FileRecord(NamedTuple):
    """What the manifest says of one file."""

    size: int
    """Bytes."""
    sha256: str
    """64 hexadecimal digits."""


@dataclass(frozen=True)
class CheckpointInfo:
    """A complete checkpoint, as its manifest describes it."""

    path: Path
    """Its directory."""
    step: int
    """Training steps done when it was made."""
    world_size: int
    """Processes that wrote it."""
    identity: dict[str, str]
    """What the run depends on: name -> fingerprint, e.g. of the catalog."""
    metadata: dict[str, Any]
    """The caller's JSON: data position, metrics, plan, configuration."""
    files: dict[str, FileRecord]
    """Every file but the manifest, by name."""

    @property
    def total_bytes(self) -> int:
        """Bytes of all its files."""
        return sum(record.size for record in self.files.values())


def list_checkpoints(directory: Path) -> list[Path]:
    """Directories of complete checkpoints, oldest first; empty if there is no such directory."""
    if not directory.is_dir():
        return []
    found = [(int(m.group(1)), p) for p in directory.iterdir() if (m := _NAME.match(p.name)) and p.is_dir()]
    return [path for _, path in sorted(found)]


def next_name(directory: Path, step: int) -> str:
    """Name of the next checkpoint: numbered past every one that is there."""
    existing = list_checkpoints(directory)
    number = int(existing[-1].name.split("-")[0]) + 1 if existing else 1
    return f"{number:06d}-step-{step}"


def hash_file(path: Path) -> FileRecord:
    """Size and SHA-256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
        return FileRecord(file.tell(), digest.hexdigest())


def write_manifest(
    directory: Path,
    *,
    step: int,
    world_size: int,
    identity: Mapping[str, str],
    metadata: Mapping[str, Any],
    files: Mapping[str, FileRecord],
) -> None:
    """Write ``manifest.json``, sealed by its own SHA-256, and flush it and the directory to the disk."""
    body = {
        "version": LAYOUT_VERSION,
        "step": step,
        "world_size": world_size,
        "identity": dict(identity),
        "metadata": dict(metadata),
        "files": {name: {"bytes": r.size, "sha256": r.sha256} for name, r in sorted(files.items())},
    }
    # Through JSON once, so that the seal is of what will be read (integer keys become strings).
    body = json.loads(json.dumps(body))
    with (directory / MANIFEST).open("w") as file:
        json.dump({"sha256": _seal(body), **body}, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    sync_directory(directory)


def read_checkpoint(path: Path) -> CheckpointInfo:
    """Read a checkpoint's manifest and check that its files are there with the right sizes.

    Raises:
        ArtifactError: no manifest, an unreadable or altered one, a newer layout, a missing or truncated
            file, each named.
    """
    manifest = path / MANIFEST
    if not manifest.is_file():
        raise ArtifactError(
            str(path), f"no {MANIFEST}", "It is not a checkpoint of this package: check the path."
        )
    try:
        body = json.loads(manifest.read_text())
        seal = body.pop("sha256")
        version = body["version"]
    except (ValueError, KeyError, UnicodeDecodeError, AttributeError) as error:
        raise ArtifactError(str(manifest), f"not a manifest ({error})", _fall_back(path)) from error
    if version > LAYOUT_VERSION:
        raise ArtifactError(
            str(manifest),
            f"has layout version {version}, this release reads up to {LAYOUT_VERSION}",
            "Upgrade torchrec-sid.",
        )
    if seal != _seal(body):
        raise ArtifactError(str(manifest), "was altered after it was written", _fall_back(path))
    files = {name: FileRecord(f["bytes"], f["sha256"]) for name, f in body["files"].items()}
    for name, record in files.items():
        file = path / name
        if not file.is_file():
            raise ArtifactError(str(file), "no such file, the manifest lists it", _fall_back(path))
        if file.stat().st_size != record.size:
            raise ArtifactError(
                str(file),
                f"has {file.stat().st_size} bytes, the manifest says {record.size}",
                _fall_back(path),
            )
    return CheckpointInfo(path, body["step"], body["world_size"], body["identity"], body["metadata"], files)


def verify_files(info: CheckpointInfo, names: Iterable[str]) -> None:
    """Read the named files and compare their SHA-256 with the manifest.

    Raises:
        ArtifactError: naming the first file whose contents changed.
    """
    for name in names:
        if hash_file(info.path / name) != info.files[name]:
            raise ArtifactError(
                str(info.path / name), "its contents do not match the manifest", _fall_back(info.path)
            )


def require_visible(directory: Path, files: Mapping[str, FileRecord], timeout_seconds: float = 30) -> None:
    """Wait until every file is there with its size: a network file system may be late.

    Raises:
        ArtifactError: naming the first that is not, after the time-out.
    """
    deadline = time.monotonic() + timeout_seconds
    for name, record in files.items():
        path = directory / name
        while not (path.is_file() and path.stat().st_size == record.size):
            if time.monotonic() > deadline:
                raise ArtifactError(
                    str(path),
                    "was written by another rank and is not visible on rank 0",
                    "Put the checkpoints on a file system that all machines share.",
                )
            time.sleep(0.1)


def publish(temporary: Path, final: Path) -> None:
    """Give a finished directory its final name, durably."""
    temporary.rename(final)
    sync_directory(final.parent)


def prune(directory: Path, keep: int) -> None:
    """Delete all but the newest ``keep`` checkpoints; a crash in between leaves no half checkpoint."""
    for path in list_checkpoints(directory)[:-keep]:
        doomed = path.with_name(f".deleted-{path.name}")
        path.rename(doomed)
        shutil.rmtree(doomed)


def remove_leftovers(directory: Path) -> None:
    """Delete what a killed run left: checkpoints half written or half deleted."""
    for pattern in (".writing-*", ".deleted-*"):
        for path in directory.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def sync_directory(path: Path) -> None:
    """Flush a directory's entries to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _seal(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _fall_back(path: Path) -> str:
    others = [other for other in list_checkpoints(path.parent) if other != path]
    if not others:
        return "Restore it from a copy, or start the run again in an empty directory."
    return f"Restore it from a copy, or delete {path.name} to resume from {others[-1].name}."
