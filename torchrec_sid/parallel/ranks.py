"""`Ranks`: the cooperating processes, and how they fail together.

A rank that raises alone leaves the others waiting in a collective until a time-out hides the cause. Here
every rank learns of the failure, and all raise the same error, with the rank and the cause in it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from torchrec_sid.errors import ArtifactError, SidError
from torchrec_sid.parallel.allocator import keep_freed_memory

T = TypeVar("T")


class _Failure(NamedTuple):
    """An exception as plain strings: some exceptions do not survive pickling."""

    artifact: bool
    where: str
    found: str
    remedy: str


@dataclass(frozen=True)
class Ranks:
    """The processes that act together, with a group of their own for small objects.

    The group is gloo whatever the default backend is, so that objects travel without a GPU and a
    background thread never shares a group with the training step.

    Example:
        >>> Ranks.open().all(lambda: 7, where="probe")  # without a process group: one rank
        [7]
    """

    group: dist.ProcessGroup | None
    """None: a single process without torch.distributed."""
    rank: int
    """Of this process."""
    size: int
    """Number of processes."""

    @classmethod
    def open(cls) -> Ranks:
        """All ranks of the default process group (a collective call), or this process alone."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls(None, 0, 1)
        return cls(dist.new_group(backend="gloo"), dist.get_rank(), dist.get_world_size())

    def sum(self, values: Tensor) -> Tensor:
        """The sum of a tensor over the ranks, on every rank; of one shape and dtype on each."""
        total = values.detach().to("cpu", copy=True)
        if self.group is not None:
            dist.all_reduce(total, group=self.group)
        return total.to(values.device)

    def all(
        self, action: Callable[[], T], *, where: str, remedy: str = "See the log of that rank."
    ) -> list[T]:
        """Run ``action`` on every rank and return all results, in rank order, on every rank.

        Raises:
            SidError: the same on every rank, from the lowest rank whose action raised.
        """
        result: T | _Failure
        try:
            result = action()
        except Exception as error:
            if self.group is None:
                raise _to_error(_describe(error, where, remedy, None)) from error
            result = _describe(error, where, remedy, self.rank)
        if self.group is None:
            return [cast(T, result)]
        results: list[T | _Failure | None] = [None] * self.size
        dist.all_gather_object(results, result, group=self.group)
        for other in results:
            if isinstance(other, _Failure):
                raise _to_error(other)
        return cast(list[T], results)

    def first(self, action: Callable[[], T], *, where: str, remedy: str = "See the log of rank 0.") -> T:
        """Run ``action`` on rank 0 and return its result on every rank.

        Raises:
            SidError: on every rank, if the action raised.
        """
        if self.group is None:
            return self.all(action, where=where, remedy=remedy)[0]
        box: list[T | _Failure | None] = [None]
        if self.rank == 0:
            try:
                box[0] = action()
            except Exception as error:
                box[0] = _describe(error, where, remedy, 0)
        dist.broadcast_object_list(box, src=0, group=self.group)
        if isinstance(box[0], _Failure):
            raise _to_error(box[0])
        return cast(T, box[0])


@contextmanager
def process_group() -> Iterator[torch.device]:
    """Join the processes that torch.distributed.run describes, or make a group of this process alone.

    Yields the device of this process: a GPU where there is one. Processes leave together, unless one of
    them fails.
    """
    os.environ.setdefault("MASTER_ADDR", "localhost")
    os.environ.setdefault("MASTER_PORT", "0")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=rank, world_size=world)
    try:
        yield device
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _describe(error: Exception, where: str, remedy: str, rank: int | None) -> _Failure:
    if isinstance(error, SidError):
        return _Failure(isinstance(error, ArtifactError), error.where, error.found, error.remedy)
    if isinstance(error, OSError) and error.strerror:
        cause = f"{error.strerror} ({error.filename})" if error.filename else error.strerror
    else:
        first_line = (str(error).strip() or "no message").splitlines()[0]
        cause = f"{type(error).__name__}: {first_line}"
    return _Failure(False, where, cause if rank is None else f"rank {rank}: {cause}", remedy)


def _to_error(failure: _Failure) -> SidError:
    kind = ArtifactError if failure.artifact else SidError
    return kind(failure.where, failure.found, failure.remedy)
