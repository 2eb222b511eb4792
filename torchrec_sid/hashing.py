"""Seeded 64-bit hashes: splitmix64 (Steele, Lea, Flood 2014) on integers, tensors, arrays; ids of texts."""

from __future__ import annotations

from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
# A tensor takes the two rounds of the finaliser as signed scalars.
_ROUND_1 = _MIX_1 - (1 << 64)
_ROUND_2 = _MIX_2 - (1 << 64)


def splitmix64(state: int) -> int:
    """The full splitmix64 step on a Python integer: turns (seed, column) into a salt.

    Returns a signed 64-bit value, because that is what an int64 tensor takes as a scalar.
    """
    z = (state + _GOLDEN) & _MASK64
    z = ((z ^ (z >> 30)) * _MIX_1) & _MASK64
    z = ((z ^ (z >> 27)) * _MIX_2) & _MASK64
    z ^= z >> 31
    return z - (1 << 64) if z >> 63 else z


def hash_rows_(keys: Tensor, salt: int, rows: int) -> Tensor:
    """Overwrite ``keys`` ``[n]`` int64 by well-mixed rows ``0 .. rows - 1``; returns ``keys``.

    The high 32 bits of the mixed key are scaled to the range by a multiplication, which is a third of
    the cost of a remainder. A row is hit with probability 1 / rows up to a relative rows / 2**32.

    Args:
        keys: overwritten; must own its memory.
        salt: from :func:`splitmix64`; another salt gives an independent hash.
        rows: number of rows, 1 to 2**31 - 1.

    Example:
        >>> hash_rows_(torch.arange(4), splitmix64(0), 1000).tolist()
        [281, 916, 645, 484]
    """
    scratch = torch.empty_like(keys)
    keys.add_(salt)
    # int64 shifts are arithmetic: the mask makes them logical, as the hash needs.
    torch.bitwise_right_shift(keys, 30, out=scratch)
    keys.bitwise_xor_(scratch.bitwise_and_((1 << 34) - 1)).mul_(_ROUND_1)
    torch.bitwise_right_shift(keys, 27, out=scratch)
    keys.bitwise_xor_(scratch.bitwise_and_((1 << 37) - 1)).mul_(_ROUND_2)
    keys.bitwise_right_shift_(32).bitwise_and_((1 << 32) - 1)
    return keys.mul_(rows).bitwise_right_shift_(32)


def hash64(seed: int, *keys: NDArray[Any] | int) -> NDArray[np.uint64]:
    """Counter-based random numbers: 64 bits that depend on what they are for, and on nothing else.

    Args:
        seed: chooses the stream.
        keys: arrays ``[n]`` of any integer dtype, or integers, that broadcast.

    Returns:
        ``[n]`` uint64.
    """
    state = np.full(1, seed * _GOLDEN & _MASK64, np.uint64)
    for key in keys:
        x = state + (np.atleast_1d(key).astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(_MIX_1)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(_MIX_2)
        state = x ^ (x >> np.uint64(31))
    return state


def uniform(seed: int, *keys: NDArray[Any] | int) -> NDArray[np.float64]:
    """Uniform float64 in [0, 1), as :func:`hash64`."""
    return (hash64(seed, *keys) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def text_id(text: str) -> int:
    """An integer 0 .. 2**63 - 1 for a text, the same on every machine: the upper bits of its BLAKE2b.

    Example:
        >>> text_id("sku-1")
        7409758481748834931
    """
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
