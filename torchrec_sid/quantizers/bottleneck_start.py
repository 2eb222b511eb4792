"""Where a gradient fit starts: the bottleneck at the closed-form solution for the first latents."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from torchrec_sid.quantizers.bottleneck import Bottleneck
from torchrec_sid.quantizers.dpca import DiscretePca, DiscretePcaConfig
from torchrec_sid.quantizers.dpca_encode import encode_digits
from torchrec_sid.quantizers.kmeans import cluster_sums
from torchrec_sid.quantizers.residual_kmeans import ResidualKMeans, ResidualKMeansConfig
from torchrec_sid.quantizers.usage import count_codes, usage_of

_MEASURED_ROWS = 8192
_LEAST_GAIN = 1e-3  # of the variance; a level below it is not judged


@torch.no_grad()
def start_bottleneck(bottleneck: Bottleneck, z: Tensor, *, rows_per_step: int, seed: int) -> None:
    """Residual k-means and closed-form digits on latents, as the state of a bottleneck.

    Args:
        bottleneck: overwritten.
        z: ``[S, d]`` latents of a sample of the items; a few hundred per code are plenty.
        rows_per_step: rows of a training step over all ranks, the unit of the moving averages.
        seed: of k-means.
    """
    first, basis = _closed_form(bottleneck, z, seed)
    step = rows_per_step / len(z)
    bottleneck.center.copy_(z.mean(0) if first is None else first.mean)
    residual = z - bottleneck.center
    bottleneck.variance.copy_(residual.square().sum(1).mean())
    chosen = None if first is None else first.encode(z)
    for level, size in enumerate(bottleneck.sizes):
        assert chosen is not None
        codes = chosen[:, level]
        sums = cluster_sums(residual, codes, size)
        bottleneck.get_buffer(f"count_{level}").copy_(sums.count * step)
        bottleneck.get_buffer(f"total_{level}").copy_(sums.total * step)
        bottleneck.prior[level] = sums.prior_count() * step
        bottleneck.codebook(level).copy_(sums.centroids(1.0))
        words = bottleneck.codebook(level)[codes]
        bottleneck.word_scale[level] = words.square().mean(0).sqrt()
        residual = residual - words
    bottleneck.basis.copy_(basis)
    if bottleneck.digit_stages:
        _start_moments(bottleneck, residual)
    bottleneck.start_perplexity.copy_(_perplexity_that_counts(bottleneck, z[:_MEASURED_ROWS]))


def _closed_form(bottleneck: Bottleneck, z: Tensor, seed: int) -> tuple[ResidualKMeans | None, Tensor]:
    if bottleneck.digit_stages:
        config = DiscretePcaConfig(
            stages=bottleneck.digit_stages, codebooks=bottleneck.sizes, sample_rows=len(z), seed=seed
        )
        digits = DiscretePca(bottleneck.dim, config, device=z.device)
        digits.fit(z)
        return digits.first, digits.basis
    kmeans = ResidualKMeans(
        bottleneck.dim,
        ResidualKMeansConfig(cardinalities=bottleneck.sizes, seed=seed, buffer_rows=len(z)),
        device=z.device,
    )
    kmeans.fit(z)
    return kmeans, bottleneck.basis


def _perplexity_that_counts(bottleneck: Bottleneck, z: Tensor) -> Tensor:
    """Perplexity per level, ``[L]``; 1 for a level that explains nothing, whose usage says nothing."""
    codes = bottleneck.encode(z)
    perplexity = usage_of(count_codes(codes, bottleneck.cardinalities)).perplexity
    left = [float((z - bottleneck.center).square().sum())]
    for depth in range(1, codes.shape[1] + 1):
        left.append(float((z - bottleneck.decode(codes[:, :depth])).square().sum()))
    gains = [before - after for before, after in pairwise(left)]
    return torch.tensor(
        [p if g > _LEAST_GAIN * left[0] else 1.0 for p, g in zip(perplexity, gains, strict=True)]
    )


def _start_moments(bottleneck: Bottleneck, residual: Tensor) -> None:
    """The moments of the digits that the start gives, so that the first updates do not forget it."""
    for part, rows, q in _stages(bottleneck, residual):
        bottleneck.cross[part] = (q.T @ residual).double() / len(residual)
        bottleneck.square[part, part] = (q.T @ q).double() / len(residual)
        residual = residual - q @ rows


def _stages(bottleneck: Bottleneck, residual: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    digits = encode_digits(residual, bottleneck.basis, bottleneck.digit_stages).digits
    start = 0
    for width, _ in bottleneck.digit_stages:
        part = slice(start, start + width)
        yield part, bottleneck.basis[part], digits[:, part]
        start += width
