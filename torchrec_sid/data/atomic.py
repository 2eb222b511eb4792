"""Make a folder as a whole or not at all, one process at a time."""

from __future__ import annotations

import fcntl
import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_log = logging.getLogger(__name__)


@contextmanager
def folder_lock(path: Path) -> Iterator[None]:
    """Hold the exclusive lock of a folder that may not exist yet; others wait.

    The lock is the file ``.<name>.lock`` beside the folder; the system frees it when a process dies.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            # Some network file systems have no locks; the rename at the end is atomic all the same.
            _log.warning("%s cannot be locked (%s)", path, error)
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
