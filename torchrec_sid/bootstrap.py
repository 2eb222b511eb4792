"""`UserBootstrap`: intervals for sums over examples, where the examples of one user go together.

Two events of one user are not two draws from the world: an interval has to resample users. Metrics here
are functions of sums over examples (a normalized entropy, a ratio of two of them), so each user is reduced
to its sums once, and a draw is a product of how often each user was drawn with these sums.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from torchrec_sid.errors import SidError

Array = np.ndarray[Any, Any]
_CHUNK = 64
"""Draws at a time: bounds memory at 64 x users."""


class Interval(NamedTuple):
    """A number, and what resampling says about it."""

    estimate: float
    """On the sample itself."""
    low: float
    """2.5th percentile of the draws."""
    high: float
    """97.5th percentile."""
    p: float
    """Two-sided: how often draws fall on the side of 0 that the estimate is not on, doubled. At least
    2 / (draws + 1)."""


class UserBootstrap:
    """Sums over examples, on the sample and on resamples of its users, as many as there are.

    All sums of one object see the same draws, so that a difference or a ratio of two of them is paired.

    Args:
        users: ``[rows]`` integers, the user of each example.
        draws: number of resamples.
        seed: of the draws.

    Raises:
        SidError: no example, or no draw.

    Example:
        >>> bootstrap = UserBootstrap(np.array([0, 0, 1, 2]), draws=100)
        >>> sums = bootstrap.sums({"loss": np.array([1.0, 1.0, 2.0, 2.0]), "rows": np.ones(4)})
        >>> float(sums["loss"][0]), sums["loss"].shape
        (6.0, (101,))
        >>> bootstrap.interval(sums["loss"] / sums["rows"]).estimate
        1.5
    """

    def __init__(self, users: Array, draws: int = 2000, seed: int = 0) -> None:
        if not len(users) or draws < 1:
            raise SidError(
                "bootstrap", f"{len(users)} examples, {draws} draws", "Give at least one of each."
            )
        self.draws, self.seed = draws, seed
        distinct, self._user = np.unique(users, return_inverse=True)
        self.users = len(distinct)

    def sums(self, values: Mapping[str, Array]) -> dict[str, Array]:
        """Name -> ``[1 + draws]`` float64: the sum over the sample, then over each resample.

        Args:
            values: name -> ``[rows]`` numbers.
        """
        names = list(values)
        per_user = np.stack(
            [
                np.bincount(self._user, weights=np.asarray(values[n], np.float64), minlength=self.users)
                for n in names
            ],
            axis=1,
        )
        found = np.empty((1 + self.draws, len(names)))
        found[0] = per_user.sum(axis=0)
        random = np.random.default_rng([self.seed, 0x75736572])
        for begin in range(0, self.draws, _CHUNK):
            size = min(_CHUNK, self.draws - begin)
            drawn = random.integers(self.users, size=(size, self.users))
            drawn += np.arange(size)[:, None] * self.users
            counts = np.bincount(drawn.ravel(), minlength=size * self.users).reshape(size, self.users)
            found[1 + begin : 1 + begin + size] = counts @ per_user
        return {name: found[:, column] for column, name in enumerate(names)}

    def over_seeds(self, values: Sequence[Array]) -> Array:
        """Mean over trainings that differ by seed, ``[1 + draws]`` each; draws resample the seeds too.

        Users and seeds are drawn independently (the pigeonhole bootstrap), so that the interval of the mean
        covers another set of users as well as another set of seeds. With one seed it covers users alone.
        """
        stacked = np.stack(list(values), axis=1)
        seeds = stacked.shape[1]
        weights = np.full((1 + self.draws, seeds), 1 / seeds)
        random = np.random.default_rng([self.seed, 0x73656564])
        drawn = random.integers(seeds, size=(self.draws, seeds)) + np.arange(self.draws)[:, None] * seeds
        weights[1:] = np.bincount(drawn.ravel(), minlength=self.draws * seeds).reshape(-1, seeds) / seeds
        return (stacked * weights).sum(axis=1)

    def interval(self, values: Array) -> Interval | None:
        """Of ``[1 + draws]`` numbers; None where the sample or a twentieth of the draws has no value."""
        sample, draws = float(values[0]), values[1:][np.isfinite(values[1:])]
        if not np.isfinite(sample) or len(draws) < 0.95 * self.draws:
            return None
        low, high = np.percentile(draws, [2.5, 97.5])
        side = min((draws <= 0).sum(), (draws >= 0).sum())
        return Interval(sample, float(low), float(high), min(1.0, 2 * float(side + 1) / (len(draws) + 1)))


def cross_entropy(logits: Array, labels: Array) -> Array:
    """``[rows]`` float64 in nats, of ``[rows]`` logits and labels 0 or 1."""
    logits = np.asarray(logits, np.float64)
    return np.logaddexp(0.0, logits) - labels * logits


def normalized_entropy(loss: Array, positives: Array, weight: Array) -> Array:
    """Of sums: cross-entropy, weight of the positives, weight of all rows; NaN where a label is missing."""
    with np.errstate(divide="ignore", invalid="ignore"):
        rate = positives / weight
        entropy = -(rate * np.log(rate) + (1 - rate) * np.log1p(-rate))
        return np.where((rate > 0) & (rate < 1), loss / weight / entropy, np.nan)
