"""The sources of a fused SID, and how one row of all of them is normalised and packed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchrec_sid.errors import SidError
from torchrec_sid.quantizers.collectives import Collectives

_TINY = 1e-12


@dataclass(frozen=True)
class EmbeddingSource:
    """A content embedding: data ``[N, dim]`` float."""

    dim: int
    """Its width."""
    weight: float = 1.0
    """w of its loss, which is a fraction of variance."""

    @property
    def width(self) -> int:
        """Columns of a packed row."""
        return self.dim


@dataclass(frozen=True)
class CategorySource:
    """A category or a predicted distribution over one: data ``[N]`` integers or ``[N, classes]`` float."""

    classes: int
    """Number of classes."""
    weight: float = 1.0
    """v of its loss, a divergence over the entropy of the mean distribution."""

    @property
    def width(self) -> int:
        """Columns of a packed row."""
        return self.classes


Source = EmbeddingSource | CategorySource


def check_sources(sources: Mapping[str, Source]) -> None:
    """Raise SidError for no source, a width below 1 (2 classes), or a weight that is not above 0."""
    if not sources:
        raise SidError("sources", "none", "Name at least one EmbeddingSource or CategorySource.")
    for name, source in sources.items():
        least = 2 if isinstance(source, CategorySource) else 1
        if source.width < least or not source.weight > 0:
            raise SidError(
                f"source {name!r}",
                f"width {source.width}, weight {source.weight}",
                f"Use a width of {least} or more and a weight above 0.",
            )


def source_to_json(source: Source) -> dict[str, Any]:
    """The manifest form of a source."""
    key = "classes" if isinstance(source, CategorySource) else "dim"
    return {key: source.width, "weight": source.weight}


def source_from_json(value: Mapping[str, Any]) -> Source:
    """Back from :func:`source_to_json`."""
    if "classes" in value:
        return CategorySource(int(value["classes"]), float(value["weight"]))
    return EmbeddingSource(int(value["dim"]), float(value["weight"]))


class SourcePart(NamedTuple):
    """One source of a batch of packed rows."""

    values: Tensor
    """``[N, width]``: normalised embedding, or probabilities."""
    present: Tensor
    """``[N]`` bool."""


class FusionInputs(nn.Module):
    """Normalises sources to a common scale and packs them: what the encoder of a fused SID reads.

    A packed row holds, per source, ``sqrt(weight) (value - mean) / scale``, zero where the source is
    missing, and then one flag per source, 1 where it is present. ``scale`` is the root of the source's
    total variance, so that every source has variance ``weight`` whatever its width.

    Args:
        sources: by name, in the order of the columns.
        device: where the statistics live.
    """

    mean: Tensor
    """``[D]``, D the sum of widths."""
    scale: Tensor
    """``[K]``, per source."""
    imputation: Tensor
    """``[D, D]``, row block k is the regression of source k on the other sources."""
    entropy: Tensor
    """``[K]``, entropy of a category's mean distribution in nats; 0 for an embedding."""

    def __init__(self, sources: Mapping[str, Source], *, device: torch.device | str | None = None) -> None:
        super().__init__()
        check_sources(sources)
        self.sources = dict(sources)
        self.widths = [source.width for source in sources.values()]
        self.dim = sum(self.widths)
        self.register_buffer("mean", torch.zeros(self.dim, device=device))
        self.register_buffer("imputation", torch.zeros(self.dim, self.dim, device=device))
        self.register_buffer("scale", torch.ones(len(sources), device=device))
        self.register_buffer("entropy", torch.zeros(len(sources), device=device))

    @property
    def columns(self) -> int:
        """Columns of a packed row: D values and K flags."""
        return self.dim + len(self.widths)

    @torch.no_grad()
    def fit(self, raw: Iterable[Tensor], ranks: Collectives) -> int:
        """Learn the statistics from one pass over raw rows ``[n, D + K]``; returns how many there were.

        Raises:
            SidError: a source that is present in no row.
        """
        device = self.mean.device
        count = torch.zeros(len(self.widths), dtype=torch.float64, device=device)
        total = torch.zeros(self.dim, dtype=torch.float64, device=device)
        square = torch.zeros(self.dim, dtype=torch.float64, device=device)
        rows = torch.zeros(1, dtype=torch.float64, device=device)
        for batch in raw:
            values = batch.to(device)[:, : self.dim].double()
            count += batch.to(device)[:, self.dim :].sum(0, dtype=torch.float64)
            total += values.sum(0)
            square += values.square().sum(0)
            rows += len(batch)
        ranks.sum_([count, total, square, rows])
        self._set(count, total, square)
        return int(rows)

    def _set(self, count: Tensor, total: Tensor, square: Tensor) -> None:
        parts = zip(total.split(self.widths), square.split(self.widths), strict=True)
        means = []
        for index, ((name, source), (sums, squares)) in enumerate(
            zip(self.sources.items(), parts, strict=True)
        ):
            if not float(count[index]):
                raise SidError(f"source {name!r}", "missing in every row", "Leave it out of the sources.")
            mean = sums / count[index]
            variance = float((squares / count[index] - mean.square()).clamp(min=0).sum())
            # Rounding of a constant source must not be blown up to unit variance.
            constant = variance <= _TINY * float(squares.sum() / count[index])
            self.scale[index] = 1.0 if constant else variance**0.5
            if isinstance(source, CategorySource):
                self.entropy[index] = torch.special.entr(mean).sum()
            means.append(mean)
        self.mean.copy_(torch.cat(means))

    def pack(self, raw: Tensor) -> Tensor:
        """Raw rows ``[N, D + K]`` (zeros where missing, then flags) -> packed rows of the same shape."""
        values, flags = raw.split([self.dim, len(self.widths)], dim=1)
        factors = self._per_column(self._roots() / self.scale)
        return torch.cat([(values - self.mean) * factors * self._per_column(flags), flags], dim=1)

    @torch.no_grad()
    def fit_imputation(self, covariance: Tensor, rows: int) -> None:
        """Ridge regressions of each source on the others, from the covariance ``[D, D]``."""
        self.imputation.zero_()
        begin = 0
        for width in self.widths if len(self.widths) > 1 else []:
            own = torch.zeros(self.dim, dtype=torch.bool, device=covariance.device)
            own[begin : begin + width] = True
            others = covariance[~own][:, ~own]
            # The noise of a covariance of few rows; also makes one-hot columns, which sum to 1, regular.
            ridge = others.diagonal().sum() / max(rows, 1) + _TINY
            others = others + ridge * torch.eye(len(others), dtype=others.dtype, device=others.device)
            weights = torch.linalg.solve(others, covariance[~own][:, own]).T
            self.imputation[begin : begin + width, ~own] = weights.to(self.imputation.dtype)
            begin += width

    def fill(self, packed: Tensor) -> Tensor:
        """Packed rows with missing sources replaced by their regression on the present ones; flags kept."""
        values, flags = packed.split([self.dim, len(self.widths)], dim=1)
        incomplete = (flags == 0).any(dim=1).nonzero().squeeze(1)
        if not len(incomplete):
            return packed
        part = values[incomplete]
        missing = 1 - self._per_column(flags[incomplete])
        filled = values.index_copy(0, incomplete, part + (part @ self.imputation.T) * missing)
        return torch.cat([filled, flags], dim=1)

    def split(self, packed: Tensor) -> list[SourcePart]:
        """The sources of packed rows, as the heads should give them back."""
        values, flags = packed.split([self.dim, len(self.widths)], dim=1)
        parts = []
        for index, (source, block) in enumerate(
            zip(
                self.sources.values(),
                (values / self._per_column(self._roots())).split(self.widths, dim=1),
                strict=True,
            )
        ):
            if isinstance(source, CategorySource):
                block = self.restore(index, block).clamp(min=0)
            parts.append(SourcePart(block, flags[:, index] > 0))
        return parts

    def normalise(self, index: int, values: Tensor) -> Tensor:
        """Values ``[N, width]`` of a source, in its own units -> mean 0 and total variance 1."""
        return (values - self.mean.split(self.widths)[index]) / self.scale[index]

    def restore(self, index: int, normalised: Tensor) -> Tensor:
        """Back from :meth:`normalise`."""
        return normalised * self.scale[index] + self.mean.split(self.widths)[index]

    def drop(self, packed: Tensor, rate: float, generator: torch.Generator) -> Tensor:
        """Packed rows with each source hidden with probability ``rate``; at least one stays per row."""
        flags = packed[:, self.dim :]
        draws = torch.rand(flags.shape, generator=generator).to(packed.device)
        # The present source with the largest draw always stays.
        best = draws.masked_fill(flags == 0, -1.0).argmax(dim=1, keepdim=True)
        keep = (draws >= rate).scatter(1, best, True) * flags
        return torch.cat([packed[:, : self.dim] * self._per_column(keep), keep], dim=1)

    def _roots(self) -> Tensor:
        weights = [source.weight**0.5 for source in self.sources.values()]
        return torch.tensor(weights, dtype=self.scale.dtype, device=self.scale.device)

    def _per_column(self, values: Tensor) -> Tensor:
        widths = torch.tensor(self.widths, device=values.device)
        return values.repeat_interleave(widths, dim=-1)
