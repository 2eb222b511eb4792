"""Independent random streams from one seed."""

from __future__ import annotations

import hashlib

import torch


def derived_generator(seed: int, purpose: str) -> torch.Generator:
    """A CPU generator for one purpose.

    ``Generator().manual_seed(0)`` draws the same numbers in every library, so a sample drawn with it is
    not random with respect to data that were made with it. Hashing the purpose in makes each stream
    independent of the others and of such data.

    Args:
        seed: any integer, usually a configuration's ``seed``.
        purpose: what the numbers are for, e.g. ``"residual_kmeans.seeding"``.

    Example:
        >>> a, b = derived_generator(0, "a"), derived_generator(0, "b")
        >>> bool(torch.rand(1, generator=a) == torch.rand(1, generator=b))
        False
    """
    digest = hashlib.sha256(f"{purpose}\n{seed}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
