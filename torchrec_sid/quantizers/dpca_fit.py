"""The closed-form fit of Discrete PCA: deterministic, without gradients, over a stream.

Per stage: the top m eigenvectors of the residual covariance are the directions, Lloyd-Max gives the
scales, and a few alternations between digits and decoder refine both. After the digits q are fixed, the
best tied decoder ``V diag(s)`` follows from two moments, ``M = E[r q^T]`` and ``S = E[q q^T]``::

    V <- polar(M diag(s)),   s_j <- (V^T M)_jj / S_jj

each of which lowers ``E|r - V diag(s) q|^2``. The residual covariance needs no further pass either::

    C' = C - D M^T - M D^T + D S D^T,   D = V diag(s)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from torchrec_sid.quantizers.digits import RoundDigits
from torchrec_sid.streams import EmbeddingStream

_DENSE_EIGEN_DIM = 512


class TiedStage(NamedTuple):
    """A fitted stage."""

    directions: Tensor
    """V^T, ``[m, d]`` float32, orthonormal rows."""
    scales: Tensor
    """s, ``[m]`` float32."""
    alphabet: int

    def digits(self, residual: Tensor) -> Tensor:
        """q, ``[N, m]``."""
        tiny = torch.finfo(self.scales.dtype).tiny
        inverse = torch.where(self.scales > 0, 1 / self.scales.clamp(min=tiny), 0.0)
        return RoundDigits(self.alphabet)(residual @ (self.directions * inverse[:, None]).T)

    def subtract(self, residual: Tensor) -> Tensor:
        """The next residual, ``[N, d]``."""
        return residual - self.digits(residual) @ (self.directions * self.scales[:, None])


class ResidualSource(Protocol):
    """Where a stage reads the residuals of the stages before it."""

    @property
    def sample(self) -> Tensor:
        """``[S, d]`` residuals in memory, for the starts of the scales."""

    def batches(self) -> Iterator[Tensor]:
        """One pass over residuals ``[n, d]``."""

    def advance(self, stage: TiedStage) -> None:
        """Subtract a fitted stage."""


class SampledResiduals:
    """Residuals of a bounded sample, kept in memory: a pass costs no reading.

    Args:
        sample: ``[S, d]`` first residuals; overwritten by :meth:`advance`.
        batch_size: rows per batch.
    """

    def __init__(self, sample: Tensor, batch_size: int = 8192) -> None:
        self._sample = sample
        self._batch_size = batch_size

    @property
    def sample(self) -> Tensor:
        """All of them."""
        return self._sample

    def batches(self) -> Iterator[Tensor]:
        """The sample, in pieces that stay in the cache."""
        yield from self._sample.split(self._batch_size)

    def advance(self, stage: TiedStage) -> None:
        """Replace the sample by its next residual."""
        for piece in self._sample.split(self._batch_size):
            piece.copy_(stage.subtract(piece))


class StreamedResiduals:
    """Residuals of every row of a stream, computed anew in each pass.

    Args:
        stream: the embeddings.
        centre: maps a batch to its first residual (subtracts the mean and any codebook stages).
        sample: as in :class:`SampledResiduals`.
    """

    def __init__(self, stream: EmbeddingStream, centre: Callable[[Tensor], Tensor], sample: Tensor) -> None:
        self._stream = stream
        self._centre = centre
        self._sampled = SampledResiduals(sample)
        self._stages: list[TiedStage] = []

    @property
    def sample(self) -> Tensor:
        """Residuals of the sample."""
        return self._sampled.sample

    def batches(self) -> Iterator[Tensor]:
        """A pass over the whole stream."""
        for batch in self._stream:
            residual = self._centre(batch)
            for stage in self._stages:
                residual = stage.subtract(residual)
            yield residual

    def advance(self, stage: TiedStage) -> None:
        """Remember the stage; the sample moves on with it."""
        self._sampled.advance(stage)
        self._stages.append(stage)


class FittedStage(NamedTuple):
    """What :func:`fit_stage` returns."""

    stage: TiedStage
    covariance: Tensor
    """``E[r' r'^T]`` of the residuals that the stage leaves, ``[d, d]`` float64."""


class DigitMoments(NamedTuple):
    """What the best decoder of given digits depends on."""

    cross: Tensor
    """``M = E[r q^T]``, ``[d, m]`` float64."""
    square: Tensor
    """``S = E[q q^T]``, ``[m, m]`` float64."""


class TiedDecoder(NamedTuple):
    """What :func:`best_decoder` returns."""

    directions: Tensor
    """V^T, ``[m, d]`` float64, orthonormal rows."""
    scales: Tensor
    """s, ``[m]`` float64, not negative."""


def fit_stage(
    source: ResidualSource, covariance: Tensor, digits: int, alphabet: int, refine: int
) -> FittedStage:
    """Fit one tied stage and update the residual covariance.

    Args:
        source: residuals r; not advanced here.
        covariance: ``E[r r^T]``, ``[d, d]`` float64.
        digits: m.
        alphabet: odd number of levels.
        refine: alternations after the eigenvectors; 0 leaves them as they are.
    """
    directions = top_directions(covariance, digits)
    projected = source.sample @ directions.to(source.sample.dtype).T
    scales = torch.tensor(
        [lloyd_max_scale(projected[:, j], alphabet).scale for j in range(digits)],
        dtype=torch.float64,
        device=covariance.device,
    )
    stage = _stage(directions, scales, alphabet)
    moments = _moments(source, stage)
    for _ in range(refine):
        directions, scales = best_decoder(moments, directions, scales)
        stage = _stage(directions, scales, alphabet)
        moments = _moments(source, stage)
    decoder = (directions * scales[:, None]).T
    cross = decoder @ moments.cross.T
    return FittedStage(stage, covariance - cross - cross.T + decoder @ moments.square @ decoder.T)


def residual_covariance(source: ResidualSource) -> Tensor:
    """``E[r r^T]`` in one pass, ``[d, d]`` float64."""
    dim = source.sample.shape[1]
    total = torch.zeros(dim, dim, dtype=torch.float64, device=source.sample.device)
    rows = 0
    for residual in source.batches():
        total += (residual.T @ residual).double()
        rows += len(residual)
    return total / rows


def top_directions(covariance: Tensor, count: int) -> Tensor:
    """The top eigenvectors as rows ``[count, d]`` float64, largest first, each with a fixed sign.

    Up to 512 dimensions by a dense decomposition; above, by block power iteration from a fixed start,
    which costs ``O(d^2 count)`` and ends in the same subspace.
    """
    if len(covariance) <= _DENSE_EIGEN_DIM or count * 4 > len(covariance):
        vectors = torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, :count]
    else:
        generator = torch.Generator().manual_seed(0)
        width = min(len(covariance), count + 16)
        start = torch.randn(len(covariance), width, generator=generator, dtype=covariance.dtype)
        basis = start.to(covariance.device)
        for _ in range(40):
            basis = torch.linalg.qr(covariance @ basis).Q
        rotation = torch.linalg.eigh(basis.T @ covariance @ basis).eigenvectors.flip(1)
        vectors = basis @ rotation[:, :count]
    largest = vectors.abs().argmax(dim=0, keepdim=True)
    return (vectors * vectors.gather(0, largest).sign()).T.contiguous()


def best_decoder(moments: DigitMoments, directions: Tensor, scales: Tensor) -> TiedDecoder:
    """One alternation: the best directions for these scales, then the best scales for those.

    Args:
        moments: of the digits that the current decoder gives.
        directions: ``[m, d]`` float64, the current ones; kept where a digit of scale 0 has no moments.
        scales: ``[m]`` float64.
    """
    left, _, right = torch.linalg.svd(moments.cross * scales, full_matrices=False)
    alive = scales > 0
    # A digit that is always 0 has no moments: its direction only has to stay orthonormal.
    polar = (left @ right).T if bool(alive.all()) else directions
    energy = moments.square.diagonal()
    fitted = (polar * moments.cross.T).sum(1) / energy.clamp(min=torch.finfo(energy.dtype).tiny)
    fitted = torch.where(energy > 0, fitted, scales)
    return TiedDecoder(polar * torch.where(fitted < 0, -1.0, 1.0)[:, None], fitted.abs())


def _stage(directions: Tensor, scales: Tensor, alphabet: int) -> TiedStage:
    return TiedStage(directions.float(), scales.float(), RoundDigits(alphabet).alphabet)


def _moments(source: ResidualSource, stage: TiedStage) -> DigitMoments:
    digits, dim = stage.directions.shape
    device = stage.directions.device
    cross = torch.zeros(dim, digits, dtype=torch.float64, device=device)
    square = torch.zeros(digits, digits, dtype=torch.float64, device=device)
    rows = 0
    for residual in source.batches():
        q = stage.digits(residual)
        cross += (residual.T @ q).double()
        square += (q.T @ q).double()
        rows += len(residual)
    return DigitMoments(cross / rows, square / rows)


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
