"""An artefact that is a folder: files that never change, and a sealed manifest that is written last.

``manifest.json`` names every file with its size and SHA-256. Opening a folder checks the manifest and the
sizes; :meth:`SealedFolder.verify` reads every byte. A folder is replaced as a whole (:func:`whole_folder`)
or grows by files and a new manifest (:func:`seal_folder` under :func:`~torchrec_sid.artifact.folder_lock`).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor

from torchrec_sid.artifact import sealed
from torchrec_sid.artifact.disk import disk_errors, work_folder, write_atomically
from torchrec_sid.artifact.place import (
    Place,
    RemotePath,
    check_member,
    locate,
    member_size,
    open_member,
    same_path,
)
from torchrec_sid.artifact.typed import MismatchError, read_typed
from torchrec_sid.errors import ArtifactError, SidError

MANIFEST = "manifest.json"
Earlier = Callable[[dict[str, Any], str], "Contents"]
"""Reads a manifest of a release that had another form: its body and the file's name, for errors."""


class FileRecord(NamedTuple):
    """What a manifest says of one file."""

    bytes: int
    """Its size."""
    sha256: str
    """64 hexadecimal digits."""


class Contents(NamedTuple):
    """What a folder's manifest holds."""

    version: int
    config: dict[str, Any]
    files: dict[str, FileRecord]
    """By name below the folder, components joined by ``/``."""


