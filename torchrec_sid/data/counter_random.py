"""Counter-based random numbers: a hash of what they are for, so that nothing else can change them."""

from __future__ import annotations

import numpy as np

from torchrec_sid.data.parquet import Array

_GOLDEN = 0x9E3779B97F4A7C15


def hash64(seed: int, *keys: Array | int) -> Array:
    """64 random bits for each combination of integer keys, by splitmix64 (Steele et al. 2014).

    Args:
        seed: chooses the stream.
        keys: arrays ``[n]`` of any integer dtype, or integers, that broadcast.

    Returns:
        ``[n]`` uint64.
    """
    state = np.full(1, seed * _GOLDEN % 2**64, np.uint64)
    for key in keys:
        x = state + (np.atleast_1d(key).astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = x ^ (x >> np.uint64(31))
    return state


def uniform(seed: int, *keys: Array | int) -> Array:
    """Uniform float64 in [0, 1), as :func:`hash64`."""
    return (hash64(seed, *keys) >> np.uint64(11)).astype(np.float64) * 2.0**-53
