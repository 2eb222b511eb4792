"""torch.distributed.checkpoint, with its failures as errors that name the rank and the cause.

Its files are pickles. ``.metadata`` is read here by an unpickler that knows the classes of a checkpoint's
metadata and nothing else, and byte entries as ``weights_only``: a checkpoint that somebody else made runs
no code. What the metadata says is compared with the manifest before anything is opened.
"""

from __future__ import annotations

import io
import pickle
import shutil
import warnings
from collections.abc import Callable
from math import prod
from pathlib import Path, PosixPath
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint.metadata as dcp_metadata
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    create_default_local_load_plan,
)
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import async_save as dcp_async_save
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.serialization import _get_layout

from torchrec_sid.artifact import Place, RemotePath, SealedFolder
from torchrec_sid.errors import ArtifactError, SidError

T = TypeVar("T")
WRITE_REMEDY = "Free space or pass another directory; checkpoints written before are untouched."
METADATA = ".metadata"
_AGAIN = "Restore the checkpoint from a copy, or resume from another."
_ALLOWED: dict[tuple[str, str], Any] = {
    (kind.__module__, kind.__name__): kind
    for kind in (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        StorageMeta,
        TensorProperties,
        TensorStorageMetadata,
        dcp_metadata._MEM_FORMAT_ENCODING,
        _StorageInfo,
    )
}
_ALLOWED |= {
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): _get_layout,
    # The directory it was written to: of no use here, whatever the system of the writer.
    ("pathlib", "PosixPath"): PosixPath,
    ("pathlib", "WindowsPath"): str,
}
_ALLOWED |= {
    ("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)
}


def write_state(state: dict[str, Any], directory: Place, group: dist.ProcessGroup | None) -> None:
    """Write a state into a directory and flush it to the disk; a collective call.

    Raises:
        SidError: a rank could not write, on every rank.
    """
    _writing(
        directory,
        lambda: dcp_save(state, storage_writer=_writer(directory), process_group=group),
    )


def start_writing(
    state: dict[str, Any], directory: Place, group: dist.ProcessGroup | None
) -> Callable[[], None]:
    """Copy a state to host memory and write it in a thread.

    Returns:
        A call that waits for the end of the write and raises as :func:`write_state` does.
    """
    future: Any = _quietly(
        lambda: dcp_async_save(state, storage_writer=_writer(directory), process_group=group)
    )
    return lambda: _writing(directory, future.result)


def read_state(state: dict[str, Any], folder: SealedFolder, group: dist.ProcessGroup | None) -> None:
    """Read a state in place, resharding it; a collective call.

    Raises:
        SidError: an entry has another shape or cannot be read.
    """
    where, remedy = (
        str(folder.path),
        "Resume with the sharding plan of the checkpoint: --plan takes its directory.",
    )
    reader = _RemoteReader(folder) if isinstance(folder.path, RemotePath) else _LocalReader(folder)
    planner = _DataOnlyPlanner()
    try:
        _quietly(lambda: dcp_load(state, storage_reader=reader, planner=planner, process_group=group))
    except CheckpointException as error:
        raise SidError(where, _root_cause(error), remedy) from error
    except (ValueError, RuntimeError) as error:
        raise SidError(where, str(error).splitlines()[0], remedy) from error


def stored_entries(folder: SealedFolder) -> set[str]:
    """Names of the entries that were written.

    Raises:
        ArtifactError: the metadata is not that of a checkpoint, or contradicts the manifest.
    """
    return set(read_metadata(folder).state_dict_metadata)


def read_metadata(folder: SealedFolder) -> Metadata:
    """The metadata of a checkpoint, unpickled with its own classes alone, and checked.

    Raises:
        ArtifactError: it names anything else, or contradicts the manifest or itself.
    """
    where = f"{folder.path}/{METADATA}"
    with folder.open(METADATA) as file:
        data = file.read()
    try:
        found = _MetadataUnpickler(io.BytesIO(data)).load()
        wrong = _contradiction(found, folder)
    except ArtifactError:
        raise
    except Exception as error:  # damaged pickles raise whatever their opcodes run into
        raise ArtifactError(where, f"cannot be read ({type(error).__name__}: {error})", _AGAIN) from error
    if wrong is not None:
        raise ArtifactError(where, wrong, _AGAIN)
    return found


class _MetadataUnpickler(pickle.Unpickler):
    """Knows the classes of a checkpoint's metadata, and looks nothing up by name."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise ArtifactError(
                METADATA, f"asks for {module[:80]}.{name[:80]}", "This is not a checkpoint's metadata."
            ) from None

    def persistent_load(self, pid: Any) -> Any:
        raise ArtifactError(METADATA, "refers to objects outside", "This is not a checkpoint's metadata.")


def _contradiction(found: Any, folder: SealedFolder) -> str | None:
    """What in metadata is not of a checkpoint, or does not fit its files; None if all does."""
    if type(found) is not Metadata or not isinstance(found.state_dict_metadata, dict):
        return f"is a {type(found).__name__}"
    stored = found.storage_data
    if not isinstance(stored, dict):
        return "says nothing of files"
    for index, info in stored.items():
        if type(index) is not MetadataIndex or type(info) is not _StorageInfo:
            return "says nothing of files"
        if wrong := _wrong_place(info, folder):
            return wrong
    for name, entry in found.state_dict_metadata.items():
        if not isinstance(name, str) or type(entry) not in (TensorStorageMetadata, BytesStorageMetadata):
            return f"entry {str(name)[:80]!r} is neither a tensor nor bytes"
        if isinstance(entry, TensorStorageMetadata) and not _covered(entry):
            return f"the parts of {name[:80]!r} do not make up the whole"
    paths = found.planner_data or {}
    if not isinstance(paths, dict) or set(paths) != set(found.state_dict_metadata):
        return "its entries are not those of the state"
    return None


def _wrong_place(info: _StorageInfo, folder: SealedFolder) -> str | None:
    if info.relative_path not in folder.files:
        return f"names the file {str(info.relative_path)[:80]!r}, which the manifest does not list"
    if info.transform_descriptors:
        return f"asks for the transforms {str(info.transform_descriptors)[:80]}"
    whole = type(info.offset) is int and type(info.length) is int
    if (
        not whole
        or not 0 <= info.offset <= info.offset + info.length <= folder.files[info.relative_path].bytes
    ):
        return f"reads beyond the end of {info.relative_path}"
    return None


def _covered(entry: TensorStorageMetadata) -> bool:
    """Whether the chunks of a tensor lie within it, apart from each other, and leave nothing out."""
    size = tuple(entry.size)
    boxes = [tuple(zip(chunk.offsets, chunk.sizes, strict=True)) for chunk in entry.chunks]
    for box in boxes:
        if len(box) != len(size) or any(
            a < 0 or n < 0 or a + n > s for (a, n), s in zip(box, size, strict=True)
        ):
            return False
    if sum(prod(n for _, n in box) for box in boxes) != prod(size):
        return False
    # Of equal volume in all, chunks that leave something out share something else; sorted by their first
    # row, only neighbours can.
    boxes.sort()
    for number, box in enumerate(boxes):
        for other in boxes[number + 1 :]:
            if box and other[0][0] >= box[0][0] + box[0][1]:
                break
            if all(a < b + m and b < a + n for (a, n), (b, m) in zip(box, other, strict=True)):
                return False
    return True


class _DataOnlyPlanner(DefaultLoadPlanner):
    """Reads byte entries as data: torch's own planner unpickles whatever they hold."""

    def create_local_plan(self) -> LoadPlan:
        """Of all but empty branches: a rank without a shard of some table has one that nobody wrote."""
        wanted = {
            name: value
            for name, value in self.state_dict.items()
            if not (isinstance(value, dict) and not value)
        }
        assert self.metadata is not None, "set_up_planner comes first"
        return create_default_local_load_plan(wanted, self.metadata, True)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        data = torch.load(value, map_location="cpu", weights_only=True)
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[read_item.dest_index.fqn], data)
        else:
            self.state_dict[read_item.dest_index.fqn] = data


class _LocalReader(FileSystemReader):
    """Reads a folder whose manifest has been checked."""

    def __init__(self, folder: SealedFolder) -> None:
        super().__init__(str(folder.path))
        self.folder = folder

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        metadata = read_metadata(self.folder)
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata


class _RemoteReader(FsspecReader):
    """Reads such a folder at a URI."""

    def __init__(self, folder: SealedFolder) -> None:
        super().__init__(str(folder.path))
        self.folder = folder

    read_metadata = _LocalReader.read_metadata


def _writer(directory: Place) -> FileSystemWriter:
    if isinstance(directory, RemotePath):
        return FsspecWriter(directory.uri, sync_files=False)
    return FileSystemWriter(directory)


def _writing(directory: Place, write: Callable[[], Any]) -> None:
    try:
        _quietly(write)
    except CheckpointException as error:
        found = _root_cause(error)
        if isinstance(directory, Path):
            free = shutil.disk_usage(directory.parent).free
            found = f"{found}; {free / 2**20:,.0f} MiB are free there"
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
