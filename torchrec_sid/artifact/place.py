"""Where artefacts lie: a local path, or a folder of any file system that fsspec knows (s3://, memory://).

What a manifest or a listing names is opened by :func:`open_member` alone: bare names below the folder, no
link followed. The path that a user passes may lead through links; what lies inside an artefact may not.
"""

from __future__ import annotations

import errno
import io
import os
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

import fsspec
from fsspec.core import url_to_fs

from torchrec_sid.errors import ArtifactError

_BLOCK = 1 << 22
_LONGEST_NAME = 255


class RemotePath:
    """A path on a file system of fsspec, with the few methods of ``pathlib.Path`` that artefacts need.

    Args:
        uri: e.g. ``s3://bucket/catalog``.

    Example:
        >>> (RemotePath("memory://shop") / "catalog").name
        'catalog'
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/")
        filesystem, path = url_to_fs(self.uri)
        self.filesystem: fsspec.AbstractFileSystem = filesystem
        self._path: str = path

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(f"{self.uri}/{name}")

    def __str__(self) -> str:
        return self.uri

    def __repr__(self) -> str:
        return f"RemotePath({self.uri!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and self.uri == other.uri

    def __hash__(self) -> int:
        return hash(self.uri)

    def __getstate__(self) -> dict[str, str]:
        # Connections are not carried into other processes.
        return {"uri": self.uri}

    def __setstate__(self, state: dict[str, str]) -> None:
        self.__init__(state["uri"])  # type: ignore[misc]

    @property
    def name(self) -> str:
        """The last component."""
        return self.uri.rsplit("/", 1)[-1]

    @property
    def parent(self) -> RemotePath:
        """The folder around it."""
        return RemotePath(self.uri.rsplit("/", 1)[0])

    def with_name(self, name: str) -> RemotePath:
        """Its neighbour of that name."""
        return self.parent / name

    def exists(self) -> bool:
        """Whether there is an object, or one below it."""
        return bool(self.filesystem.exists(self._path))

    def is_file(self) -> bool:
        """Whether there is an object of that name."""
        return bool(self.filesystem.isfile(self._path))

    def is_dir(self) -> bool:
        """Whether there are objects below it."""
        return bool(self.filesystem.isdir(self._path))

    def iterdir(self) -> Iterator[RemotePath]:
        """What lies directly below it."""
        for path in self.filesystem.ls(self._path, detail=False):
            yield self / path.rstrip("/").rsplit("/", 1)[-1]

    def mkdir(self, **_: Any) -> None:
        """Make the folder, on file systems that have folders."""
        self.filesystem.makedirs(self._path, exist_ok=True)

    def open_bytes(self) -> BinaryIO:
        """Open for reading."""
        return cast(BinaryIO, self.filesystem.open(self._path, "rb"))

    def size(self) -> int:
        """Bytes of the object."""
        return int(self.filesystem.size(self._path))

    def write_bytes(self, data: bytes) -> None:
        """Put an object, as a whole or not at all."""
        self.filesystem.pipe_file(self._path, data)

    def create(self, data: bytes) -> None:
        """Put an object that must not exist yet.

        Raises:
            FileExistsError: it does.
        """
        self.filesystem.pipe_file(self._path, data, mode="create")

    def upload(self, file: Path) -> None:
        """Put a local file."""
        self.filesystem.put_file(str(file), self._path)

    def unlink(self) -> None:
        """Delete the object, if there is one."""
        if self.exists():
            self.filesystem.rm_file(self._path)

    def remove_tree(self) -> None:
        """Delete everything below it."""
        if self.exists():
            self.filesystem.rm(self._path, recursive=True)


Place = Path | RemotePath


def locate(where: str | Path | RemotePath) -> Place:
    """A local path, or a :class:`RemotePath` where ``where`` is a URI (``scheme://...``).

    Raises:
        ArtifactError: a URI of a scheme that fsspec does not know, or whose driver is not installed.
    """
    if isinstance(where, RemotePath | Path):
        return where
    if "://" not in where:
        return Path(where)
    if where.startswith("file://"):
        return Path(where.removeprefix("file://"))
    try:
        return RemotePath(where)
    except (ValueError, ImportError) as error:
        raise ArtifactError(
            where, f"cannot be reached ({error})", "Check the scheme of the URI."
        ) from error


def check_member(name: str, where: str) -> tuple[str, ...]:
    """The components of a name that a manifest gives for a file below its folder.

    Raises:
        ArtifactError: it is absolute, leads out of the folder, or is no name of a file at all.
    """
    parts = tuple(name.split("/"))
    for part in parts:
        odd = not part or part in (".", "..") or len(part.encode(errors="replace")) > _LONGEST_NAME
        if odd or any(character in part for character in "\\\0\n:") or not part.isprintable():
            raise ArtifactError(
                where,
                f"names the file {name[:80]!r}",
                "Names of files stay inside their folder: make it again.",
            )
    if PurePosixPath(name).is_absolute():
        raise ArtifactError(where, f"names the file {name[:80]!r}", "Make it again.")
    return parts


def open_member(folder: Place, name: str) -> BinaryIO:
    """Open a regular file below a folder for reading, following no link.

    Args:
        folder: as the user gave it.
        name: ``part.safetensors`` or ``train/part-00000.parquet``; checked by :func:`check_member`.

    Raises:
        ArtifactError: missing, a link, a device or a folder, or a name that leads out.
    """
    parts = check_member(name, str(folder))
    path = "/".join((str(folder), *parts))
    if isinstance(folder, RemotePath):
        file = RemotePath(path)
        if not file.is_file():
            raise _missing(path)
        return file.open_bytes()
    try:
        handle = _descend(folder, parts)
    except OSError as error:
        linked = any(folder.joinpath(*parts[:n]).is_symlink() for n in range(1, len(parts) + 1))
        if error.errno in (errno.ENOENT, errno.ENOTDIR) and not linked:
            raise _missing(path) from error
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise ArtifactError(
                path, "is or lies behind a symbolic link", "Copy the whole folder with its files."
            ) from error
        raise ArtifactError(path, f"cannot be read ({error.strerror})", "Check its permissions.") from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ArtifactError(path, "is not a regular file", "Copy the whole folder, or make it again.")
    return os.fdopen(handle, "rb")


def _descend(folder: Path, parts: tuple[str, ...]) -> int:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    at = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in parts[:-1]:
            below = os.open(part, flags | os.O_DIRECTORY, dir_fd=at)
            os.close(at)
            at = below
        return os.open(parts[-1], flags, dir_fd=at)
    finally:
        os.close(at)


def _missing(path: str) -> ArtifactError:
    return ArtifactError(path, "no such file", "Copy the whole folder, or make it again.")


def member_size(file: BinaryIO) -> int:
    """Bytes of a file that :func:`open_member` opened."""
    try:
        return os.fstat(file.fileno()).st_size
    except (OSError, AttributeError, io.UnsupportedOperation):
        at = file.tell()
        end = file.seek(0, os.SEEK_END)
        file.seek(at)
        return end


def same_path(file: BinaryIO) -> str | None:
    """A path to the very file that is open, whatever became of its name; None where there is none."""
    try:
        path = f"/proc/self/fd/{file.fileno()}"
    except (OSError, AttributeError, io.UnsupportedOperation):
        return None
    return path if Path(path).exists() else None
