"""Sums by key over a stream: counts for every key, vectors for all keys or a fair sample of them."""

from __future__ import annotations

import torch
from torch import Tensor

from torchrec_sid.spec import SidSpec


def prefix_keys(spec: SidSpec, codes: Tensor, depth: int) -> Tensor:
    """One int64 per prefix of codes ``[N, L]``, equal exactly for equal prefixes: ``[N]``.

    Prefixes beyond 63 bits are told apart by a hash: among 10^7 of them two differ unseen with a
    probability below 1e-5.
    """
    short = spec.truncated(depth)
    if short.fits_int64:
        return short.pack(codes[:, :depth], validate=False)
    key = torch.zeros(len(codes), dtype=torch.int64, device=codes.device)
    for level in range(depth):
        key = mix(key + codes[:, level] + 1)
    return key


def mix(key: Tensor) -> Tensor:
    """A bijection of int64 that spreads nearby keys (the finaliser of splitmix64, Steele et al. 2014)."""
    key = key - 0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as a signed number
    key = (key ^ _shift(key, 30)) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
    key = (key ^ _shift(key, 27)) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
    return key ^ _shift(key, 31)


def _shift(key: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (key >> bits) & ((1 << (64 - bits)) - 1)


class CountTable:
    """How often each int64 key was seen; 16 bytes per key."""

    def __init__(self) -> None:
        self.keys = torch.zeros(0, dtype=torch.int64)
        """``[G]`` int64, ascending."""
        self.counts = torch.zeros(0, dtype=torch.int64)
        """``[G]`` int64."""

    def add(self, keys: Tensor) -> None:
        """Count keys ``[n]``."""
        new, counts = keys.unique(return_counts=True)
        merged, place = torch.cat([self.keys, new]).unique(return_inverse=True)
        total = torch.zeros(len(merged), dtype=torch.int64)
        self.counts = total.index_add_(0, place, torch.cat([self.counts, counts]))
        self.keys = merged


class VectorTable:
    """Sum of the vectors of each key, for as many keys as memory allows.

    Exact while there are at most ``limit`` keys. Beyond, whole keys are dropped by a hash of the key, half
    of them at a time, so that those kept are a uniform sample of keys, each with all of its vectors.

    Args:
        dim: d.
        limit: keys held at most.
    """

    def __init__(self, dim: int, limit: int) -> None:
        self.limit = limit
        self.share = 1.0
        """Share of keys kept, a power of 1/2."""
        self._keys = torch.zeros(0, dtype=torch.int64)  # ascending
        self._slots = torch.zeros(0, dtype=torch.int64)
        self.sums = torch.zeros(0, dim)
        """``[slots, d]`` float32."""
        self.counts = torch.zeros(0, dtype=torch.int64)
        """``[slots]`` int64."""
        self._drops = 0

    def add(self, keys: Tensor, vectors: Tensor) -> None:
        """Add vectors ``[n, d]`` to keys ``[n]``."""
        if self._drops:
            kept = self._kept(keys)
            keys, vectors = keys[kept], vectors[kept]
        unique, place = keys.unique(return_inverse=True)
        self._make_room(unique)
        at = self._slots[torch.searchsorted(self._keys, unique)] if len(unique) else place
        self.sums.index_add_(0, at[place], vectors)
        self.counts += torch.bincount(at[place], minlength=len(self.counts))
        while len(self._keys) > self.limit:
            self._drop()

    def _make_room(self, unique: Tensor) -> None:
        """Give each new key a slot at the end; those that exist stay where they are."""
        new = unique[~torch.isin(unique, self._keys, assume_unique=True)]
        fresh = torch.arange(len(self._keys), len(self._keys) + len(new))
        self._keys, order = torch.cat([self._keys, new]).sort()
        self._slots = torch.cat([self._slots, fresh])[order]
        if len(self._keys) > len(self.sums):
            # Doubling keeps the number of copies logarithmic.
            grow = max(len(self._keys), min(2 * len(self.sums), self.limit)) - len(self.sums)
            self.sums = torch.cat([self.sums, self.sums.new_zeros(grow, self.sums.shape[1])])
            self.counts = torch.cat([self.counts, self.counts.new_zeros(grow)])

    def _kept(self, keys: Tensor) -> Tensor:
        return (mix(keys) & ((1 << self._drops) - 1)) == 0

    def _drop(self) -> None:
        self._drops += 1
        self.share /= 2
        kept = self._kept(self._keys)
        slots = self._slots[kept]
        self._keys, self.sums, self.counts = self._keys[kept], self.sums[slots], self.counts[slots]
        self._slots = torch.arange(len(slots))
