"""Negatives for logs that hold only positives, drawn from the past of the log alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from torchrec_sid.data.parquet import Array
from torchrec_sid.errors import SidError

_ROUNDS = 256
_PIECE = 1 << 16


@dataclass(frozen=True)
class NegativeSampling:
    """How negatives are drawn for each positive of a log that has no label 0.

    For a positive (user, item, ts), positions are drawn uniformly among the events at time ts and the
    last ``window`` events before it, and the item at a position is accepted with probability
    ``count ** (power - 1)``, its number of events there. So an item is drawn in proportion to
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

    Args:
        config: the scheme.
        log_items: ``[E]`` int32 item of every event of the log, in order of time (may be mapped).
        log_ts: ``[E]`` int64 its time, non-decreasing.
        items: N.
        seed: of the draws.
    """

    def __init__(
        self, config: NegativeSampling, log_items: Array, log_ts: Array, items: int, seed: int
    ) -> None:
        self.config, self.log_items, self.log_ts = config, log_items, log_ts
        self._random = np.random.default_rng([seed, 0x6E6567])
        self._counts = np.zeros(items, np.int32)
        self._begin = self._end = 0

    def draw(self, begin: int, end: int) -> Negatives:
        """Negatives for the events at positions ``begin .. end`` of the log; call in order."""
        pieces = range(begin, end, _PIECE)
        drawn = [self._draw(b, min(b + _PIECE, end)) for b in pieces]
        positive = [d.positive + b - begin for b, d in zip(pieces, drawn, strict=True)]
        return Negatives(np.concatenate(positive), np.concatenate([d.item for d in drawn]))

    def _draw(self, begin: int, end: int) -> Negatives:
        ts = np.asarray(self.log_ts[begin:end])
        # All events of the same time belong to the window: at day resolution their order means nothing.
        stop = np.searchsorted(self.log_ts, ts, side="right")
        start = np.maximum(np.searchsorted(self.log_ts, ts, side="left") - self.config.window, 0)
        self._advance(int(start[0]), int(stop[0]))
        each = self.config.per_positive
        positive = np.repeat(np.arange(end - begin), each)
        own = np.repeat(np.asarray(self.log_items[begin:end]), each)
        item = np.full(len(positive), -1, np.int32)
        open_ = np.arange(len(positive))
        for _ in range(_ROUNDS):
            at = positive[open_]
            spot = start[at] + (self._random.random(len(at)) * (stop[at] - start[at])).astype(np.int64)
            drawn = self.log_items[spot]
            chance = np.maximum(self._counts[drawn], 1) ** (self.config.power - 1)
            taken = (drawn != own[open_]) & (self._random.random(len(at)) < chance)
            item[open_[taken]] = drawn[taken]
            open_ = open_[~taken]
            if not len(open_):
                break
        found = item >= 0
        return Negatives(positive[found], item[found])

    def _advance(self, begin: int, end: int) -> None:
        """Move the counts to the events ``begin .. end``."""
        for first, last, sign in ((self._end, end, 1), (self._begin, begin, -1)):
            for piece in range(first, last, _PIECE):
                items, counts = np.unique(
                    self.log_items[piece : min(piece + _PIECE, last)], return_counts=True
                )
                self._counts[items] += sign * counts.astype(np.int32)
        self._begin, self._end = begin, end
