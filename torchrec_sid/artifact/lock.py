"""The lock of a folder, and who holds it.

The lock is a file ``.NAME.lock`` beside the folder. It says which process took it last; whether that one
still holds it is the system's to know, which frees a lock when its process dies. On a file system of fsspec
it is an object that must not exist yet; there a killed process leaves it, and the error says so.
"""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import json
import logging
import os
import platform
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torchrec_sid.artifact.disk import WRITE_REMEDY, disk_errors
from torchrec_sid.artifact.place import RemotePath, locate
from torchrec_sid.errors import ArtifactError, SidError

_log = logging.getLogger(__name__)
_OWNER = "torchrec_sid lock"
_LONGEST = 4096
_held: set[int] = set()


def _forget() -> None:
    """Close the locks of a parent process: a killed one must not hold them on through its children."""
    while _held:
        with suppress(OSError):
            os.close(_held.pop())


os.register_at_fork(after_in_child=_forget)


@contextmanager
def folder_lock(path: str | Path | RemotePath, *, wait: bool = True) -> Iterator[None]:
    """Hold the exclusive lock of a folder that may not exist yet.

    Args:
        path: the folder, a local path or a URI.
        wait: let others finish first; otherwise a lock that is held is an error.

    Raises:
        SidError: another process holds it and ``wait`` is False, naming that process; or the disk is full,
            read-only or not ours, which is said for what runs under the lock too.
        ArtifactError: something that is not a lock has the lock's name.
    """
    place = locate(path)
    if isinstance(place, RemotePath):
        with _remote_lock(place):
            yield
        return
    file = place.with_name(f".{place.name}.lock")
    with disk_errors(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        handle = _open(file)
    _held.add(handle)
    try:
        _take(handle, place, file, wait)
        with disk_errors(place):
            yield
    finally:
        if handle in _held:  # not so in a child that was forked meanwhile
            _held.remove(handle)
            with suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_UN)
            os.close(handle)


def _open(file: Path) -> int:
    """Open the lock without following a link and without changing what is there."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        handle = os.open(file, flags, 0o666)
    except IsADirectoryError as error:
        raise _not_a_lock(file) from error
    except OSError as error:
        if file.is_symlink():
            raise _not_a_lock(file) from error
        raise
    status = os.fstat(handle)
    # A second name of the file would be some other file of somebody's.
    if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1 or not _is_lock(handle, status.st_size):
        os.close(handle)
        raise _not_a_lock(file)
    return handle


def _is_lock(handle: int, size: int) -> bool:
    return size <= _LONGEST and (not size or os.pread(handle, len(_OWNER), 0) == _OWNER.encode())


def _not_a_lock(file: Path) -> ArtifactError:
    return ArtifactError(str(file), "is not a lock of this package", "Remove it, or choose another folder.")


def _take(handle: int, place: Path, file: Path, wait: bool) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = _holder(os.pread(handle, _LONGEST, 0).decode(errors="replace"))
        if not wait:
            raise SidError(
                str(place), f"is in use by {holder}", "Let it end, or choose another folder."
            ) from error
        _log.warning("%s is in use by %s: waiting", place, holder)
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError as error:
        # Some network file systems have no locks; what is written under one is atomic all the same.
        _log.warning("%s cannot be locked (%s)", place, error)
        return
    with disk_errors(file, WRITE_REMEDY), suppress(BlockingIOError):
        os.ftruncate(handle, 0)
        os.pwrite(handle, _describe_self().encode(), 0)


def _describe_self() -> str:
    user = "an unnamed user"
    with suppress(OSError, KeyError, ImportError):
        user = getpass.getuser()
    body = {"process": os.getpid(), "host": platform.node(), "user": user, "since": time.ctime()}
    return f"{_OWNER} {json.dumps(body)}\n"


def _holder(text: str) -> str:
    try:
        body = json.loads(text.removeprefix(_OWNER))
        return "process {process} of {user} on {host}, since {since}".format(**body)
    except (ValueError, KeyError, TypeError, RecursionError):
        return "another process"


@contextmanager
def _remote_lock(place: RemotePath) -> Iterator[None]:
    lock = place.with_name(f".{place.name}.lock")
    try:
        lock.create(_describe_self().encode())
    except FileExistsError as error:
        with contextlib.closing(lock.open_bytes()) as file:
            holder = _holder(file.read(_LONGEST).decode(errors="replace"))
        raise SidError(
            str(place), f"is in use by {holder}", f"Let it end; if it was killed, delete {lock}."
        ) from error
    try:
        with disk_errors(place):
            yield
    finally:
        lock.unlink()
