"""Digits: rounding to an odd alphabet, and encoding and comparing in digit space.

Stage by stage, the residual is needed only through its coordinates ``t = E r``. Those of all stages
come from the first residual at once, ``T = r E^T``; when a stage has chosen its digits q, the later
columns move by ``- q D^T E^T``, a product of the size of the digits, not of the embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from torchrec_sid.errors import SidError


@dataclass(frozen=True)
class RoundDigits:
    """Round to the integers ``-h .. h``, ``h = (alphabet - 1) / 2``.

    Args:
        alphabet: odd number of levels, at least 3; 3 makes trits.

    Example:
        >>> RoundDigits(3)(torch.tensor([[-2.0, 0.4, 0.6]])).tolist()
        [[-1.0, 0.0, 1.0]]
    """

    alphabet: int = 3

    def __post_init__(self) -> None:
        if self.alphabet < 3 or self.alphabet % 2 == 0:
            raise SidError(
                "alphabet", f"{self.alphabet} levels", "Use an odd number, 3 or more: 0 must be a digit."
            )

    @property
    def half(self) -> int:
        """h, the largest digit."""
        return (self.alphabet - 1) // 2

    def __call__(self, t: Tensor) -> Tensor:
        """The nearest digit; adding 0.0 turns the -0.0 of a rounded small negative into 0.0."""
        return t.round().clamp(-self.half, self.half) + 0.0


class DigitLevels(NamedTuple):
    """What :func:`encode_digits` returns."""

    digits: Tensor
    """q, ``[N, C]`` float32, centred on 0."""
    errors: Tensor
    """``[N, C]`` float32: squared norm of the residual after each digit."""


def encode_digits(residual: Tensor, basis: Tensor, stages: Sequence[tuple[int, int]]) -> DigitLevels:
    """Tied stages over residuals ``[N, d]``.

    Args:
        residual: embeddings minus the mean (and minus codewords, where there are codebook stages).
        basis: ``[C, d]``, directions times scales; a zero row is a digit that is always 0.
        stages: ``(m, alphabet)`` per stage; rows of one stage are orthogonal.
    """
    energy = basis.square().sum(1)
    inverse = torch.where(energy > 0, 1 / energy.clamp(min=torch.finfo(energy.dtype).tiny), 0.0)
    encoder = basis * inverse[:, None]
    coordinates = residual @ encoder.T
    overlap = basis @ encoder.T
    digits, gains = [], []
    start = 0
    for width, alphabet in stages:
        stop = start + width
        t = coordinates[:, start:stop]
        q = RoundDigits(alphabet)(t)
        if stop < len(basis):
            coordinates[:, stop:].addmm_(q, overlap[start:stop, stop:], alpha=-1)
        digits.append(q)
        # |r|^2 - |r - s v q|^2 = s^2 (2 t q - q^2), never negative because |t| >= |q| - 1/2.
        gains.append(energy[start:stop] * q * (2 * t - q))
        start = stop
    left = residual.square().sum(1, keepdim=True) - torch.cat(gains, dim=1).cumsum(1)
    return DigitLevels(torch.cat(digits, dim=1), left.clamp(min=0))


def code_tables(basis: Tensor, alphabets: Sequence[int]) -> tuple[Tensor, ...]:
    """Per digit, the vectors ``[K, d]`` that its codes 0 .. K - 1 stand for."""
    return tuple(
        torch.arange(-(a // 2), a // 2 + 1, device=basis.device)[:, None] * row
        for a, row in zip(alphabets, basis, strict=True)
    )


def gram_similarity(digits: Tensor, others: Tensor, basis: Tensor, *, cosine: bool) -> Tensor:
    """``q D^T D q'`` of digits ``[N, C]`` and ``[M, C]``, over the norms if ``cosine``: ``[N, M]``.

    Exact: directions repeat, so equal digits must be weighed by how their directions overlap.
    """
    gram = basis @ basis.T
    left = digits @ gram
    products = left @ others.T
    if not cosine:
        return products
    norm = (left * digits).sum(1).clamp(min=0).sqrt()
    other_norm = ((others @ gram) * others).sum(1).clamp(min=0).sqrt()
    return products / (norm[:, None] * other_norm).clamp(min=torch.finfo(products.dtype).tiny)
