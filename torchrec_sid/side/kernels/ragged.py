"""Cutting jagged histories into tiles of bounded size whose cost follows the events."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# A group is padded to its longest member; members no shorter than 3/4 of it keep the padding under a third.
_SHORTEST_SHARE = 0.75
# Events of one user in a tile: a product adds them up one by one, and rounding grows with their number.
_LONGEST = 1024


@dataclass(frozen=True)
class Group:
    """Users of similar length with equally many rows (candidates, or queries), handled together.

    Args:
        first_rows: first row of each user.
        rows: rows of each user, the same for all.
        starts: first event of each.
        lengths: events of each; the first is the longest.
    """

    first_rows: tuple[int, ...]
    rows: int
    starts: tuple[int, ...]
    lengths: tuple[int, ...]

    @property
    def longest(self) -> int:
        """Events of the longest member."""
        return self.lengths[0]

    @property
    def is_block(self) -> bool:
        """Whether its events are one rectangle ``[users, longest]`` in memory."""
        return all(
            length == self.lengths[0] and start == self.starts[0] + i * self.lengths[0]
            for i, (start, length) in enumerate(zip(self.starts, self.lengths, strict=True))
        )

    def take(self, values: Tensor) -> Tensor:
        """``values: [N, ...]``, one per row -> those of the group ``[g, rows, ...]``."""
        return values[self._row_index(values.device)].unflatten(0, (len(self.lengths), self.rows))

    def put(self, target: Tensor, values: Tensor) -> None:
        """Write ``values: [g, rows, ...]`` into ``target: [N, ...]``: the inverse of :meth:`take`."""
        target[self._row_index(target.device)] = values.flatten(0, 1)

    def _row_index(self, device: torch.device) -> slice | Tensor:
        first, count = self.first_rows[0], len(self.first_rows)
        if self.first_rows == tuple(range(first, first + count * self.rows, self.rows)):
            return slice(first, first + count * self.rows)
        starts = torch.tensor(self.first_rows, device=device).unsqueeze(1)
        return (starts + torch.arange(self.rows, device=device)).flatten()


def group_users(lengths: Sequence[int], rows: Sequence[int], tile_events: int) -> list[Group]:
    """Group users by rows and length so that a tile of a group stays within ``tile_events``.

    Users without events or without rows belong to no group.
    """
    starts, first_rows = _starts(lengths), _starts(rows)
    # The sort is stable, so that equal lengths keep their order and stay contiguous in memory.
    order = sorted(
        (u for u in range(len(lengths)) if lengths[u] and rows[u]), key=lambda u: (-rows[u], -lengths[u])
    )
    groups: list[Group] = []
    members: list[int] = []

    def close() -> None:
        if members:
            groups.append(
                Group(
                    tuple(first_rows[u] for u in members),
                    rows[members[0]],
                    tuple(starts[u] for u in members),
                    tuple(lengths[u] for u in members),
                )
            )

    for user in order:
        first = members[0] if members else user
        full = (len(members) + 1) * min(_LONGEST, lengths[first]) > tile_events
        short = lengths[user] < _SHORTEST_SHARE * lengths[first]
        if members and (full or short or rows[user] != rows[first]):
            close()
            members = []
        members.append(user)
    close()
    return groups


def _starts(sizes: Sequence[int]) -> list[int]:
    starts, at = [], 0
    for size in sizes:
        starts.append(at)
        at += size
    return starts


@dataclass(frozen=True)
class Tile:
    """Events ``begin .. end - 1`` of every member of a group."""

    group: Group
    begin: int
    end: int

    @property
    def width(self) -> int:
        """Events per member, padding included."""
        return self.end - self.begin

    def index(self, device: torch.device) -> Tensor:
        """``[g, width]`` int64: rows of the events; padding repeats a real row."""
        starts = torch.tensor(self.group.starts, device=device).unsqueeze(1)
        last = torch.tensor(self.group.lengths, device=device).unsqueeze(1) - 1
        return starts + torch.minimum(torch.arange(self.begin, self.end, device=device), last)

    def valid(self, device: torch.device) -> Tensor | None:
        """``[g, width]`` bool: which slots are events; None where all are."""
        if self.group.lengths[-1] >= self.end:
            return None
        lengths = torch.tensor(self.group.lengths, device=device).unsqueeze(1)
        return torch.arange(self.begin, self.end, device=device) < lengths

    def seen(self, limits: Tensor | None, device: torch.device) -> Tensor | None:
        """``[g, 1 or rows, width]`` bool: which slots hold an event that a row sees; None where all do.

        Args:
            limits: ``[g, rows]``, events that each row sees, from the first; None: all.
            device: where.
        """
        valid = self.valid(device)
        seen = None if valid is None else valid.unsqueeze(1)
        if limits is None:
            return seen
        below = torch.arange(self.begin, self.end, device=device) < limits.unsqueeze(2)
        return below if seen is None else below & seen

    def read(self, values: Tensor) -> Tensor:
        """``values: [E, ...]`` -> ``[g, width, ...]``; a view where the events are one rectangle."""
        group = self.group
        if group.is_block:
            first, count = group.starts[0], len(group.starts) * group.longest
            block = values[first : first + count].unflatten(0, (len(group.starts), group.longest))
            return block[:, self.begin : self.end]
        return values[self.index(values.device)]

    def write(self, target: Tensor, values: Tensor) -> None:
        """The inverse of :meth:`read`: ``values: [g, width, ...]`` into ``target: [E, ...]``."""
        group = self.group
        if group.is_block:
            self.read(target).copy_(values)
            return
        valid = self.valid(target.device)
        index = self.index(target.device)
        if valid is None:
            target[index.flatten()] = values.flatten(0, 1)
        else:
            target[index[valid]] = values[valid]


def tiles(group: Group, tile_events: int) -> Iterator[Tile]:
    """The tiles of a group, each of at most ``tile_events`` slots."""
    width = max(1, min(_LONGEST, tile_events // len(group.starts)))
    for begin in range(0, group.longest, width):
        yield Tile(group, begin, min(begin + width, group.longest))
