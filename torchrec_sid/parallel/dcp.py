"""torch.distributed.checkpoint, with its failures as errors that name the rank and the cause."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import async_save as dcp_async_save
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from torchrec_sid.errors import SidError

T = TypeVar("T")
WRITE_REMEDY = "Free space or pass another directory; checkpoints written before are untouched."


def write_state(state: dict[str, Any], directory: Path, group: dist.ProcessGroup | None) -> None:
    """Write a state into a directory and flush it to the disk; a collective call.

    Raises:
        SidError: a rank could not write, on every rank.
    """
    _writing(
        directory,
        lambda: dcp_save(state, storage_writer=FileSystemWriter(directory), process_group=group),
    )


def start_writing(
    state: dict[str, Any], directory: Path, group: dist.ProcessGroup | None
) -> Callable[[], None]:
    """Copy a state to host memory and write it in a thread.

    Returns:
        A call that waits for the end of the write and raises as :func:`write_state` does.
    """
    future: Any = _quietly(
        lambda: dcp_async_save(state, storage_writer=FileSystemWriter(directory), process_group=group)
    )
    return lambda: _writing(directory, future.result)


def read_state(state: dict[str, Any], directory: Path, group: dist.ProcessGroup | None) -> None:
    """Read a state in place, resharding it; a collective call.

    Raises:
        SidError: an entry has another shape or cannot be read.
    """
    remedy = "Resume with the sharding plan of the checkpoint: --plan takes its directory."
    try:
        _quietly(lambda: dcp_load(state, storage_reader=FileSystemReader(directory), process_group=group))
    except CheckpointException as error:
        raise SidError(str(directory), _root_cause(error), remedy) from error
    except (ValueError, RuntimeError) as error:
        raise SidError(str(directory), str(error).splitlines()[0], remedy) from error


def stored_entries(directory: Path) -> set[str]:
    """Names of the entries that were written."""
    return set(FileSystemReader(directory).read_metadata().state_dict_metadata)


def _writing(directory: Path, write: Callable[[], Any]) -> None:
    try:
        _quietly(write)
    except CheckpointException as error:
        free = shutil.disk_usage(directory.parent).free
        found = f"{_root_cause(error)}; {free / 2**20:,.0f} MiB are free there"
        raise SidError(str(directory.parent), found, WRITE_REMEDY) from error


def _quietly(call: Callable[[], T]) -> T:
    """Without DCP's warnings about a single process, which is a supported way here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        return call()


def _root_cause(error: CheckpointException) -> str:
    rank, (cause, _) = next(iter(sorted(error.failures.items())))
    text = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(cause)
    first_line = (text.strip() or "no message").splitlines()[0]
    return f"rank {rank}: {type(cause).__name__}: {first_line}"
