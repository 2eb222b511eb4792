"""The history store: every user's events in order of time, memory-mapped, addressed by ranges."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from torchrec_sid.data.appender import NpyAppender
from torchrec_sid.data.parquet import Array
from torchrec_sid.errors import ArtifactError

_COLUMNS = {"item": np.int32, "ts": np.int64, "action": np.int8}


class StoreWriter:
    """Appends events and the users they belong to.

    Args:
        folder: ``history/`` of a prepared log.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._columns = {name: NpyAppender(folder / f"{name}.npy", kind) for name, kind in _COLUMNS.items()}
        self._user = NpyAppender(folder / "user.npy", np.int64)
        self._offsets = NpyAppender(folder / "offsets.npy", np.int64)

    def __len__(self) -> int:
        return self._columns["item"].rows

    def append(self, item: Array, ts: Array, action: Array) -> int:
        """Add events ``[n]``; returns the position of the first."""
        begin = len(self)
        for name, values in (("item", item), ("ts", ts), ("action", action)):
            self._columns[name].append(values)
        return begin

    def users(self, user: Array, begin: Array) -> None:
        """Say where the log events of ``user [m]`` begin, in the order in which they were added."""
        self._user.append(user)
        self._offsets.append(begin)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._offsets.append(np.array([len(self)]))
        for column in (*self._columns.values(), self._user, self._offsets):
            column.__exit__(kind, error, trace)


@dataclass(frozen=True)
class HistoryStore:
    """Memory-mapped events, E of them; a history is a half-open range of positions."""

    item: Array
    """``[E]`` int32 dense item indices."""
    ts: Array
    """``[E]`` int64 seconds; ``NO_TIME`` where only the order is known."""
    action: Array
    """``[E]`` int8, what the user did."""
    user: Array
    """``[U]`` int64: users with log events."""
    offsets: Array
    """``[U + 1]`` int64: the events of ``user[k]`` are ``offsets[k] .. offsets[k + 1]``.

    Histories that were given as such (histories.parquet) stand before ``offsets[0]``.
    """

    @classmethod
    def open(cls, folder: Path) -> HistoryStore:
        """Map the files of a store.

        Raises:
            ArtifactError: a file is missing or truncated.
        """
        try:
            arrays = [np.load(folder / f"{n}.npy", mmap_mode="r") for n in (*_COLUMNS, "user", "offsets")]
        except (OSError, ValueError, EOFError) as error:
            raise ArtifactError(
                str(folder), f"not a complete store ({error})", "Prepare the log again."
            ) from error
        if len({len(a) for a in arrays[:3]}) > 1 or int(arrays[4][-1]) != len(arrays[0]):
            raise ArtifactError(str(folder), "its files disagree in length", "Prepare the log again.")
        return cls(*arrays)
