"""Make a folder as a whole or not at all, one process at a time."""

from __future__ import annotations

import errno
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torchrec_sid import artifact
from torchrec_sid.errors import SidError

_CANNOT_WRITE = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EEXIST,
}


@contextmanager
def folder_lock(path: Path) -> Iterator[None]:
    """:func:`torchrec_sid.artifact.folder_lock`, for making the folder under it.

    Raises:
        SidError: there, or in what runs under the lock, a disk is full or may not be written.
    """
    with _readable_errors(path), artifact.folder_lock(path):
        yield


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a folder to fill; on success it takes the place of ``path``, on failure it is removed.

    Call with the lock held: what a killed process left behind is removed too.
    """
    for left in path.parent.glob(f".{path.name}.work-*"):
        shutil.rmtree(left, ignore_errors=True)
    work = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.work-"))
    try:
        done = work / "done"
        done.mkdir()
        yield done
        if path.exists():
            path.rename(work / "old")
        done.rename(path)
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def _readable_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _CANNOT_WRITE:
            raise
        raise SidError(
            str(path), f"cannot be written ({error})", "Free space, or choose another folder."
        ) from error
