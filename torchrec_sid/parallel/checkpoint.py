"""`CheckpointManager`: checkpoints that are whole or absent, of any world size, made in the background.

The tensors go through ``torch.distributed.checkpoint``, so that a run resumes on another number of
processes or under another sharding plan wherever TorchRec permits it. Around that: a checkpoint appears by
one rename after every rank has finished and everything is on the disk, each file is hashed, and a run with
another catalog (or anything else named in ``identity``) is refused.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from torchrec_sid.artifact import FileRecord, Place, folder_lock, locate, record_file, write_atomically
from torchrec_sid.errors import SidError
from torchrec_sid.parallel.checkpoint_files import (
    CheckpointInfo,
    begin,
    discard,
    list_checkpoints,
    prune,
    publish,
    read_checkpoint,
    remove_leftovers,
    require_visible,
    verify_files,
    write_manifest,
)
from torchrec_sid.parallel.dcp import (
    METADATA,
    WRITE_REMEDY,
    read_state,
    start_writing,
    stored_entries,
    write_state,
)
from torchrec_sid.parallel.ranks import Ranks
from torchrec_sid.parallel.state import check_entries, entry_names

logger = logging.getLogger(__name__)


class CheckpointManager:
    """Writes and reads the checkpoints of one run. All ranks construct it and call it in step.

    Args:
        directory: where the checkpoints live: a path on a file system that all ranks share, or a URI. One
            process tree writes there at a time (on object storage, that is the caller's to see to).
        keep: how many of the newest to keep, at least 1.
        asynchronous: copy the state to host memory and write it in a background thread while training goes
            on; a failure surfaces at the next call. At most one write is in flight.
        identity: what the state depends on, name -> fingerprint, e.g. ``{"catalog": catalog.fingerprint}``.
            Saved with each checkpoint; :meth:`load` refuses a checkpoint with another value, and one that
            depends on something else besides. None: load whatever is there.
        accepts: name in ``identity`` -> whether a checkpoint with that other value may be loaded all the
            same, e.g. ``{"catalog": catalog.extends}``: one that was only appended to. It is asked with
            an empty text about a checkpoint that does not state the name.

    Raises:
        SidError: ``keep`` below 1, or the directory cannot be created or written.

    Example:
        >>> import torch
        >>> from tempfile import TemporaryDirectory
        >>> state = {"model": torch.nn.Linear(2, 1).state_dict()}
        >>> with TemporaryDirectory() as folder, CheckpointManager(folder) as manager:
        ...     manager.save(100, state, {"position": 12})
        ...     info = manager.latest()
        ...     metadata = manager.load(info, state)  # in place
        >>> info.step, metadata
        (100, {'position': 12})
    """

    def __init__(
        self,
        directory: str | Place,
        *,
        keep: int = 2,
        asynchronous: bool = False,
        identity: Mapping[str, str] | None = None,
        accepts: Mapping[str, Callable[[str], bool]] | None = None,
    ) -> None:
        if keep < 1:
            raise SidError("checkpoint.keep", str(keep), "Keep at least 1 checkpoint.")
        place = locate(directory)
        self.directory: Place = place.absolute() if isinstance(place, Path) else place
        self.keep = keep
        self.asynchronous = asynchronous
        self.identity = None if identity is None else dict(identity)
        self.accepts = dict(accepts or {})
        self._ranks = Ranks.open()
        self._pending: Future[None] | None = None
        self._thread = ThreadPoolExecutor(1, "checkpoint") if asynchronous else None
        self._claim = ExitStack()
        self._claimed = False

    def require(
        self, identity: Mapping[str, str], accepts: Mapping[str, Callable[[str], bool]] | None = None
    ) -> None:
        """Set ``identity`` and ``accepts`` where they are known later than the directory."""
        self.identity, self.accepts = dict(identity), dict(accepts or {})

    def claim(self) -> None:
        """Take the directory for this run until :meth:`close`; a collective call. The first save does too.

        Raises:
            SidError: another process writes there, on every rank, naming that process.
        """
        self._ranks.first(self._take, where=str(self.directory), remedy=WRITE_REMEDY)

    def latest(self) -> CheckpointInfo | None:
        """The newest complete checkpoint, or None. Checks its manifest and file sizes.

        Raises:
            ArtifactError: it lacks a file, or has a truncated one: the same on every rank.
        """

        self.wait()

        def find() -> CheckpointInfo | None:
            found = list_checkpoints(self.directory)
            return read_checkpoint(found[-1]) if found else None

        # Rank 0 looks: on a network file system others may still see an older listing.
        return self._ranks.first(find, where=str(self.directory), remedy="Check the directory.")

    def save(
        self,
        step: int,
        state: dict[str, Any],
        metadata: Mapping[str, Any],
        *,
        local: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write a checkpoint; a collective call. Returns once it is complete, or copied if asynchronous.

        Args:
            step: training steps done.
            state: nested dict of tensors, ShardedTensors and DTensors with string keys, see
                :func:`~torchrec_sid.parallel.state.training_state`. A plain tensor must be equal on every
                rank.
            metadata: JSON-serialisable; rank 0's is kept.
            local: tensors of this rank alone (metric windows, say); see :meth:`load_local`.

        Raises:
            SidError: on every rank, naming the rank and the cause; nothing older is lost.
        """
        self.wait()
        start = partial(self._begin, step, metadata)
        temporary = self._ranks.first(start, where=str(self.directory), remedy=WRITE_REMEDY)
        finish = partial(self._finish, temporary, step, dict(metadata), _copy_local(local))
        if self._thread is None:
            with self._discarding(temporary):
                write_state(state, temporary, self._ranks.group)
                finish()
            return
        written = start_writing(state, temporary, self._ranks.group)

        def complete() -> None:
            with self._discarding(temporary):
                written()
                finish()

        self._pending = self._thread.submit(complete)

    def wait(self) -> None:
        """Block until a write in flight is complete.

        Raises:
            SidError: it failed.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def load(
        self,
        info: CheckpointInfo,
        state: dict[str, Any],
        *,
        partial_state: bool = False,
        verify: bool = True,
    ) -> dict[str, Any]:
        """Verify a checkpoint and read it into ``state`` in place; a collective call.

        Nothing is read unless every file matches its hash, the identity agrees, and every entry of
        ``state`` is there with the same shape. Pass the state on to
        :func:`~torchrec_sid.parallel.state.apply_training_state` afterwards.

        Args:
            info: from :meth:`latest`.
            state: like the one saved; the model may be sharded differently.
            partial_state: allow entries in the checkpoint that ``state`` lacks under the same top-level
                key. By default that is an error: an optimizer that has not made its state yet would
                silently start from zero.
            verify: compare every file with its hash, which reads it once more; each rank takes a share.

        Returns:
            The metadata that was saved.

        Raises:
            ArtifactError: a file is missing, truncated or altered.
            SidError: another identity, an entry missing on either side, another shape.
        """
        self.wait()
        self._check_identity(info)
        where = str(info.path)
        if verify:
            mine = sorted(info.files)[self._ranks.rank :: self._ranks.size]
            self._ranks.all(lambda: verify_files(info, mine), where=where, remedy="Restore it from a copy.")
        wanted = set().union(*self._ranks.all(lambda: entry_names(state), where=where))
        check_entries(where, wanted, stored_entries(info.folder), tops=state, allow_extra=partial_state)
        read_state(state, info.folder, self._ranks.group)
        return info.metadata

    def load_local(self, info: CheckpointInfo) -> list[dict[str, Tensor]]:
        """The per-rank tensors this rank should take over, on the CPU.

        With the world size unchanged that is what this rank saved. Otherwise saved rank r goes to rank
        ``r % world_size``: sums stay right if a rank adds up what it gets; a rank may get none.
        """
        names = [
            f"local-{r}.safetensors" for r in range(self._ranks.rank, info.world_size, self._ranks.size)
        ]
        return [info.folder.tensors(name) for name in names if name in info.files]

    def close(self) -> None:
        """Wait for a write in flight and stop the background thread."""
        try:
            self.wait()
        finally:
            if self._thread is not None:
                self._thread.shutdown()
            self._release()

    def __enter__(self) -> CheckpointManager:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        elif self._thread is not None:
            # The run has failed: other ranks may be gone, and waiting for them would hide why.
            self._thread.shutdown(wait=False, cancel_futures=True)
        self._release()

    def _take(self) -> None:
        if self._claimed:
            return
        if isinstance(self.directory, Path):
            self._claim.enter_context(folder_lock(self.directory, wait=False))
            self.directory.mkdir(exist_ok=True)
        remove_leftovers(self.directory)
        self._claimed = True

    def _release(self) -> None:
        self._claimed = False
        self._claim.close()

    def _begin(self, step: int, metadata: Mapping[str, Any]) -> Place:
        try:
            json.dumps(dict(metadata))
        except (TypeError, ValueError) as error:
            raise SidError(
                "checkpoint metadata", str(error), "Pass numbers, strings, lists and dicts."
            ) from error
        self._take()
        return begin(self.directory, step)

    def _finish(
        self, temporary: Place, step: int, metadata: dict[str, Any], local: dict[str, Tensor] | None
    ) -> None:
        rank, where = self._ranks.rank, str(self.directory)

        def record() -> dict[str, FileRecord]:
            if local is not None:
                path = temporary / f"local-{rank}.safetensors"
                write_atomically(path, lambda file: save_file(local, file))
            mine = (f"__{rank}_", f"local-{rank}.", *((METADATA,) if rank == 0 else ()))
            names = [entry.name for entry in temporary.iterdir() if entry.name.startswith(mine)]
            return {name: record_file(temporary, name, flush=True) for name in names}

        def complete() -> None:
            files = {name: file for part in parts for name, file in part.items()}
            require_visible(temporary, files)
            size, identity = self._ranks.size, self.identity or {}
            write_manifest(
                temporary, step=step, world_size=size, identity=identity, metadata=metadata, files=files
            )
            publish(temporary)
            try:
                prune(self.directory, self.keep)
            except OSError as error:  # the new checkpoint is complete: no reason to stop the run
                logger.warning("%s: an old checkpoint could not be deleted (%s)", self.directory, error)

        parts = self._ranks.all(record, where=where, remedy=WRITE_REMEDY)
        self._ranks.first(complete, where=where, remedy=WRITE_REMEDY)

    @contextmanager
    def _discarding(self, temporary: Place) -> Iterator[None]:
        """Remove what was written if it cannot be completed."""
        try:
            yield
        except SidError:
            if self._ranks.rank == 0:
                discard(temporary)
            raise

    def _check_identity(self, info: CheckpointInfo) -> None:
        if self.identity is None:
            return
        # A checkpoint of an earlier release says less of what a run depends on.
        known = info.identity if not info.folder.seal else {**info.identity, **self.identity}
        for name in known:
            saved, value = info.identity.get(name), self.identity.get(name)
            if saved == value:
                continue
            if value and name in self.accepts and self.accepts[name](saved or ""):
                logger.info(
                    "%s was trained with %s %s, which %s continues",
                    *(info.path, name, (saved or "not stated")[:12], value[:12]),
                )
                continue
            ours, theirs = (f"{name} {mark[:12]}" if mark else f"no {name}" for mark in (value, saved))
            raise SidError(
                str(info.path),
                f"was trained with {theirs}, this run has {ours}",
                f"Pass the {name} of that run, or start a new run in another directory.",
            )


def _copy_local(local: Mapping[str, Tensor] | None) -> dict[str, Tensor] | None:
    if local is None:
        return None
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in local.items()}
