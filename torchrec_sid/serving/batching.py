"""`MicroBatcher`: requests that arrive together are answered together, and too many are refused at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

from torchrec_sid.errors import SidError

Request = TypeVar("Request")
Answer = TypeVar("Answer")


class Overloaded(RuntimeError):  # noqa: N818  a state of the server, not a mistake of the caller
    """The queue is full: try again later, or elsewhere."""


@dataclass(frozen=True)
class BatchLimits:
    """What a server takes at a time.

    Raises:
        SidError: a limit below 1, or a queue that a single batch overflows.
    """

    max_rows: int = 1024
    """Candidates of one run of the model; a larger request runs alone."""
    max_wait_ms: float = 1.0
    """Longest time that a request waits for company while the model is idle."""
    max_queued_rows: int = 8192
    """Candidates that may wait; requests beyond are refused at once."""
    timeout_ms: float = 1000.0
    """A request that has waited longer is not run any more."""

    def __post_init__(self) -> None:
        if min(self.max_rows, self.timeout_ms) < 1 or self.max_wait_ms < 0:
            raise SidError("BatchLimits", f"{self}", "Rows and milliseconds are 1 or more.")
        if self.max_queued_rows < self.max_rows:
            raise SidError(
                "BatchLimits.max_queued_rows",
                f"{self.max_queued_rows} is less than max_rows {self.max_rows}",
                "Let a whole batch wait.",
            )


@dataclass(frozen=True)
class ServerConfig:
    """A server."""

    folder: str
    """Folder written by export, of one precision; a version that replaces it is taken up while serving."""
    name: str = "ranker"
    """Of the model, in URLs."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for every network of the machine."""
    http_port: int = 8080
    """Of REST, metrics and health."""
    grpc_port: int = 8081
    """Of gRPC; 0 for none."""
    max_candidates: int = 4096
    """Most candidates of one request."""
    watch_seconds: float = 1.0
    """Seconds between two looks for a new version; 0 for never."""
    limits: BatchLimits = field(default_factory=BatchLimits)
    """Micro-batches, queue and time-out."""


class _Waiting(NamedTuple, Generic[Request, Answer]):
    request: Request
    rows: int
    since: float
    answer: asyncio.Future[Answer]


class MicroBatcher(Generic[Request, Answer]):
    """Runs one batch at a time on a thread of its own; the next one gathers meanwhile.

    Args:
        run: requests -> answers, in their order; it may raise for all of them.
        rows: candidates of a request.
        limits: see :class:`BatchLimits`.

    Example:
        >>> async def ask():
        ...     batcher = MicroBatcher(lambda xs: [2 * x for x in xs], lambda x: 1, BatchLimits())
        ...     try:
        ...         return await asyncio.gather(*(batcher.ask(x) for x in (1, 2, 3)))
        ...     finally:
        ...         await batcher.close()
        >>> asyncio.run(ask())
        [2, 4, 6]
    """

    def __init__(
        self,
        run: Callable[[Sequence[Request]], Sequence[Answer]],
        rows: Callable[[Request], int],
        limits: BatchLimits,
    ) -> None:
        self.run, self.rows, self.limits = run, rows, limits
        self.queued_rows = 0
        self._queue: asyncio.Queue[_Waiting[Request, Answer]] = asyncio.Queue()
        self._thread = ThreadPoolExecutor(1, "ranker")
        self._left: _Waiting[Request, Answer] | None = None  # taken from the queue, too large for its batch
        self._task: asyncio.Task[None] | None = None

    async def ask(self, request: Request) -> Answer:
        """The answer to one request.

        Raises:
            Overloaded: the queue is full; nothing was done.
            TimeoutError: it waited longer than ``timeout_ms``.
        """
        rows = self.rows(request)
        if self.queued_rows and self.queued_rows + rows > self.limits.max_queued_rows:
            raise Overloaded(f"{self.queued_rows} candidates are waiting")
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._serve())
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self.queued_rows += rows
        self._queue.put_nowait(_Waiting(request, rows, time.monotonic(), answer))
        return await answer

    async def close(self) -> None:
        """Stop; requests that still wait end with CancelledError."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        while not self._queue.empty():
            self._queue.get_nowait().answer.cancel()
        if self._left is not None:
            self._left.answer.cancel()
        self._thread.shutdown(wait=True)

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = await self._gather()
            if not batch:
                continue
            try:
                answers = await loop.run_in_executor(self._thread, self.run, [w.request for w in batch])
            except asyncio.CancelledError:
                for waiting in batch:
                    waiting.answer.cancel()
                raise
            except Exception as error:  # whatever the model raises is the answer
                for waiting in batch:
                    _fail(waiting.answer, error)
                continue
            for waiting, answer in zip(batch, answers, strict=True):
                if not waiting.answer.done():  # its client may have left
                    waiting.answer.set_result(answer)

    async def _gather(self) -> list[_Waiting[Request, Answer]]:
        """The next batch: what waits already, then what comes within ``max_wait_ms``."""
        first, self._left = self._left or await self._queue.get(), None
        batch, rows = [first], first.rows
        until = first.since + self.limits.max_wait_ms / 1000
        while rows < self.limits.max_rows:
            try:
                left = max(0.0, until - time.monotonic())
                next_one = (
                    self._queue.get_nowait()
                    if not left
                    else await asyncio.wait_for(self._queue.get(), left)
                )
            except (asyncio.QueueEmpty, TimeoutError):
                break
            if rows + next_one.rows > self.limits.max_rows:
                self._left = next_one
                break
            batch.append(next_one)
            rows += next_one.rows
        self.queued_rows -= rows
        return [waiting for waiting in batch if not self._expired(waiting)]

    def _expired(self, waiting: _Waiting[Request, Answer]) -> bool:
        waited = 1000 * (time.monotonic() - waiting.since)
        if waiting.answer.done():
            return True
        if waited > self.limits.timeout_ms:
            _fail(waiting.answer, TimeoutError(f"waited {waited:.0f} ms"))
            return True
        return False


def _fail(answer: asyncio.Future[Answer], error: Exception) -> None:
    if not answer.done():
        answer.set_exception(error)
