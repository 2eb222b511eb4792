"""The planted truth of a synthetic log: every property of an item or user is a hash of its number.

Nothing is stored, so that 10**7 items cost no memory, and two passes see the same world.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from torchrec_sid.data.parquet import Array
from torchrec_sid.errors import SidError
from torchrec_sid.hashing import hash64, uniform

LATENT = 8
"""Dimensions of an item's own latent vector, beyond its topic and subtopic."""

# One stream of numbers per property.
_TOPIC, _SUBTOPIC, _POPULARITY, _LATENT, _QUIRK, _CATEGORY, _LIKES_TOPIC, _LIKES_SUBTOPIC, _LIKES, _BUSY = (
    range(10)
)


@dataclass(frozen=True)
class SyntheticConfig:
    """A log with a planted hierarchy: topics, subtopics, items, and users with tastes over all three."""

    items: int = 5_000
    """10**3 to 10**7."""
    users: int = 3_000
    """Number of users; how often each acts follows a power law."""
    events: int = 300_000
    """Events in all, in order of time."""
    topics: int = 16
    """Topics; the k-th most frequent has a share of items ~ 1 / sqrt(k)."""
    subtopics: int = 8
    """Subtopics per topic."""
    dim: int = 64
    """Dimensions of each embedding."""
    sources: tuple[str, ...] = ("content", "image")
    """Embedding sources; each shows topic and subtopic, and favours other parts of the item's latent."""
    noise: float = 0.3
    """Length of the embedding's noise, beside 0.67 for the topic, 0.5 the subtopic, 0.45 the item."""
    category_noise: float = 0.1
    """Share of items whose ``category`` names a random topic."""
    popularity: float = 0.8
    """Exponent of the items' popularity by rank."""
    activity: float = 0.6
    """Exponent of the users' activity by rank."""
    max_history: int = 10_000
    """Expected events of the most active user, at most."""
    new_items: float = 0.4
    """Share of items that arrive during the log, evenly; the others are there from the start."""
    freshness: float = 0.15
    """Share of events that go to items that arrived within the last 5% of the log's time."""
    topic_signal: float = 1.0
    """How much the label's log-odds depend on the user's taste for the topic."""
    subtopic_signal: float = 0.8
    """Likewise for the subtopic."""
    item_signal: float = 0.8
    """Likewise for the item's latent, which its embeddings show in part."""
    quality_signal: float = 0.8
    """How much they depend on the item alone: half shown by its embeddings, half by its events only."""
    taste_days: int = 0
    """Days after which a user's tastes are drawn anew, each user's on a day of their own; 0: they last."""
    bias: float = -0.6
    """Log-odds where all else is 0."""
    days: int = 90
    """Length of the log."""
    start: int = 1_700_000_000
    """Time of the first event, seconds since 1970."""
    seed: int = 0
    """Of everything."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "sources", tuple(self.sources))
        for name in ("items", "users", "events", "topics", "subtopics", "dim", "max_history", "days"):
            if getattr(self, name) < 1:
                raise SidError(name, f"{getattr(self, name)}", "Choose 1 or more.")
        if self.taste_days < 0:
            raise SidError("taste_days", f"{self.taste_days}", "Choose days, or 0 for tastes that last.")
        for name in ("new_items", "freshness", "category_noise"):
            if not 0 <= getattr(self, name) < 1:
                raise SidError(name, f"{getattr(self, name)}", "Choose a share from 0 to below 1.")
        if self.noise < 0 or not self.sources or len(set(self.sources)) < len(self.sources):
            raise SidError("sources, noise", f"{self.sources}, {self.noise}", "Name each source once.")
        if self.events > self.users * self.max_history:
            raise SidError(
                "events", f"{self.events} for {self.users} users", f"Each has {self.max_history} at most."
            )


@dataclass(frozen=True)
class World:
    """Properties of items and users by number, as arrays."""

    config: SyntheticConfig

    @cached_property
    def topic_ends(self) -> Array:
        """``[topics]`` float64 cumulative share of items by topic."""
        share = 1 / np.sqrt(np.arange(1, self.config.topics + 1))
        return np.cumsum(share / share.sum())

    @property
    def old_items(self) -> int:
        """Items that are there from the start: numbers below this."""
        return self.config.items - int(self.config.items * self.config.new_items)

    @property
    def seconds(self) -> int:
        """Length of the log."""
        return self.config.days * 86_400

    def topic(self, item: Array) -> Array:
        """``[n]`` -> ``[n]`` int64."""
        found = np.searchsorted(self.topic_ends, self._uniform(_TOPIC, item), side="right")
        return np.minimum(found, self.config.topics - 1)

    def subtopic(self, item: Array) -> Array:
        """``[n]`` -> ``[n]`` int64 within the topic."""
        return (self._uniform(_SUBTOPIC, item) * self.config.subtopics).astype(np.int64)

    def category(self, item: Array) -> Array:
        """``[n]`` -> ``[n]`` int64: the topic, or a random one."""
        draw = self._uniform(_CATEGORY, item)
        wrong = (draw / max(self.config.category_noise, 1e-12) * self.config.topics).astype(np.int64)
        return np.where(draw < self.config.category_noise, wrong, self.topic(item))

    def popularity(self, item: Array) -> Array:
        """``[n]`` -> ``[n]`` float64 weight; sorted, it falls as rank ** -popularity."""
        return np.maximum(self._uniform(_POPULARITY, item), 1e-12) ** -self.config.popularity

    def latent(self, item: Array) -> Array:
        """``[n]`` -> ``[n, LATENT]`` float32, near standard normal."""
        return self._normals(_LATENT, item)

    def arrival(self, item: Array) -> Array:
        """``[n]`` -> ``[n]`` int64: seconds since the start of the log; new items arrive in order."""
        new = self.config.items - self.old_items
        return np.maximum(item - self.old_items + 1, 0) * self.seconds // (new + 1)

    def activity(self, user: Array) -> Array:
        """``[n]`` -> ``[n]`` float64 weight."""
        return np.maximum(self._uniform(_BUSY, user), 1e-12) ** -self.config.activity

    def tasting(self, user: Array, ts: Array) -> Array:
        """``[n]`` users, seconds since the start -> ``[n]`` int64: whose tastes they have at that time, as
        a number to ask :meth:`likes_topic` and :meth:`log_odds` about; the user's own while tastes last."""
        days = self.config.taste_days
        if not days:
            return user
        return np.asarray(user + ((ts // 86_400 + user % days) // days << 40), np.int64)

    def likes_topic(self, user: Array, topic: Array) -> Array:
        """``[n]``, ``[n]`` -> ``[n]`` float32, near standard normal."""
        return _normal(self._bits(_LIKES_TOPIC, user, topic))

    def log_odds(self, user: Array, item: Array) -> Array:
        """Log-odds of label 1 for pairs ``[n]``, ``[n]`` -> ``[n]`` float64."""
        c = self.config
        topic, subtopic, latent = self.topic(item), self.subtopic(item), self.latent(item)
        finest = _normal(self._bits(_LIKES_SUBTOPIC, user, topic * c.subtopics + subtopic))
        own = (self._normals(_LIKES, user) * latent).sum(1) / np.sqrt(LATENT)
        quirk = _normal(self._bits(_QUIRK, item))
        quality = (latent.sum(1) / np.sqrt(LATENT) + quirk) / np.sqrt(2)
        return (
            c.bias
            + c.topic_signal * self.likes_topic(user, topic)
            + c.subtopic_signal * finest
            + c.item_signal * own
            + c.quality_signal * quality
        ).astype(np.float64)

    def _bits(self, stream: int, *keys: Array) -> Array:
        return hash64(self.config.seed * 16 + stream, *keys)

    def _uniform(self, stream: int, key: Array) -> Array:
        return uniform(self.config.seed * 16 + stream, key)

    def _normals(self, stream: int, key: Array) -> Array:
        keys = (key[:, None] * LATENT + np.arange(LATENT)).ravel()
        return _normal(self._bits(stream, keys)).reshape(len(key), LATENT)


def _normal(bits: Array) -> Array:
    """64 random bits -> near standard normal float32: the sum of four 16-bit uniforms (Irwin-Hall)."""
    low = np.uint64(0xFFFF)
    total = sum(((bits >> np.uint64(16 * i)) & low).astype(np.float32) for i in range(4))
    return np.asarray((total / np.float32(65536) - 2) * np.float32(3**0.5), np.float32)
