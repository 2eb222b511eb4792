"""What a fused SID kept of each source, against what its encoder and heads keep without a quantizer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from torchrec_sid.quantizers.fusion.fusion_model import FusionModel
from torchrec_sid.quantizers.fusion.sources import CategorySource, SourcePart


@dataclass(frozen=True)
class EmbeddingReport:
    """An embedding source on held-out items."""

    rows: int
    """Items that have it."""
    fvu: float
    """Fraction of its variance unexplained by the SID."""
    fvu_ceiling: float
    """The same where the heads read the encoder's output instead of its quantization."""


@dataclass(frozen=True)
class CategoryReport:
    """A category source on held-out items."""

    rows: int
    """Items that have it."""
    top1: float
    """Share of items whose most likely class the SID tells."""
    top1_ceiling: float
    """The same without a quantizer."""
    top1_majority: float
    """The same from the most frequent class alone."""
    kl: float
    """Mean KL(p || decoded), nats; for a label the cross-entropy."""
    kl_ceiling: float
    """The same without a quantizer."""
    entropy: float
    """KL of knowing nothing but the mean distribution of these items, nats."""


SourceReport = EmbeddingReport | CategoryReport


class FusionMeter:
    """Adds up errors per source, batch by batch.

    Args:
        model: of a fitted quantizer.
    """

    def __init__(self, model: FusionModel) -> None:
        self._model = model
        widths = model.inputs.widths
        self._rows = [0 for _ in widths]
        self._values = [torch.zeros(w, dtype=torch.float64) for w in widths]
        self._square = [0.0 for _ in widths]
        self._winners = [torch.zeros(w, dtype=torch.float64) for w in widths]
        # Per source: error and hits of the SID, error and hits without a quantizer.
        self._sums = [torch.zeros(4, dtype=torch.float64) for _ in widths]

    @torch.no_grad()
    def add(self, raw: Tensor, *, beam: int = 1) -> None:
        """Measure rows of :class:`~torchrec_sid.quantizers.fusion.source_rows.FusionData`."""
        model = self._model
        packed = model.pack(raw)
        z = model.latents(packed)
        kept = model.decode(model.bottleneck.encode(z, beam=beam))
        ceiling = model.heads(z)
        parts = model.inputs.split(packed)
        for i, source in enumerate(model.inputs.sources.values()):
            part = SourcePart(parts[i].values[parts[i].present], parts[i].present)
            present = part.present
            category = isinstance(source, CategorySource)
            for offset, out in ((0, kept[i][present]), (2, ceiling[i][present])):
                self._sums[i][offset] += _error(out, part.values, category)
                if category:
                    hits = out.argmax(1) == part.values.argmax(1)
                    self._sums[i][offset + 1] += float(hits.sum())
            self._rows[i] += len(part.values)
            self._values[i] += part.values.sum(0, dtype=torch.float64).cpu()
            self._square[i] += float(part.values.square().sum(dtype=torch.float64))
            if category and len(part.values):
                counted = torch.bincount(part.values.argmax(1), minlength=source.width)
                self._winners[i] += counted.double().cpu()

    def reports(self) -> dict[str, SourceReport]:
        """One report per source that any item had."""
        reports: dict[str, SourceReport] = {}
        for i, (name, source) in enumerate(self._model.inputs.sources.items()):
            rows = self._rows[i]
            if not rows:
                continue
            error, hits, error_ceiling, hits_ceiling = (float(v) for v in self._sums[i])
            mean = self._values[i] / rows
            if isinstance(source, CategorySource):
                reports[name] = CategoryReport(
                    rows=rows,
                    top1=hits / rows,
                    top1_ceiling=hits_ceiling / rows,
                    top1_majority=float(self._winners[i].max()) / rows,
                    kl=error / rows,
                    kl_ceiling=error_ceiling / rows,
                    entropy=float(torch.special.entr(mean).sum()),
                )
                continue
            variance = self._square[i] - rows * float(mean.square().sum())
            scale = 1 / variance if variance > 1e-9 * self._square[i] else 0.0
            reports[name] = EmbeddingReport(rows, error * scale, error_ceiling * scale)
        return reports


def _error(out: Tensor, values: Tensor, category: bool) -> float:
    """Summed over rows: KL for a category, squared error for an embedding."""
    if category:
        return float(F.kl_div(out.log_softmax(1), values, reduction="sum"))
    return float((values - out).square().sum(dtype=torch.float64))
