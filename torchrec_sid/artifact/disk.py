"""Writing whole files or nothing, with the errors of disks named, and what killed writers left removed.

A writer works in a folder ``.NAME.work-XXXX`` beside its target and holds that folder's lock, which the
system frees when the process dies: the next writer of the same target removes every such folder whose lock
is free.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError

from torchrec_sid.artifact.place import Place, RemotePath, locate
from torchrec_sid.errors import SidError

WRITE_REMEDY = "Free space, or choose another folder."
_SAYS = {
    errno.ENOSPC: "No space left on device",
    errno.EDQUOT: "Disk quota exceeded",
    errno.EFBIG: "File too large",
    errno.EROFS: "Read-only file system",
    errno.EACCES: "Permission denied",
    errno.EPERM: "Operation not permitted",
    errno.ENOTDIR: "Not a directory",
    errno.EEXIST: "Not a directory",  # only a folder is ever made where something may be
    errno.EISDIR: "Is a directory",
    errno.ELOOP: "Too many symbolic links",
    errno.ENAMETOOLONG: "File name too long",
    errno.EIO: "Input/output error",
    errno.ESTALE: "Stale file handle",
}
_OS_ERROR = re.compile(r"os error (\d+)|errno (\d+)", re.IGNORECASE)
# What releases before work folders left of a killed write: mkstemp's names.
_EARLIER_TEMPORARY = re.compile(r"[a-z0-9_]{8}")
_DAY = 86_400


@contextmanager
def disk_errors(where: Place | str, remedy: str = WRITE_REMEDY) -> Iterator[None]:
    """Turn the errors of a disk that is full, read-only or not ours into a SidError that says so.

    Args:
        where: what was to be written.
        remedy: what to do about it.

    Raises:
        SidError: such an error, whichever library raised it.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        cause = disk_cause(error)
        if cause is None:
            raise
        raise SidError(str(where), f"cannot be written ({cause})", remedy) from error


def disk_cause(error: BaseException) -> str | None:
    """What a disk has to do with an error, in words; None if nothing."""
    number = getattr(error, "errno", None)
    if number is None and (found := _OS_ERROR.search(str(error))):
        number = int(found.group(1) or found.group(2))
    if number is None and isinstance(error, RuntimeError):
        # torch's zip writer says what failed without the number.
        number = next((code for code, text in _SAYS.items() if text in str(error)), None)
    if number not in _SAYS:
        return None
    name = getattr(error, "filename", None)
    return f"{_SAYS[number]}: {name}" if name else _SAYS[number]


@contextmanager
def work_folder(target: Path) -> Iterator[Path]:
    """A new folder beside ``target`` that is removed at the end, with what killed writers of it left.

    Args:
        target: what will be moved into place out of the folder.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target.parent, target.name)
    folder, handle = _make_work_folder(target)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def _make_work_folder(target: Path) -> tuple[Path, int]:
    for _ in range(100):
        folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.work-"))
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        with suppress(OSError):  # some network file systems have no locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        # Between the two lines another writer may have taken the folder for a leftover.
        if folder.exists() and os.fstat(handle).st_ino == folder.stat().st_ino:
            return folder, handle
        os.close(handle)
    raise SidError(str(target), "work folders disappear as they are made", "Let one process write it.")


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove what killed writers left in a folder.

    Args:
        folder: where they wrote.
        name: of what they wrote; None: whatever it was, for a caller that holds the folder's lock.
    """
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in list(entries):
            target, _, rest = entry.name.removeprefix(".").rpartition(".")
            if not entry.name.startswith(".") or not target or name not in (None, target):
                continue
            if rest.startswith("work-") and entry.is_dir(follow_symlinks=False):
                _remove_if_free(Path(entry.path))
            elif _EARLIER_TEMPORARY.fullmatch(rest) and entry.is_file(follow_symlinks=False):
                with suppress(OSError):
                    if time.time() - entry.stat(follow_symlinks=False).st_mtime > _DAY:
                        Path(entry.path).unlink()


def _remove_if_free(folder: Path) -> None:
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except OSError:
        pass  # its writer lives
    finally:
        os.close(handle)


def write_atomically(path: str | Path | RemotePath, write: Callable[[Path], object]) -> None:
    """Call ``write`` with a local path to fill, flush it to the disk, and put it in the place of ``path``.

    A crash at any moment leaves either the old file or the new one, never a part of one.

    Args:
        path: a local path or a URI.
        write: fills the file whose path it is given.

    Raises:
        SidError: the disk is full, read-only or not ours, or something else is in the way.
    """
    place = locate(path)
    if isinstance(place, RemotePath):
        with tempfile.TemporaryDirectory() as folder, disk_errors(place):
            write(Path(folder) / place.name)
            place.upload(Path(folder) / place.name)
        return
    with disk_errors(place), work_folder(place) as work:
        temporary = work / place.name
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        # As readable as any file of its user, whichever library made it.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(place)
        sync_directory(place.parent)


def save_array(path: Path, values: NDArray[Any]) -> None:
    """Write a ``.npy`` file.

    ``numpy.save`` hands a file to C, where what a full disk or a quota says of its last bytes is lost.

    Raises:
        OSError: the disk is full, read-only or not ours.
    """
    with path.open("wb") as file:
        np.lib.format.write_array(SimpleNamespace(write=file.write), values, allow_pickle=False)


def write_json(path: str | Path | RemotePath, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text))


def sync_directory(path: Path) -> None:
    """Flush a directory's entries to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):  # not every file system can
            os.fsync(handle)
    finally:
        os.close(handle)
