"""An artefact that is one safetensors file, whose header carries the manifest.

The fingerprint is the SHA-256 of kind, version, configuration and tensor bytes: two artefacts with the same
fingerprint hold the same thing. The manifest's seal binds the fingerprint to the header's table of tensors.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors.torch import save, save_file
from torch import Tensor

from torchrec_sid.artifact import sealed
from torchrec_sid.artifact.disk import write_atomically
from torchrec_sid.artifact.folder import read_tensors
from torchrec_sid.artifact.place import Place, RemotePath, locate, member_size, open_member
from torchrec_sid.artifact.sealed import Manifest
from torchrec_sid.errors import ArtifactError

_KEY = "torchrec_sid"
_LENGTH_BYTES = 8
_LARGEST_HEADER = 64 << 20
_EARLIER = {"kind", "version", "config", "fingerprint"}


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


def save_artifact(
    path: str | Path | RemotePath,
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

    Raises:
        SidError: the disk is full, read-only or not ours.
    """
    flat = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    # Through JSON once, so that tuples and the like have the form in which they will be read.
    plain = json.loads(json.dumps(config))
    mark = fingerprint(kind, version, plain, flat)
    body = sealed.seal(kind, version, plain, {"fingerprint": mark, "tensors": _layout(flat)})
    header = {_KEY: json.dumps(body)}
    write_atomically(path, lambda temporary: save_file(flat, temporary, metadata=header))
    return mark


def read_manifest(path: str | Path | RemotePath) -> Manifest:
    """The manifest of an artefact, checked, without reading its tensors.

    Raises:
        ArtifactError: the file is missing, unreadable, cut, altered in its header, or not one of ours.
    """
    place = locate(path)
    with _open(place) as file:
        return _manifest(file, str(place))


def load_artifact(
    path: str | Path | RemotePath, *, kind: str, version: int, verify: bool = True
) -> Artifact:
    """Read an artefact back; tensors are memory-mapped until they are touched.

    Args:
        path: file written by :func:`save_artifact`.
        kind: the kind expected.
        version: the newest layout version that the caller understands.
        verify: recompute the fingerprint (reads the file once). Always so where the environment has a key.

    Raises:
        ArtifactError: missing, truncated, another kind, a newer version, or altered bytes.
    """
    place = locate(path)
    with _open(place) as file:
        manifest = _manifest(file, str(place))
        sealed.check_kind(str(place), manifest.kind, manifest.version, wanted=kind, newest=version)
        file.seek(0)
        tensors = read_tensors(file, str(place))
    found = manifest.contents["fingerprint"]
    if verify or manifest.signed:
        actual = fingerprint(kind, manifest.version, manifest.config, tensors)
        if actual != found:
            raise ArtifactError(
                str(place),
                f"contents have fingerprint {actual[:12]}, the header says {found[:12]}",
                "The file was altered after it was written: make it again.",
            )
    return Artifact(manifest.config, tensors, found)


def _open(place: Place) -> BinaryIO:
    # A link that the user passes is the user's; only what lies inside an artefact may not be one.
    file = place.resolve() if isinstance(place, Path) else place
    if not file.is_file():
        raise ArtifactError(str(place), "no such file", "Check the path, or make it again.")
    return open_member(file.parent, file.name)


def _manifest(file: BinaryIO, where: str) -> Manifest:
    header = _header(file, where)
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or set(metadata) != {_KEY}:
        raise ArtifactError(where, "a safetensors file without a torchrec_sid manifest", "Check the path.")
    body = sealed.parse_json(str(metadata[_KEY]).encode(errors="replace"), where)
    if set(body) == _EARLIER:
        sealed.refuse_unsigned(where, signed=False)
        kind, version, config, mark = (body[k] for k in ("kind", "version", "config", "fingerprint"))
        typed = isinstance(kind, str) and type(version) is int and isinstance(config, dict)
        if not typed or not sealed.is_hash(mark):
            raise ArtifactError(where, "its manifest is damaged", "Copy or make it again.")
        return Manifest(kind, version, config, {"fingerprint": mark}, "", False)
    manifest = sealed.unseal(body, where, contents=("fingerprint", "tensors"))
    sealed.require_canonical(str(metadata[_KEY]).encode(), lambda: json.dumps(body), where)
    _check_table(manifest, tensors, where)
    return manifest


def _header(file: BinaryIO, where: str) -> dict[str, Any]:
    """The JSON at the front of a safetensors file, byte for byte as its library writes it."""
    remedy = "Copy or make it again."
    size = member_size(file)
    length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
    if size < _LENGTH_BYTES + length or length > _LARGEST_HEADER:
        raise ArtifactError(where, "not a complete safetensors file (its header is cut)", remedy)
    data = file.read(length)
    header = sealed.parse_json(data, where, remedy)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False)
    sealed.require_canonical(data.rstrip(b" "), lambda: text, where)
    return header


def _check_table(manifest: Manifest, tensors: dict[str, Any], where: str) -> None:
    """Compare the table of tensors in the header with the sealed one."""
    found = {name: _row(entry) for name, entry in tensors.items()}
    if found != manifest.contents["tensors"] or not sealed.is_hash(manifest.contents["fingerprint"]):
        raise ArtifactError(where, "its header is not the one that was sealed", sealed.AGAIN)


def _layout(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Type, shape and place of each tensor, as the header will have them."""
    # The library orders tensors by type and name: an empty one of each shows how.
    empty = io.BytesIO(save({name: t.new_empty(0) for name, t in tensors.items()}))
    rows, at = {}, 0
    for name, entry in _header(empty, "layout").items():
        if name != "__metadata__":
            end = at + tensors[name].numel() * tensors[name].element_size()
            rows[name] = [entry["dtype"], list(tensors[name].shape), [at, end]]
            at = end
    return rows


def _row(entry: Any) -> Any:
    """A tensor in the header, as :func:`_layout` has it; what is no such thing as it is."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        return entry
    return [entry["dtype"], entry["shape"], entry["data_offsets"]]
