r"""Discrete PCA in its general form, as the reference: encoder, alphabet quantizer and decoder per stage.

Stage l holds an encoder ``E_l [m, d]``, a bias ``b_l [m]``, an alphabet quantizer ``Q_l`` and a decoder
``D_l``, stored by rows as ``[m, d]``::

    r_0 = x - mu;   q_l = Q_l(E_l r_{l-1} + b_l);   r_l = r_{l-1} - D_l q_l;   x_hat = mu + sum_l D_l q_l

It contains residual quantization, product quantization, FSQ and PCA; :func:`codebook_stage`,
:func:`product_stage`, :func:`tied_stage` and :func:`pca_stage` build them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from torchrec_sid.quantizers import DiscretePca
from torchrec_sid.quantizers.digits import RoundDigits


class AlphabetQuantizer(Protocol):
    """Maps coordinates ``t: [N, m]`` to digits ``q: [N, m]``, both float32."""

    def __call__(self, t: Tensor) -> Tensor:
        """Quantize."""


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


class Stage(NamedTuple):
    """One stage of the general form."""

    encoder: Tensor
    """E, ``[m, d]``."""
    bias: Tensor
    """b, ``[m]``."""
    decoder: Tensor
    """D by rows, ``[m, d]``."""
    quantize: AlphabetQuantizer
    """Q."""


class StagesOutput(NamedTuple):
    """What :func:`run_stages` returns."""

    digits: tuple[Tensor, ...]
    """q_l per stage, ``[N, m_l]`` float32."""
    reconstruction: Tensor
    """``[N, d]``."""
    errors: Tensor
    """``[N, stages + 1]``: squared norm of r_0 (no stage), r_1, ..."""


def run_stages(x: Tensor, mean: Tensor, stages: Sequence[Stage]) -> StagesOutput:
    """Encode and decode ``x: [N, d]`` through any stages, exactly as the definition reads.

    Example:
        >>> v = torch.eye(2)
        >>> out = run_stages(torch.tensor([[3.0, 0.1]]), torch.zeros(2), [tied_stage(v, torch.ones(2))])
        >>> out.digits[0].tolist(), out.reconstruction.tolist()
        ([[1.0, 0.0]], [[1.0, 0.0]])
    """
    residual = x - mean
    digits, errors = [], [residual.square().sum(1)]
    for stage in stages:
        q = stage.quantize(residual @ stage.encoder.T + stage.bias)
        residual = residual - q @ stage.decoder
        digits.append(q)
        errors.append(residual.square().sum(1))
    return StagesOutput(tuple(digits), x - residual, torch.stack(errors, dim=1))


def tied_stage(directions: Tensor, scales: Tensor, alphabet: int = 3) -> Stage:
    """The tied form: ``D = V diag(s)``, ``E = diag(1/s) V^T``, no bias.

    Rounding is then the exact minimiser and 0 is always a choice, so no sample's error grows. One
    such stage with a bounding function in front is FSQ (arXiv 2309.15505).

    Args:
        directions: V^T, ``[m, d]`` orthonormal rows.
        scales: s, ``[m]``; a digit of scale 0 is always 0.
        alphabet: odd number of levels.
    """
    inverse = torch.where(scales > 0, 1 / scales.clamp(min=torch.finfo(scales.dtype).tiny), 0.0)
    return Stage(
        encoder=directions * inverse[:, None],
        bias=torch.zeros_like(scales),
        decoder=directions * scales[:, None],
        quantize=RoundDigits(alphabet),
    )


def codebook_stage(codebook: Tensor, used: Tensor | None = None) -> Stage:
    """Residual quantization: the nearest of the codewords ``[K, d]`` that are ``used`` (``[K]`` bool)."""
    stage = product_stage([codebook])
    if used is None:
        return stage
    return stage._replace(bias=stage.bias.masked_fill(~used, -torch.inf))


def product_stage(codebooks: Sequence[Tensor]) -> Stage:
    """Product quantization: a block-diagonal decoder, one one-hot block per part of the vector.

    Args:
        codebooks: per part of the vector, ``[K_p, d_p]``; a single part is residual quantization.
    """
    decoder = torch.block_diag(*codebooks)
    return Stage(
        encoder=decoder,
        bias=-decoder.square().sum(1) / 2,
        decoder=decoder,
        quantize=OneHot(tuple(len(c) for c in codebooks)),
    )


def pca_stage(directions: Tensor) -> Stage:
    """PCA: orthonormal directions ``[m, d]`` and no rounding."""
    return Stage(directions, directions.new_zeros(len(directions)), directions, Identity())


def stages_of(quantizer: DiscretePca) -> list[Stage]:
    """The fitted stages of a quantizer."""
    first = quantizer.first
    levels = range(len(quantizer.config.codebooks))
    stages = [codebook_stage(first.codebook(i), first.counts(i) > 0) for i in levels] if first else []
    widths = [m for m, _ in quantizer.config.stages]
    for rows, (_, alphabet) in zip(quantizer.basis.split(widths), quantizer.config.stages, strict=True):
        scales = rows.norm(dim=1)
        stages.append(tied_stage(rows / scales.clamp(min=1e-30)[:, None], scales, alphabet))
    return stages
