"""The history store: every user's events in order of time, memory-mapped, addressed by ranges."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from torchrec_sid.artifact import read_array
from torchrec_sid.data.appender import NpyAppender
from torchrec_sid.data.encoding import Jagged
from torchrec_sid.data.parquet import Array
from torchrec_sid.errors import ArtifactError

_COLUMNS = {"item": np.int32, "ts": np.int64, "action": np.int8}
_ARRAYS: dict[str, Any] = {**_COLUMNS, "user": np.int64, "offsets": np.int64}
AGAIN = "Prepare the log again."


class StoreWriter:
    """Appends events and the users they belong to.

    Args:
        folder: of one bucket, ``history/BBBBB`` of a prepared log.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        self._columns = {name: NpyAppender(folder / f"{name}.npy", kind) for name, kind in _COLUMNS.items()}
        self._user = NpyAppender(folder / "user.npy", np.int64)
        self._offsets = NpyAppender(folder / "offsets.npy", np.int64)
        self._features: dict[str, NpyAppender] = {}
        self._last_user: int | None = None

    def __len__(self) -> int:
        return self._columns["item"].rows

    def append(self, user: Array, item: Array, ts: Array, action: Array) -> None:
        """Add events ``[n]`` of the log, by user and time."""
        begin = len(self)
        new = np.append(True, user[1:] != user[:-1]) if len(user) else np.zeros(0, bool)
        if len(user) and user[0] == self._last_user:
            new[0] = False
        self._user.append(user[new])
        self._offsets.append(begin + np.flatnonzero(new))
        self._last_user = int(user[-1]) if len(user) else self._last_user
        self.entries(item, ts, action)

    def entries(self, item: Array, ts: Array, action: Array) -> None:
        """Add entries ``[n]`` that belong to no user: given histories, after all events of the log."""
        for name, values in (("item", item), ("ts", ts), ("action", action)):
            self._columns[name].append(values)

    def features(self, found: dict[str, Array | Jagged]) -> None:
        """Add features of the events that :meth:`append` added last."""
        for key, values in found.items():
            if isinstance(values, Jagged):
                self._feature(f"{key}.values", values.values)
                self._feature(f"{key}.lengths", values.lengths)
            else:
                self._feature(key, values)

    def end_users(self) -> None:
        """Close the last user's range; entries may follow."""
        self._offsets.append(np.array([len(self)]))

    def _feature(self, name: str, values: Array) -> None:
        if name not in self._features:
            path = self._folder / f"{name}.npy"
            self._features[name] = NpyAppender(path, values.dtype, values.shape[1:])
        self._features[name].append(values)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for column in (*self._columns.values(), self._user, self._offsets, *self._features.values()):
            column.__exit__(kind, error, trace)


@dataclass(frozen=True)
class HistoryStore:
    """Memory-mapped events of one bucket, E of them; a history is a half-open range of positions."""

    item: Array
    """``[E]`` int32 dense item indices."""
    ts: Array
    """``[E]`` int64 seconds; ``NO_TIME`` where only the order is known."""
    action: Array
    """``[E]`` int8, what the user did."""
    user: Array
    """``[U]`` int64: dense indices of the users with log events, ascending."""
    offsets: Array
    """``[U + 1]`` int64: the events of ``user[k]`` are ``offsets[k] .. offsets[k + 1]``.

    Histories that were given as such (histories.parquet) stand after ``offsets[U]``.
    """
    folder: Path
    _features: dict[str, Array | Jagged] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path) -> HistoryStore:
        """Map the files of a store.

        Raises:
            ArtifactError: a file is missing or truncated.
        """
        arrays = [_mapped(folder, name) for name in (*_COLUMNS, "user", "offsets")]
        item, ts, action, user, offsets = arrays
        if len({len(item), len(ts), len(action)}) > 1 or len(offsets) != len(user) + 1:
            raise ArtifactError(str(folder), "its files disagree in length", AGAIN)
        if int(offsets[-1]) > len(item) or int(offsets[0]) < 0 or (np.diff(offsets) < 0).any():
            raise ArtifactError(str(folder), "its files disagree in length", AGAIN)
        return cls(item, ts, action, user, offsets, folder)

    def feature(self, key: str) -> Array | Jagged:
        """A feature of the log's events: ``[E]`` rows or float32, or several values an event.

        Raises:
            ArtifactError: it is not there.
        """
        if key not in self._features:
            found: Array | Jagged
            if (self.folder / f"{key}.values.npy").is_file():
                found = Jagged(*(_mapped(self.folder, f"{key}.{part}") for part in ("values", "lengths")))
            else:
                found = _mapped(self.folder, key)
            self._features[key] = found
        return self._features[key]


def _mapped(folder: Path, name: str) -> Any:
    where = folder / f"{name}.npy"
    if not where.is_file():
        raise ArtifactError(str(folder), f"not a complete store (no {where.name})", AGAIN)
    with where.open("rb") as file:
        array = read_array(file, str(where), AGAIN)
    if name in _ARRAYS and (array.dtype != _ARRAYS[name] or array.ndim != 1):
        raise ArtifactError(str(where), f"holds {array.dtype} of shape {array.shape}", AGAIN)
    return array
