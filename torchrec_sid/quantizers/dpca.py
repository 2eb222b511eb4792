"""`DiscretePca`: embeddings to short digits on principal directions, fitted in closed form."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from torchrec_sid.errors import SidError
from torchrec_sid.progress import track
from torchrec_sid.quantizers.base import FitReport, Quantizer, register_quantizer, walk_levels
from torchrec_sid.quantizers.digits import RoundDigits, code_tables, encode_digits, gram_similarity
from torchrec_sid.quantizers.dpca_fit import (
    ResidualSource,
    SampledResiduals,
    StreamedResiduals,
    fit_stage,
    residual_covariance,
)
from torchrec_sid.quantizers.renaming import CodeGroup, Renaming, code_groups
from torchrec_sid.quantizers.residual_kmeans import ResidualKMeans, ResidualKMeansConfig
from torchrec_sid.quantizers.sample import stream_moments
from torchrec_sid.spec import SidSpec
from torchrec_sid.streams import EmbeddingData, EmbeddingStream


@dataclass(frozen=True)
class DiscretePcaConfig:
    """Shape and fit of a :class:`DiscretePca`. The default is 25 trits: 39.6 bits, 5 bytes.

    Args:
        stages: ``(m, alphabet)`` per stage: m digits at once, each of an odd number of levels. Five
            trits a stage is one byte a stage; one digit a stage is the greediest form, several times
            slower to fit and within a few percent either way.
        codebooks: codewords of k-means stages that come before the digits, e.g. ``(256,)``; on
            clustered data they mend what a linear decoder cannot reach.
        refine: alternations between digits and decoder per stage; 0 is eigenvectors with Lloyd-Max.
        sample_rows: stages are fitted on a uniform sample of this many rows (the mean and the first
            covariance come from all rows); ``None`` makes every pass of every stage read all rows.
        seed: seed of the sample and of the k-means stages.

    Raises:
        SidError: no stage, an even alphabet, a stage without digits, a codebook below 2.
    """

    stages: tuple[tuple[int, int], ...] = ((5, 3),) * 5
    codebooks: tuple[int, ...] = ()
    refine: int = 2
    sample_rows: int | None = 65_536
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple((int(m), int(a)) for m, a in self.stages))
        object.__setattr__(self, "codebooks", tuple(int(k) for k in self.codebooks))
        if not self.stages:
            raise SidError("DiscretePcaConfig.stages", "no stage", "Give (digits, alphabet) pairs.")
        for digits, alphabet in self.stages:
            RoundDigits(alphabet)
            if digits < 1:
                raise SidError("DiscretePcaConfig.stages", f"{digits} digits", "A stage needs 1 or more.")
        if any(k < 2 for k in self.codebooks):
            raise SidError("DiscretePcaConfig.codebooks", f"{self.codebooks}", "Each needs 2 or more.")
        if self.refine < 0:
            raise SidError("DiscretePcaConfig.refine", f"{self.refine}", "Use 0 or more alternations.")
        if self.sample_rows is not None and self.sample_rows < 1:
            raise SidError("DiscretePcaConfig.sample_rows", f"{self.sample_rows}", "Use 1 or more.")

    @classmethod
    def trits(cls, count: int, *, codebooks: tuple[int, ...] = (), **fields: Any) -> DiscretePcaConfig:
        """``count`` trits in stages of five, one byte each.

        Example:
            >>> DiscretePcaConfig.trits(12).stages
            ((5, 3), (5, 3), (2, 3))
        """
        sizes = [5] * (count // 5) + ([count % 5] if count % 5 else [])
        return cls(stages=tuple((m, 3) for m in sizes), codebooks=codebooks, **fields)


_TINY = 1e-30


class _Levels(NamedTuple):
    codes: Tensor  # [n, L] int64
    errors: Tensor  # [n, L] float32, squared norm of the residual after each level


@register_quantizer
class DiscretePca(Quantizer):
    """Residual digits on principal directions: ``x_hat = mean + digits @ basis``.

    Per stage, ``q = round(diag(1/s) V^T r)`` and ``r <- r - V diag(s) q`` with orthonormal directions V and
    scales s: no sample's error grows from a level to the next, and any prefix of the digits decodes. A
    decoder of C digits is ``C d`` floats. Directions
    repeat, so that equal digits are no measure of similarity: use :meth:`similarity`.

    Args:
        dim: d.
        config: see :class:`DiscretePcaConfig`.
        device: where the state lives and the fit runs.

    Raises:
        SidError: a stage of more digits than d.

    Example:
        >>> x = torch.randn(1000, 16, generator=torch.Generator().manual_seed(0))
        >>> quantizer = DiscretePca(16, DiscretePcaConfig.trits(25))
        >>> report = quantizer.fit(x)
        >>> codes = quantizer.encode(x)
        >>> codes.shape, quantizer.spec.nbytes, quantizer.decode(codes[:, :10]).shape
        (torch.Size([1000, 25]), 5, torch.Size([1000, 16]))
    """

    kind: ClassVar[str] = "discrete_pca"
    config_type: ClassVar[type[Any]] = DiscretePcaConfig
    config: DiscretePcaConfig

    mean: Tensor
    """mu, ``[d]`` float32."""
    basis: Tensor
    """``[C, d]`` float32; row i is the direction of digit i times its scale."""

    def __init__(
        self,
        dim: int,
        config: DiscretePcaConfig | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        config = DiscretePcaConfig() if config is None else config
        super().__init__(dim, config, device=device)
        if max(m for m, _ in config.stages) > dim:
            raise SidError(
                "DiscretePcaConfig.stages",
                f"a stage of {max(m for m, _ in config.stages)} digits for {dim} dimensions",
                "The directions of a stage are orthonormal: use more stages of fewer digits.",
            )
        self._spec = SidSpec((*config.codebooks, *self.alphabets))
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("basis", torch.zeros(len(self.alphabets), dim))
        self.first = (
            ResidualKMeans(dim, ResidualKMeansConfig(cardinalities=config.codebooks, seed=config.seed))
            if config.codebooks
            else None
        )
        self.to(device)

    @property
    def spec(self) -> SidSpec:
        """One level per codebook, then one per digit."""
        return self._spec

    @property
    def alphabets(self) -> tuple[int, ...]:
        """Levels of each digit, C integers; code ``c`` is digit ``c - (alphabet - 1) / 2``."""
        return tuple(a for m, a in self.config.stages for _ in range(m))

    @property
    def code_groups(self) -> tuple[CodeGroup, ...]:
        """A codebook each, then a stage of digits each."""
        return code_groups(self.config.codebooks, self.config.stages)

    def _rename(self, renaming: Renaming) -> None:
        books = len(self.config.codebooks)
        if self.first is not None:
            self.first.rename_codes(Renaming(renaming.levels[:books], renaming.codes[:books]))
        self.basis.copy_(renaming.directions(self.basis, books))

    def code_tables(self) -> tuple[Tensor, ...]:
        """Per level, ``[K_l, d]``: ``x_hat = mean + sum_l tables[l][codes[:, l]]``, whatever the stages."""
        digits = code_tables(self.basis, self.alphabets)
        return (*(codebook for codebook, _ in self._codebooks()), *digits)

    def fit(self, data: EmbeddingData | EmbeddingStream, *, progress: bool = False) -> FitReport:
        """Fit in closed form; the same data and seed give the same digits.

        Passes over the data: one for mean, covariance and sample, one to measure the error of every
        level; with ``sample_rows=None`` another ``refine + 1`` per stage. Memory is bounded by
        ``sample_rows * d`` floats, one batch, and ``d^2`` doubles.

        Raises:
            SidError: bad data (see :func:`~torchrec_sid.streams.open_stream`), another
                dimension than ``dim``.
        """
        began = time.perf_counter()
        stream = self.rows(data)
        config = self.config
        device = self.mean.device
        kept = 65_536 if config.sample_rows is None else config.sample_rows
        moments = stream_moments(stream, sample_rows=kept, seed=config.seed, device=device)
        self.mean.copy_(moments.mean)
        if self.first is not None:
            self.first.fit(stream, progress=progress)
        sample = self._first_residual(moments.sample)
        source: ResidualSource = (
            StreamedResiduals(stream, self._first_residual, sample)
            if config.sample_rows is None
            else SampledResiduals(sample)
        )
        covariance = moments.covariance if self.first is None else residual_covariance(source)
        plan = list(zip(self._stage_rows(), config.stages, strict=True))
        for rows, (digits, alphabet) in track(plan, "fitting stages", show=progress):
            fitted = fit_stage(source, covariance, digits, alphabet, config.refine)
            covariance = fitted.covariance
            rows.copy_(fitted.stage.directions * fitted.stage.scales[:, None])
            source.advance(fitted.stage)
        self.fitted.fill_(True)
        fvu = self._measure(stream, float(moments.covariance.trace()) * moments.rows)
        return FitReport(moments.rows, time.perf_counter() - began, fvu)

    def _encode(self, x: Tensor, beam: int) -> Tensor:
        if beam == 1:
            return self._greedy_levels(x).codes
        tables = self.code_tables()
        used = [mask for _, mask in self._codebooks()]
        used += [t.new_ones(len(t), dtype=torch.bool) for t in tables[len(used) :]]
        return walk_levels(x - self.mean, tables, used, beam)

    def _decode(self, codes: Tensor) -> Tensor:
        digits = self._digits(codes)
        base = (
            self.mean if self.first is None else self.first.decode(codes[:, : len(self.config.codebooks)])
        )
        return base + digits @ self.basis[: digits.shape[1]]

    def digits(self, codes: Tensor) -> Tensor:
        """Codes ``[N, l]`` -> signed digits float32, ``[N, l - codebooks]`` (none for shorter prefixes).

        Raises:
            SidError: no or too many levels, a code outside its alphabet.
        """
        return self._digits(self._checked(codes))

    def _digits(self, codes: Tensor) -> Tensor:
        skip = len(self.config.codebooks)
        halves = [a // 2 for a in self.alphabets[: max(codes.shape[1] - skip, 0)]]
        return (codes[:, skip:] - torch.tensor(halves, device=codes.device)).to(self.basis.dtype)

    @torch.no_grad()
    def similarity(self, codes: Tensor, others: Tensor, *, cosine: bool = True) -> Tensor:
        """Exact similarity of decoded items around the mean: codes ``[N, l]``, ``[M, l]`` -> ``[N, M]``.

        Codes of digits alone never leave digit space, see
        :func:`~torchrec_sid.quantizers.digits.gram_similarity`.
        """
        self.require_fitted()
        if self.first is None:
            left, right = self.digits(codes), self.digits(others)
            return gram_similarity(left, right, self.basis[: left.shape[1]], cosine=cosine)
        left, right = self.decode(codes) - self.mean, self.decode(others) - self.mean
        if cosine:
            left, right = F.normalize(left, eps=_TINY), F.normalize(right, eps=_TINY)
        return left @ right.T

    def _stage_rows(self) -> tuple[Tensor, ...]:
        """Views into :attr:`basis`, one per stage."""
        return self.basis.split([m for m, _ in self.config.stages])

    def _codebooks(self) -> list[tuple[Tensor, Tensor]]:
        """Codebook ``[K, d]`` and mask of used codes ``[K]`` per k-means stage."""
        if self.first is None:
            return []
        levels = range(len(self.config.codebooks))
        return [(self.first.codebook(i), self.first.counts(i) > 0) for i in levels]

    def _first_residual(self, batch: Tensor) -> Tensor:
        """What the digits have to explain, ``[n, d]``."""
        batch = batch.to(self.mean.device)
        if self.first is None:
            return batch - self.mean
        return batch - self.first.decode(self.first.encode(batch))

    def _greedy_levels(self, x: Tensor) -> _Levels:
        codes, errors = [], []
        base = self.mean
        if self.first is not None:
            chosen = self.first.encode(x)
            for depth in range(1, chosen.shape[1] + 1):
                base = self.first.decode(chosen[:, :depth])
                errors.append((x - base).square().sum(1, keepdim=True))
            codes.append(chosen)
        levels = encode_digits(x - base, self.basis, self.config.stages)
        halves = torch.tensor([a // 2 for a in self.alphabets], device=x.device)
        codes.append(levels.digits.to(torch.int64) + halves)
        return _Levels(torch.cat(codes, dim=1), torch.cat([*errors, levels.errors], dim=1))

    def _measure(self, stream: EmbeddingStream, total: float) -> tuple[float, ...]:
        """Fraction of the variance unexplained after each level, over the whole stream."""
        error = torch.zeros(self.spec.levels, dtype=torch.float64, device=self.mean.device)
        for batch in stream:
            error += self._greedy_levels(batch.to(self.mean.device)).errors.sum(0, dtype=torch.float64)
        return tuple((error / total).tolist()) if total > 0 else (0.0,) * self.spec.levels
