"""A seeded 64-bit hash as a handful of in-place tensor operations."""

from __future__ import annotations

import torch
from torch import Tensor

_MASK64 = (1 << 64) - 1
# Two rounds of the splitmix64 finaliser (Steele, Lea, Flood 2014), as signed 64-bit constants.
_ROUND_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_ROUND_2 = 0x94D049BB133111EB - (1 << 64)


def splitmix64(state: int) -> int:
    """The full splitmix64 step on a Python integer: turns (seed, column) into a salt.

    Returns a signed 64-bit value, because that is what an int64 tensor takes as a scalar.
    """
    z = (state + 0x9E3779B97F4A7C15) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
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
