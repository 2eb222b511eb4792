"""Cutting jagged histories into tiles of bounded size whose cost follows the events."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# A group is padded to its longest member; members no shorter than 3/4 of it keep the padding under a third.
_SHORTEST_SHARE = 0.75


@dataclass(frozen=True)
class Group:
    """Users of similar length, handled together.

    Args:
        users: their indices.
        starts: first event of each.
        lengths: events of each; the first is the longest.
    """

    users: tuple[int, ...]
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

    @property
    def user_index(self) -> slice | list[int]:
        """Index of its users in a per-user tensor, a slice where they are consecutive."""
        first = self.users[0]
        if self.users == tuple(range(first, first + len(self.users))):
            return slice(first, first + len(self.users))
        return list(self.users)


def group_users(lengths: Sequence[int], tile_events: int) -> list[Group]:
    """Group users by length so that a group's padded size stays within ``tile_events``.

    Empty histories belong to no group. A history longer than a tile is a group of its own, to be read
    in pieces of ``tile_events``.
    """
    starts, at = [], 0
    for length in lengths:
        starts.append(at)
        at += length
    # The sort is stable, so that equal lengths keep their order and stay contiguous in memory.
    order = sorted((u for u in range(len(lengths)) if lengths[u]), key=lambda u: -lengths[u])
    groups: list[Group] = []
    members: list[int] = []

    def close() -> None:
        if members:
            groups.append(
                Group(tuple(members), tuple(starts[u] for u in members), tuple(lengths[u] for u in members))
            )

    for user in order:
        longest = lengths[members[0]] if members else lengths[user]
        full = (len(members) + 1) * longest > tile_events
        if members and (full or lengths[user] < _SHORTEST_SHARE * longest):
            close()
            members = []
        members.append(user)
    close()
    return groups


@dataclass(frozen=True)
class Tile:
    """Part of a group: events ``begin .. end - 1`` of each of its histories."""

    group: Group
    begin: int
    end: int

    @property
    def width(self) -> int:
        """Events per user, padding included."""
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

    def read(self, values: Tensor) -> Tensor:
        """``values: [E, ...]`` -> ``[g, width, ...]``; a view where the events are one rectangle."""
        group = self.group
        if group.is_block:
            first, count = group.starts[0], len(group.users) * group.longest
            block = values[first : first + count].unflatten(0, (len(group.users), group.longest))
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
    width = max(1, tile_events // len(group.users))
    for begin in range(0, group.longest, width):
        yield Tile(group, begin, min(begin + width, group.longest))
