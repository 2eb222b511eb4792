"""Artefacts on disk: one safetensors file, written atomically, fingerprinted, checked on load.

The header carries a JSON manifest (kind, version, configuration, fingerprint), so that a file says
by itself what it is. The fingerprint is the SHA-256 of kind, version, configuration and tensor
bytes: two artefacts with the same fingerprint hold the same thing.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from torchrec_sid.errors import ArtifactError

_MANIFEST = "torchrec_sid"
_log = logging.getLogger(__name__)


class Artifact(NamedTuple):
    """What :func:`load_artifact` returns."""

    config: dict[str, Any]
    """The JSON configuration that was saved."""
    tensors: dict[str, Tensor]
    """Tensors by name, on the CPU."""
    fingerprint: str
    """64 hexadecimal digits."""


def fingerprint(kind: str, version: int, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) of everything that defines an artefact, independent of dictionary order."""
    digest = hashlib.sha256(f"{kind}\n{version}\n{json.dumps(config, sort_keys=True)}\n".encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> None:
    """Call ``write`` with a temporary path beside ``path``, flush it to disk, rename it to ``path``.

    A crash at any moment leaves either the old file or the new one, never a part of one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        # mkstemp makes files private; an artefact is as readable as any file of its user.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def folder_lock(path: str | Path) -> Iterator[None]:
    """Hold the exclusive lock of a folder that may not exist yet; other processes wait.

    The lock is the file ``.<name>.lock`` beside the folder; the system frees it when a process dies.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            # Some network file systems have no locks; what is written under one is atomic all the same.
            _log.warning("%s cannot be locked (%s)", path, error)
        yield


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text))


def save_artifact(
    path: str | Path,
    *,
    kind: str,
    version: int,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> str:
    """Write one artefact and return its fingerprint.

    Args:
        path: file to write, by convention ``*.safetensors``; replaced atomically if it exists.
        kind: what the artefact is, e.g. ``"residual_kmeans"``.
        version: version of the kind's layout, an integer that grows.
        config: JSON-serialisable configuration.
        tensors: name -> tensor, any device.
    """
    flat = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    # Through JSON once, so that tuples and the like have the form in which they will be read.
    plain = json.loads(json.dumps(config))
    mark = fingerprint(kind, version, plain, flat)
    manifest = {"kind": kind, "version": version, "config": plain, "fingerprint": mark}
    header = {_MANIFEST: json.dumps(manifest)}
    write_atomically(path, lambda temporary: save_file(flat, temporary, metadata=header))
    return mark


def read_manifest(path: str | Path) -> dict[str, Any]:
    """The manifest of an artefact, without reading its tensors.

    Raises:
        ArtifactError: the file is missing, unreadable, truncated, or not one of ours.
    """
    path = Path(path)
    if not path.is_file():
        raise ArtifactError(str(path), "no such file", "Check the path, or make it again.")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ArtifactError(
            str(path), f"not a complete safetensors file ({error})", "Copy or make it again."
        ) from error
    if _MANIFEST not in header:
        raise ArtifactError(
            str(path), "a safetensors file without a torchrec_sid manifest", "Check the path."
        )
    try:
        manifest = json.loads(header[_MANIFEST])
        typed = {"kind": str, "version": int, "config": dict, "fingerprint": str}
        whole = all(isinstance(manifest[key], kind) for key, kind in typed.items())
    except (json.JSONDecodeError, KeyError, TypeError):
        whole = False
    if not whole:
        raise ArtifactError(str(path), "its manifest is damaged", "Copy or make it again.")
    return dict(manifest)


def load_artifact(path: str | Path, *, kind: str, version: int, verify: bool = True) -> Artifact:
    """Read an artefact back; tensors are memory-mapped until they are touched.

    Args:
        path: file written by :func:`save_artifact`.
        kind: the kind expected.
        version: the newest layout version that the caller understands.
        verify: recompute the fingerprint (reads the file once); ``False`` trusts the header.

    Raises:
        ArtifactError: missing, truncated, another kind, a newer version, or altered bytes.
    """
    manifest = read_manifest(path)
    if manifest["kind"] != kind:
        raise ArtifactError(
            str(path), f"holds a {manifest['kind']!r}, not a {kind!r}", f"Pass the {kind} file."
        )
    if manifest["version"] > version:
        raise ArtifactError(
            str(path),
            f"has layout version {manifest['version']}, this release reads up to {version}",
            "Upgrade torchrec-sid.",
        )
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    found = manifest["fingerprint"]
    if verify:
        actual = fingerprint(kind, manifest["version"], manifest["config"], tensors)
        if actual != found:
            raise ArtifactError(
                str(path),
                f"contents have fingerprint {actual[:12]}, the header says {found[:12]}",
                "The file was altered after it was written: make it again.",
            )
    return Artifact(manifest["config"], tensors, found)
