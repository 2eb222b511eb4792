"""Measure any quantizer on any stream, batch by batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torchrec_sid.errors import SidError
from torchrec_sid.progress import track
from torchrec_sid.quality.quality_report import LevelQuality, QualityReport, judge
from torchrec_sid.quality.sharing import SharingMeter
from torchrec_sid.quantizers.base import Quantizer
from torchrec_sid.streams import EmbeddingStream


@torch.no_grad()
def measure_quality(
    quantizer: Quantizer,
    held_out: Any,
    *,
    items: Any | None = None,
    labels: Mapping[str, Tensor] | None = None,
    depths: Sequence[int] | None = None,
    max_groups: int = 32_768,
    progress: bool = False,
    **encode: Any,
) -> QualityReport:
    """Diagnose a quantizer; of one that fuses sources, all of them as one normalised vector.

    Args:
        quantizer: fitted.
        held_out: items that were not in the fit: whatever ``quantizer.rows`` takes. Errors are measured
            on them.
        items: all items that the catalog will hold; usage, prefixes and collisions are measured on them,
            or on ``held_out`` where they are not given.
        labels: by name ``[N]`` integers, one per row of ``items``, e.g. a category; for the purity of
            prefixes.
        depths: prefix lengths of the sharing curve; all of them up to 8 levels.
        max_groups: groups per depth whose cosine is exact; see :class:`SharingMeter`.
        progress: show a bar.
        encode: more arguments of ``quantizer.encode``, e.g. ``beam=5``.

    Raises:
        SidError: not fitted, a bad stream, or labels of another length.
    """
    quantizer.require_fitted()
    errors = quantizer.rows(held_out, name="held_out")
    sharing = quantizer.rows(items, name="items") if items is not None else errors
    meter = SharingMeter(
        quantizer.spec, sharing.dim, depths=depths, labels=tuple(labels or {}), max_groups=max_groups
    )
    fvu = _held_out_errors(quantizer, errors, meter if items is None else None, labels, progress, encode)
    if items is not None:
        begin = 0
        for batch in track(sharing, "measuring sharing", total=_batches(sharing), show=progress):
            meter.add(quantizer.encode(batch, **encode), batch, _slice(labels, begin, len(batch)))
            begin += len(batch)
    for name, values in (labels or {}).items():
        if len(values) != meter.items:
            raise SidError(
                f"labels[{name!r}]", f"{len(values)} values for {meter.items} items", "Give one per item."
            )
    return _report(quantizer, meter, fvu)


class _Errors:
    """Squared errors after each level, and the variance they are a fraction of."""

    def __init__(self, levels: int, dim: int) -> None:
        self.rows = 0
        self.left = torch.zeros(levels, dtype=torch.float64)
        self.shift: Tensor | None = None
        self.total = torch.zeros(dim, dtype=torch.float64)
        self.square = 0.0

    def add(self, batch: Tensor) -> None:
        # Shifted by the first mean, so that a mean far from zero costs no precision.
        values = batch.cpu().double()
        if self.shift is None:
            self.shift = values.mean(0)
        values -= self.shift
        self.rows += len(batch)
        self.total += values.sum(0)
        self.square += float(values.square().sum())

    def fvu(self) -> list[float]:
        variance = self.square - float(self.total.square().sum()) / max(self.rows, 1)
        # Equal rows differ from their mean by rounding alone: nothing to explain, so nothing unexplained.
        scale = self.rows * float(self.shift.square().sum()) if self.shift is not None else 0.0
        if variance <= 1e-12 * (self.square + scale):
            return [0.0] * len(self.left)
        return (self.left / variance).tolist()


def _held_out_errors(
    quantizer: Quantizer,
    stream: EmbeddingStream,
    meter: SharingMeter | None,
    labels: Mapping[str, Tensor] | None,
    progress: bool,
    encode: dict[str, Any],
) -> _Errors:
    errors = _Errors(quantizer.spec.levels, stream.dim)
    for batch in track(stream, "measuring errors", total=_batches(stream), show=progress):
        codes = quantizer.encode(batch, **encode)
        for level in range(quantizer.spec.levels):
            rebuilt = quantizer.decode(codes[:, : level + 1])
            errors.left[level] += (batch - rebuilt.to(batch.device)).square().sum(dtype=torch.float64).cpu()
        if meter is not None:
            meter.add(codes, batch, _slice(labels, errors.rows, len(batch)))
        errors.add(batch)
    return errors


def _report(quantizer: Quantizer, meter: SharingMeter, errors: _Errors) -> QualityReport:
    spec, fvu, prefixes = quantizer.spec, errors.fvu(), meter.prefixes()
    levels = tuple(
        LevelQuality(level, k, meter.used(level), meter.perplexity(level), fvu[level - 1])
        for level, k in enumerate(spec.cardinalities, 1)
    )
    return QualityReport(
        held_out=errors.rows,
        items=meter.items,
        cardinalities=spec.cardinalities,
        bits=spec.bits,
        nbytes=spec.nbytes,
        fvu=fvu[-1],
        unique=meter.unique(),
        collision_rate=meter.collision_rate(),
        random_cosine=meter.random_cosine(),
        levels=levels,
        prefixes=prefixes,
        verdict=judge(spec, meter.items, fvu[-1], meter.random_cosine(), levels, prefixes),
    )


def _slice(labels: Mapping[str, Tensor] | None, begin: int, rows: int) -> dict[str, Tensor]:
    out = {name: values[begin : begin + rows] for name, values in (labels or {}).items()}
    for name, values in out.items():
        if len(values) != rows:
            raise SidError(f"labels[{name!r}]", f"ends at row {begin + len(values)}", "Give one per item.")
    return out


def _batches(stream: EmbeddingStream) -> int | None:
    return None if stream.rows is None else -(-stream.rows // 16_384)
