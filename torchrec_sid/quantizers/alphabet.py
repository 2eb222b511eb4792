"""Alphabet quantizers: from the real coordinates of a stage to its digits.

An alphabet quantizer is the Q_l of Discrete PCA (see :mod:`torchrec_sid.quantizers.dpca_stages`). The
same three classes make the family of quantizers that it contains: rounding to an odd number of levels
(Discrete PCA, FSQ), one-hot argmax in blocks (residual and product quantization), identity (PCA).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from torchrec_sid.errors import SidError


class AlphabetQuantizer(Protocol):
    """Maps coordinates ``t: [N, m]`` to digits ``q: [N, m]``, both float32."""

    def __call__(self, t: Tensor) -> Tensor:
        """Quantize."""


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


@dataclass(frozen=True)
class OneHot:
    """One-hot of the largest coordinate in each of several blocks.

    With ``E = D^T`` and ``b_k = -|d_k|^2 / 2`` the largest coordinate is the nearest codeword, so that
    one block is a level of residual quantization and several blocks are product quantization.

    Args:
        blocks: codewords per block; they sum to m.
    """

    blocks: tuple[int, ...]

    def __call__(self, t: Tensor) -> Tensor:
        """One 1 per block."""
        parts = [F.one_hot(b.argmax(dim=1), b.shape[1]) for b in t.split(self.blocks, dim=1)]
        return torch.cat(parts, dim=1).to(t.dtype)


@dataclass(frozen=True)
class Identity:
    """Keep the coordinates: a stage is then a step of plain PCA."""

    def __call__(self, t: Tensor) -> Tensor:
        """Nothing to do."""
        return t


class Scale(NamedTuple):
    """What :func:`lloyd_max_scale` finds."""

    scale: float
    """s, the step between digits; 0 where the coordinate is constantly 0."""
    error: float
    """E[(t - s q)^2] over E[t^2]; 0 where E[t^2] is 0."""


def lloyd_max_scale(t: Tensor, alphabet: int = 3) -> Scale:
    """The step s that minimises ``E[(t - s q)^2]`` for uniform odd levels ``q = round(t / s)``.

    For trits the optimum is found exactly: the coordinates that become non-zero are the i largest in
    magnitude for some i, their best s is their mean magnitude, and the error falls by
    ``(sum of them)^2 / i``; the best of all i satisfies Lloyd-Max's fixed point
    ``s = E[|t| : |t| > s / 2]`` (a Gaussian gives 1.224 sigma). Longer alphabets iterate the fixed point
    ``s = E[t q] / E[q^2]`` from several starts and keep the best.

    Args:
        t: ``[N]`` float, coordinates with mean about 0.
        alphabet: odd number of levels.
    """
    magnitude = t.detach().abs().double()
    energy = float(magnitude.square().mean())
    if energy == 0.0:
        return Scale(0.0, 0.0)
    if alphabet == 3:
        total = magnitude.sort(descending=True).values.cumsum(0)
        count = torch.arange(1, len(total) + 1, dtype=total.dtype, device=total.device)
        gain = total.square() / count
        best = int(gain.argmax())
        return Scale(float(total[best] / count[best]), 1.0 - float(gain[best]) / len(t) / energy)
    half = RoundDigits(alphabet).half
    candidates = [_fixed_point(magnitude, start, half) for start in _starts(magnitude, half)]
    scale, error = min(candidates, key=lambda pair: pair[1])
    return Scale(scale, error / energy)


def _starts(magnitude: Tensor, half: int) -> list[float]:
    """Steps that put the outermost level between 1.2 sigma and the largest coordinate."""
    sigma = float(magnitude.square().mean().sqrt())
    largest = float(magnitude.max())
    reach = [1.2 * sigma, 1.8 * sigma, 2.4 * sigma, 3.2 * sigma, largest]
    return sorted({min(r, largest) / half for r in reach})


def _fixed_point(magnitude: Tensor, scale: float, half: int, iterations: int = 30) -> tuple[float, float]:
    for _ in range(iterations):
        q = (magnitude / scale).round().clamp(max=half)
        weight = float(q.square().sum())
        if weight == 0.0:
            break
        new = float((magnitude * q).sum()) / weight
        if abs(new - scale) <= 1e-7 * scale:
            break
        scale = new
    q = (magnitude / scale).round().clamp(max=half)
    return scale, float((magnitude - scale * q).square().mean())