@dataclass(frozen=True)
class SealedFolder:
    """A folder whose manifest has been checked. Make one with :func:`open_folder`."""

    path: Place
    kind: str
    version: int
    config: dict[str, Any]
    """What the kind keeps in the manifest."""
    files: dict[str, FileRecord]
    seal: str
    """SHA-256 (hex) of the manifest; empty for one of an earlier form."""
    signed: bool
    """Whether it bears a signature of this environment's key."""

    @property
    def total_bytes(self) -> int:
        """Bytes of all files but the manifest."""
        return sum(record.bytes for record in self.files.values())

    def open(self, name: str) -> BinaryIO:
        """Open a listed file for reading; its size is compared with the manifest.

        Raises:
            ArtifactError: not listed, missing, a link, or of another size.
        """
        if name not in self.files:
            raise ArtifactError(f"{self.path}/{name}", "is not in the manifest", sealed.AGAIN)
        file = open_member(self.path, name)
        found, wanted = member_size(file), self.files[name].bytes
        if found != wanted:
            file.close()
            raise ArtifactError(
                f"{self.path}/{name}", f"has {found} bytes, the manifest says {wanted}", sealed.AGAIN
            )
        return file

    def check(self, name: str) -> Path:
        """The local path of a listed file, for a library that opens it itself; checked as by :meth:`open`.

        Raises:
            ArtifactError: as there, or the folder is not on a local disk.
        """
        self.open(name).close()
        if isinstance(self.path, RemotePath):
            raise ArtifactError(str(self.path), "is not on a local disk", "Copy the folder here first.")
        return self.path.joinpath(*name.split("/"))

    def verify(self, names: Iterable[str] | None = None) -> None:
        """Read files and compare their SHA-256 with the manifest.

        Args:
            names: some of them; None: all.

        Raises:
            ArtifactError: naming the first that differs.
        """
        for name in self.files if names is None else names:
            with self.open(name) as file:
                if hash_stream(file) != self.files[name].sha256:
                    raise ArtifactError(
                        f"{self.path}/{name}", "its contents do not match the manifest", sealed.AGAIN
                    )

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of a listed safetensors file: memory-mapped on a local disk, else read.

        Raises:
            ArtifactError: as :meth:`open`, or it is not such a file.
        """
        where = f"{self.path}/{name}"
        with self.open(name) as file:
            return read_tensors(file, where)

    def array(self, name: str, dtype: Any, shape: tuple[int | None, ...]) -> NDArray[Any]:
        """A listed ``.npy`` file, memory-mapped on a local disk.

        Args:
            name: the file.
            dtype: the type its elements must have.
            shape: what its shape must be; None: any size.

        Raises:
            ArtifactError: as :meth:`open`, or another type or shape.
        """
        where = f"{self.path}/{name}"
        with self.open(name) as file:
            array = read_array(file, where)
        fits = len(array.shape) == len(shape) and all(
            want is None or want == size for want, size in zip(shape, array.shape, strict=True)
        )
        if array.dtype != np.dtype(dtype) or not fits:
            raise ArtifactError(
                where,
                f"holds {array.dtype} of shape {array.shape}, not {np.dtype(dtype)} of {shape}",
                sealed.AGAIN,
            )
        return array

    def read_config(self, hint: type[Any]) -> Any:
        """The manifest's configuration as a dataclass or NamedTuple.

        Raises:
            ArtifactError: a field is missing, unknown or of another type.
        """
        try:
            return read_typed(hint, self.config)
        except (MismatchError, SidError) as error:
            raise ArtifactError(f"{self.path}/{MANIFEST}", f"is damaged: {error}", sealed.AGAIN) from error


def open_folder(
    path: str | Place,
    *,
    kind: str,
    version: int,
    verify: bool = False,
    earlier: Earlier | None = None,
    manifest: str = MANIFEST,
    remedy: str = "Check the path, or make it again.",
) -> SealedFolder:
    """Read and check the manifest of a folder, and the sizes of its files.

    Args:
        path: the folder, a local path or a URI.
        kind: the kind expected.
        version: the newest layout that the caller reads.
        verify: read every file and compare its hash. Always so where the environment has a key.
        earlier: reads manifests without a seal, written by releases before it.
        manifest: name of the manifest.
        remedy: for a folder without a manifest.

    Raises:
        ArtifactError: no manifest, another kind, a newer layout, altered, unsigned where there is a key; a
            file is missing, a link, of another size or, with ``verify``, of other contents.
    """
    place = locate(path)
    body, data = _read_body(place, manifest, kind, remedy)
    where = f"{place}/{manifest}"
    folder = _from_body(place, where, body, data, kind, version, earlier)
    for name in folder.files:
        folder.open(name).close()
    if verify or folder.signed:
        folder.verify()
    return folder


def _read_body(place: Place, manifest: str, kind: str, remedy: str) -> tuple[dict[str, Any], bytes]:
    if not has_manifest(place, manifest):
        raise ArtifactError(str(place), f"has no {manifest}: not a {_words(kind)}", remedy)
    with open_member(place, manifest) as file:
        data = file.read()
    return sealed.parse_json(data, f"{place}/{manifest}"), data


def _from_body(
    place: Place,
    where: str,
    body: dict[str, Any],
    data: bytes,
    kind: str,
    version: int,
    earlier: Earlier | None,
) -> SealedFolder:
    if "seal" not in body and earlier is not None:
        sealed.refuse_unsigned(where, signed=False)
        try:
            old = earlier(body, where)
            files = {name: FileRecord(*record) for name, record in old.files.items()}
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            if isinstance(error, ArtifactError):
                raise
            what = f"lacks {error}" if isinstance(error, KeyError) else repr(error)
            raise ArtifactError(where, f"is damaged ({what})", sealed.AGAIN) from error
        return SealedFolder(place, kind, old.version, old.config, _checked(files, where), "", False)
    sealed.check_kind(
        where, body.get("kind"), body.get("version"), wanted=kind, newest=version, holder="folder"
    )
    manifest = sealed.unseal(body, where, contents=("files",))
    sealed.require_canonical(data, lambda: sealed.to_text(body), where)
    try:
        files = read_typed(dict[str, FileRecord], manifest.contents["files"], "files")
    except MismatchError as error:
        raise ArtifactError(where, f"is damaged: {error}", sealed.AGAIN) from error
    files = _checked(files, where)
    return SealedFolder(
        place, kind, manifest.version, manifest.config, files, manifest.seal, manifest.signed
    )


def _checked(files: dict[str, FileRecord], where: str) -> dict[str, FileRecord]:
    for name, record in files.items():
        check_member(name, where)
        if not sealed.is_hash(record.sha256) or type(record.bytes) is not int or record.bytes < 0:
            raise ArtifactError(where, f"is damaged: the entry of {name[:80]!r}", sealed.AGAIN)
    return files


def seal_folder(
    path: str | Place,
    *,
    kind: str,
    version: int,
    config: Mapping[str, Any],
    files: Mapping[str, FileRecord],
    manifest: str = MANIFEST,
) -> str:
    """Write the manifest of a folder, atomically and last; its seal (SHA-256, hex).

    Args:
        path: the folder.
        kind: what it is.
        version: layout of the kind.
        config: JSON-serialisable.
        files: what belongs to it, see :func:`record_file`.
        manifest: name of the manifest.

    Raises:
        SidError: the disk is full, read-only or not ours.
    """
    place = locate(path)
    listed = {name: record._asdict() for name, record in sorted(files.items())}
    body = sealed.seal(kind, version, config, {"files": listed})
    write_atomically(place / manifest, lambda temporary: temporary.write_text(sealed.to_text(body)))
    return str(body["seal"])


def record_file(folder: str | Place, name: str, *, flush: bool = False) -> FileRecord:
    """Size and SHA-256 of a file below a folder.

    Args:
        folder: the folder.
        name: of the file.
        flush: flush it to the disk first, for a file that some other library has written.
    """
    place = locate(folder)
    with open_member(place, name) as file:
        if flush and isinstance(place, Path):
            with disk_errors(f"{folder}/{name}"):
                os.fsync(file.fileno())
        return FileRecord(member_size(file), hash_stream(file))


def record_tree(folder: Path) -> dict[str, FileRecord]:
    """Every file below a local folder but its manifest, flushed to the disk."""
    names = [
        str(file.relative_to(folder).as_posix()) for file in sorted(folder.rglob("*")) if file.is_file()
    ]
    return {name: record_file(folder, name, flush=True) for name in names if name != MANIFEST}


def has_manifest(path: str | Place, manifest: str = MANIFEST) -> bool:
    """Whether a folder has a manifest; one that is being made has none yet."""
    place = locate(path)
    return place.is_dir() and ((place / manifest).is_file() or _is_link(place / manifest))


@contextmanager
def whole_folder(path: str | Path, kind: str, manifest: str = MANIFEST) -> Iterator[Path]:
    """Yield a folder to fill; on success it takes the place of ``path``, on failure it is removed.

    Call with the lock held. What stands there is replaced only if it is an artefact of this kind, or empty;
    one of a release that kept no list of its files becomes ``NAME.old-N``, as some may be the user's.

    Args:
        path: the folder to make.
        kind: of its manifest, which is for the caller to write.
        manifest: name of the manifest.

    Raises:
        SidError: something else is there: another artefact, or files that no manifest lists.
    """
    path = Path(path)
    require_ours(path, kind, manifest)
    with work_folder(path) as work:
        done = work / "done"
        done.mkdir()
        yield done
        if path.exists():
            unlisted = any(path.iterdir()) and _listed(path, kind, manifest) is None
            path.rename(unused_name(path) if unlisted else work / "old")
        done.rename(path)


def unused_name(path: Path) -> Path:
    """``NAME.old-N`` beside it, N the first that is free: where a thing may be moved aside."""
    number = 1
    while (aside := path.with_name(f"{path.name}.old-{number}")).exists():
        number += 1
    return aside


def require_ours(path: Path, kind: str, manifest: str = MANIFEST) -> None:
    """Refuse to replace what is not an artefact of a kind.

    Raises:
        SidError: a file, another artefact, or a folder with files that its manifest does not list.
    """
    remedy = "Choose another folder, or move it away."
    if path.is_symlink() and path.is_dir():
        raise SidError(str(path), "is a link to a folder", "Pass the folder itself.")
    if not path.exists():
        return
    if not path.is_dir():
        raise SidError(str(path), "is a file, not a folder", remedy)
    if not any(path.iterdir()):
        return
    try:
        listed = _listed(path, kind, manifest)
    except ArtifactError as error:
        raise SidError(str(path), f"holds something that is not a {_words(kind)}", remedy) from error
    if listed is None:
        return
    for file in sorted(path.rglob("*")):
        if not file.is_dir() and file.relative_to(path).as_posix() not in listed:
            raise SidError(str(path), f"holds {file.name!r}, which is not of this {_words(kind)}", remedy)


def claims_kind(path: Place, manifest: str = MANIFEST) -> str | None:
    """The kind that a manifest names, whatever else is wrong with it; None if none."""
    try:
        body, _ = _read_body(path, manifest, "artefact", "")
    except ArtifactError:
        return None
    return str(body["kind"]) if "kind" in body else None


def _listed(path: Path, kind: str, manifest: str) -> set[str] | None:
    """Files of an artefact; None where it is of a release that kept no list."""
    body, _ = _read_body(path, manifest, kind, "")
    if "seal" not in body:
        return None
    if body.get("kind") != kind or not isinstance(body.get("files"), dict):
        raise ArtifactError(str(path), f"kind {str(body.get('kind'))[:80]!r}", "")
    return {manifest, *body["files"]}


def read_tensors(file: BinaryIO, where: str) -> dict[str, Tensor]:
    """The tensors of an open safetensors file: memory-mapped where it has a path, else read.

    Raises:
        ArtifactError: not a complete safetensors file.
    """
    try:
        path = same_path(file)
        if path is None:
            return load(file.read())
        with safe_open(path, framework="pt") as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise ArtifactError(
            where, f"not a complete safetensors file ({error})", "Copy or make it again."
        ) from error


def read_array(file: BinaryIO, where: str, remedy: str = sealed.AGAIN) -> NDArray[Any]:
    """An open ``.npy`` file: memory-mapped where it has a path, else read.

    Raises:
        ArtifactError: it is not one, or holds objects.
    """
    path = same_path(file)
    mode: Literal["r"] | None = None if path is None else "r"
    try:
        array: NDArray[Any] = np.load(path or file, mmap_mode=mode, allow_pickle=False)
    # Its header is read as Python's text, with the errors of that.
    except (ValueError, EOFError, OSError, SyntaxError, TokenError, MemoryError, RecursionError) as error:
        raise ArtifactError(where, f"cannot be read ({error})", remedy) from error
    return array


def hash_stream(file: BinaryIO) -> str:
    """SHA-256 (hex) of what is left of an open file."""
    digest = hashlib.sha256()
    while block := file.read(1 << 22):
        digest.update(block)
    return digest.hexdigest()


def _words(kind: str) -> str:
    return kind.replace("_", " ")


def _is_link(place: Place) -> bool:
    return isinstance(place, Path) and place.is_symlink()
