"""Residual k-means: k-means on the embeddings, then on what is left of them, level by level."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from torchrec_sid.errors import SidError
from torchrec_sid.progress import track
from torchrec_sid.quantizers.base import FitReport, Quantizer, register_quantizer, walk_levels
from torchrec_sid.quantizers.kmeans import ClusterSums, assign, cluster_sums, fit_centroids, lloyd
from torchrec_sid.quantizers.renaming import CodeGroup, Renaming, code_groups
from torchrec_sid.quantizers.sample import RowSample
from torchrec_sid.seeding import derived_generator
from torchrec_sid.spec import SidSpec
from torchrec_sid.streams import EmbeddingStream

_CHUNK = 4096


@dataclass(frozen=True)
class ResidualKMeansConfig:
    """How :class:`ResidualKMeans` learns. The defaults give four levels of 64 codes: 24 bits, 3 bytes.

    Raises:
        SidError: a field out of range.
    """

    cardinalities: tuple[int, ...] = (64, 64, 64, 64)
    """Codes per level, coarsest first."""
    iterations: int = 20
    """Lloyd iterations per level in the largest dimension; a quarter as many in each lower one."""
    tolerance: float = 1e-4
    """Iterations stop once the error falls by less than this fraction."""
    buffer_rows: int = 131_072
    """Embeddings kept in memory: a uniform random sample of the stream."""
    points_per_code: int = 512
    """Rows of the buffer that a level's iterations use, per code of the level."""
    passes: int = 1
    """Lloyd iterations over the whole stream that polish a level fitted on fewer rows."""
    shrinkage: float = 1.0
    """Strength of the pull of thinly populated centroids to their origin; 0 keeps plain means."""
    seed: int = 0
    """Seed of every random choice."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "cardinalities", SidSpec(self.cardinalities).cardinalities)
        for name, low in (("iterations", 1), ("buffer_rows", 1), ("points_per_code", 1), ("passes", 0)):
            if getattr(self, name) < low:
                raise SidError(
                    f"ResidualKMeansConfig.{name}", str(getattr(self, name)), f"Choose {low} or more."
                )
        for name in ("tolerance", "shrinkage"):
            if not getattr(self, name) >= 0:
                raise SidError(
                    f"ResidualKMeansConfig.{name}", str(getattr(self, name)), "Choose 0 or more."
                )


@register_quantizer
class ResidualKMeans(Quantizer):
    """Greedy residual k-means (RQ-KMeans): ``x_hat = mean + sum_l codebook_l[c_l]``.

    Each level is fitted alone on the residual of the frozen levels before it, because only then does
    a prefix of codes mean the same for every item; a beam belongs to :meth:`encode`, never to the fit.
    Memory is bounded by ``buffer_rows``, whatever the length of the stream; the same data, configuration
    and thread count give the same codebooks.

    With fewer different embeddings than codes, the codes that are left over stay unused: their rows are
    zero and :meth:`encode` never returns them.

    Args:
        dim: d, the width of the embeddings.
        config: see :class:`ResidualKMeansConfig`.
        device: where the codebooks live, and where batches are moved to.

    Example:
        >>> x = torch.randn(1000, 32)
        >>> quantizer = ResidualKMeans(32, ResidualKMeansConfig(cardinalities=(16, 16)))
        >>> report = quantizer.fit(x)
        >>> quantizer.encode(x).shape, quantizer.decode(quantizer.encode(x)[:, :1]).shape
        (torch.Size([1000, 2]), torch.Size([1000, 32]))
    """

    kind: ClassVar[str] = "residual_kmeans"
    config_type: ClassVar[type[Any]] = ResidualKMeansConfig
    config: ResidualKMeansConfig

    mean: Tensor
    """``[d]`` float32, the mean embedding."""

    def __init__(
        self,
        dim: int,
        config: ResidualKMeansConfig | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(dim, config or ResidualKMeansConfig(), device=device)
        self.register_buffer("mean", torch.zeros(dim, device=device))
        for level, k in enumerate(self.config.cardinalities):
            self.register_buffer(f"codebook_{level}", torch.zeros(k, dim, device=device))
            self.register_buffer(f"count_{level}", torch.zeros(k, dtype=torch.int64, device=device))

    @property
    def spec(self) -> SidSpec:
        """The shape of the SIDs it makes."""
        return SidSpec(self.config.cardinalities)

    @property
    def code_groups(self) -> tuple[CodeGroup, ...]:
        """Every level is a codebook, whose rows can stand in any order."""
        return code_groups(self.config.cardinalities, ())

    def _rename(self, renaming: Renaming) -> None:
        for level, order in enumerate(renaming.codes):
            for rows in (self.codebook(level), self.counts(level)):
                rows.copy_(rows[order.to(rows.device)])

    def codebook(self, level: int) -> Tensor:
        """Centroids of a level (0-based): ``[K, d]`` float32; rows of unused codes are zero."""
        return self.get_buffer(f"codebook_{level}")

    def counts(self, level: int) -> Tensor:
        """Points of the fit in each cluster of a level (0-based): ``[K]`` int64, 0 for an unused code."""
        return self.get_buffer(f"count_{level}")

    @torch.no_grad()
    def fit(self, data: Any, *, progress: bool = False, start: ResidualKMeans | None = None) -> FitReport:
        """Learn the codebooks, one level after the other.

        Args:
            data: anything :func:`~torchrec_sid.streams.open_stream` takes; a stream longer
                than ``buffer_rows`` is read ``1 + passes * levels`` times.
            progress: show a bar.
            start: a fitted quantizer of the same shape, at whose codebooks the iterations begin, instead of
                at seeds: on data that changed a little its clusters stay where they were, and most items
                keep their codes once they are aligned
                (:func:`~torchrec_sid.quantizers.alignment.align_codes`).

        Raises:
            SidError: no rows, another dimension, a NaN or an infinity, or a start of another shape.
        """
        began = time.perf_counter()
        if start is not None:
            self._require_alike(start)
        stream = self.rows(data)
        generator = derived_generator(self.config.seed, "residual_kmeans.centroids")
        buffer = _read_buffer(stream, self.config.buffer_rows, self.config.seed)
        self.mean.copy_(buffer.mean)
        residual = buffer.rows.to(self.mean.device).sub_(self.mean)
        whole = len(residual) == buffer.seen
        variance = float(residual.square().sum(dtype=torch.float64))
        fvu = []
        for level in track(range(self.spec.levels), "fitting levels", show=progress):
            first = None if start is None else self._start_of(start, level)
            sums = self._fit_level(level, residual, None if whole else stream, generator, first)
            self.codebook(level).zero_()[: len(sums.count)] = sums.centroids(self.config.shrinkage)
            self.counts(level).zero_()[: len(sums.count)] = sums.count.long()
            codes = self._nearest(residual, level)
            residual.sub_(self.codebook(level)[codes])
            left = float(residual.square().sum(dtype=torch.float64))
            fvu.append(left / variance if variance > 0 else 0.0)
        self.fitted.fill_(True)
        return FitReport(buffer.seen, time.perf_counter() - began, tuple(fvu))

    def _require_alike(self, start: ResidualKMeans) -> None:
        start.require_fitted()
        if (start.dim, start.config.cardinalities) != (self.dim, self.config.cardinalities):
            raise SidError(
                "start",
                f"a quantizer of {start.dim} dimensions and {start.config.cardinalities} codes",
                f"This one has {self.dim} and {self.config.cardinalities}: start from none.",
            )

    def _start_of(self, start: ResidualKMeans, level: int) -> Tensor:
        """The used codewords of a level of ``start``, around this mean: ``[K', d]``."""
        words = start.codebook(level)[start.counts(level) > 0].to(self.mean.device)
        return words + (start.mean.to(self.mean.device) - self.mean) if level == 0 else words

    def _fit_level(
        self,
        level: int,
        residual: Tensor,
        stream: EmbeddingStream | None,
        generator: torch.Generator,
        first: Tensor | None,
    ) -> ClusterSums:
        """Cluster the residuals of one level; ``stream`` is given where they are only a sample."""
        k = self.config.cardinalities[level]
        points = residual[: self.config.points_per_code * k]
        iterations, tolerance = self.config.iterations, self.config.tolerance
        if first is None:
            centroids = fit_centroids(
                points, k, iterations=iterations, tolerance=tolerance, generator=generator
            )
        else:
            centroids = lloyd(points, first, iterations, tolerance)
        sums = cluster_sums(points, assign(points, centroids).codes, len(centroids))
        if stream is None and len(points) == len(residual):
            return _without_empty(sums)
        for _ in range(self.config.passes):
            centroids = _without_empty(sums).centroids()
            sums = ClusterSums.empty(len(centroids), self.dim, residual.device)
            for batch in (residual,) if stream is None else self._residuals(stream, level):
                sums.add(batch, assign(batch, centroids).codes)
        return _without_empty(sums)

    def _residuals(self, stream: EmbeddingStream, level: int) -> Iterator[Tensor]:
        """One pass over the stream's residuals before a level."""
        for batch in stream:
            residual = batch.to(self.mean.device) - self.mean
            for earlier in range(level):
                residual -= self.codebook(earlier)[self._nearest(residual, earlier)]
            yield residual

    def _nearest(self, residual: Tensor, level: int) -> Tensor:
        return assign(residual, self.codebook(level), self.counts(level) > 0).codes

    def _encode(self, x: Tensor, beam: int) -> Tensor:
        levels = range(self.spec.levels)
        books, used = [self.codebook(i) for i in levels], [self.counts(i) > 0 for i in levels]
        # A chunk stays within the cache through all of its levels.
        return torch.cat([walk_levels(part - self.mean, books, used, beam) for part in x.split(_CHUNK)])

    def _decode(self, codes: Tensor) -> Tensor:
        out = self.mean.expand(len(codes), -1).clone()
        for level in range(codes.shape[1]):
            out += self.codebook(level)[codes[:, level]]
        return out


def _without_empty(sums: ClusterSums) -> ClusterSums:
    used = sums.count > 0
    return ClusterSums(sums.count[used], sums.total[used], sums.energy)


class _Buffer(NamedTuple):
    rows: Tensor
    """``[min(N, size), d]`` float32, in random order."""
    mean: Tensor
    """``[d]`` float32, the mean of all rows of the stream."""
    seen: int
    """N."""


def _read_buffer(stream: EmbeddingStream, size: int, seed: int) -> _Buffer:
    """A uniform sample of the stream and its exact mean, in one pass."""
    sample = RowSample(size, seed)
    total = torch.zeros(stream.dim, dtype=torch.float64)
    seen = 0
    for batch in stream:
        sample.add(batch.cpu())
        total += batch.sum(0, dtype=torch.float64).cpu()
        seen += len(batch)
    rows = sample.take()
    order = torch.randperm(len(rows), generator=derived_generator(seed, "residual_kmeans.order"))
    return _Buffer(rows[order], (total / max(seen, 1)).float(), seen)
