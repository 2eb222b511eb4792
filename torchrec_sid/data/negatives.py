"""Negatives for logs that hold only positives, drawn from the past of the log alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from torchrec_sid.data.parquet import Array
from torchrec_sid.errors import SidError
from torchrec_sid.hashing import uniform

_TURNS = 1024
_PIECE = 1 << 16


@dataclass(frozen=True)
class NegativeSampling:
    """How negatives are drawn for each positive of a log that has no label 0.

    For a positive (user, item, ts), positions are drawn uniformly among the events at time ts and the
    last ``window`` events before it, and the item at a position is accepted with probability
    ``count ** (power - 1)``, its number of events there: an item is drawn in proportion to
    ``count ** power`` of the recent past only: never before its own first event, never before its
    release, and never for a user's positive on itself.

    The window is short on purpose. Drawn from the whole past, an item is a negative as often as it was
    popular over years, while it is a positive as often as it is popular now: being new would give the
    label away (docs/data.md has the measurement).
    """

    per_positive: int = 4
    """Negatives for each positive."""
    power: float = 1.0
    """0 draws uniformly among the items of the window, 1 in proportion to their events; below 1, popular
    items are positive more often than not popular ones, and a model can earn by popularity."""
    window: int = 1 << 11
    """Events before the positive's time that are drawn from, beside all events at that time."""

    def __post_init__(self) -> None:
        if self.per_positive < 1:
            raise SidError("per_positive", f"{self.per_positive}", "Draw at least one negative.")
        if not 0 <= self.power <= 1:
            raise SidError("power", f"{self.power}", "Choose a power from 0 to 1.")
        if self.window < 1:
            raise SidError("window", f"{self.window}", "Look back at one event or more.")


class Negatives(NamedTuple):
    """What :meth:`NegativeSampler.draw` returns, ordered by positive."""

    positive: Array
    """``[m]`` int64: the position of the positive each was drawn for, counted from ``begin``."""
    item: Array
    """``[m]`` int32 dense item index."""


class NegativeSampler:
    """Draws negatives for positives in order of time.

    Every draw is a hash of the positive's row and of nothing else, so that the negatives of an event
    are the same whatever comes after it.

    Args:
        config: the scheme.
        log_items: ``[E]`` int32 item of every event of the log, in order of time (may be mapped).
        log_ts: ``[E]`` int64 its time, non-decreasing.
        seed: of the draws.
    """

    def __init__(self, config: NegativeSampling, log_items: Array, log_ts: Array, seed: int) -> None:
        self.config, self.log_items, self.log_ts, self.seed = config, log_items, log_ts, seed
        self._counter = _Counter(log_items, 0, 0)

    def draw(self, begin: int, rows: Array) -> Negatives:
        """Negatives for the events at positions ``begin ..`` of the log; call in order of time.

        Args:
            begin: position of the first.
            rows: ``[n]`` int64, what identifies each event.
        """
        pieces = range(0, len(rows), _PIECE)
        drawn = [self._draw(begin + p, rows[p : p + _PIECE]) for p in pieces]
        positive = [d.positive + p for p, d in zip(pieces, drawn, strict=True)]
        return Negatives(np.concatenate(positive), np.concatenate([d.item for d in drawn]))

    def _draw(self, begin: int, rows: Array) -> Negatives:
        ts = self.log_ts[begin : begin + len(rows)]
        # All events of the same time belong to the window: at day resolution their order means nothing.
        stop = np.searchsorted(self.log_ts, ts, side="right")
        start = np.maximum(np.searchsorted(self.log_ts, ts, side="left") - self.config.window, 0)
        if self.config.power < 1 and not self._counter.covers(int(start[0]), int(stop[-1])):
            self._counter = _Counter(self.log_items, int(start[0]), int(stop[-1]))
        each = self.config.per_positive
        positive = np.repeat(np.arange(len(rows)), each)
        slot = np.tile(np.arange(each), len(rows))
        own = self.log_items[begin + positive]
        item = np.full(len(positive), -1, np.int32)
        todo = np.arange(len(positive))
        for turn in range(_TURNS):
            at = positive[todo]
            key = (rows[at], slot[todo], turn)
            spot = start[at] + (uniform(self.seed, *key, 0) * (stop[at] - start[at])).astype(np.int64)
            drawn = self.log_items[spot]
            taken = drawn != own[todo]
            if self.config.power < 1:
                chance = self._counter(drawn, start[at], stop[at]) ** (self.config.power - 1)
                taken &= uniform(self.seed, *key, 1) < chance
            item[todo[taken]] = drawn[taken]
            todo = todo[~taken]
            if not len(todo):
                break
        found = item >= 0
        return Negatives(positive[found], item[found])


class _Counter:
    """How often an item occurs in a range of positions, within ``begin .. end`` of the log."""

    def __init__(self, log_items: Array, begin: int, end: int) -> None:
        self.begin, self.end = begin, end
        # Sorted (item, position) pairs: a count is the distance of two binary searches.
        items = log_items[begin:end].astype(np.int64)
        self._places = np.sort(items * (end - begin) + np.arange(end - begin))

    def covers(self, begin: int, end: int) -> bool:
        return self.begin <= begin and end <= self.end

    def __call__(self, item: Array, start: Array, stop: Array) -> Array:
        """``[n]`` items, ``[n]`` ranges -> ``[n]`` float64 counts."""
        base = item.astype(np.int64) * (self.end - self.begin) - self.begin
        return (
            np.searchsorted(self._places, base + stop) - np.searchsorted(self._places, base + start)
        ).astype(np.float64)
