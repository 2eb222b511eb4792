"""Learn Semantic IDs from a folder of items and embeddings; write quantizer, catalog and a report.

    python -m apps.quantize --data ../shared/data/ml1m --output out/sids
    python -m apps.quantize --data FOLDER_WITH_NEW_ITEMS --append_to out/sids --output out/new_items

OUTPUT gets quantizer.safetensors, catalog/ (item id -> SID), quality.json, quality.png, report.html. The
second form encodes the items of FOLDER that a catalog lacks with its own frozen quantizer, adds them to
that catalog, and reports how well the quantizer still fits them.
"""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from apps.cli import parse_config
from apps.quantize_report import describe, examples_by_prefix, write_report
from torchrec_sid.catalog import SidCatalog, add_last_digit
from torchrec_sid.data.schema import LogFolder
from torchrec_sid.errors import SidError
from torchrec_sid.progress import track
from torchrec_sid.quality import QualityReport, measure_quality
from torchrec_sid.quantizers import (
    DiscretePca,
    DiscretePcaConfig,
    Quantizer,
    ResidualKMeans,
    ResidualKMeansConfig,
    RqVae,
    RqVaeConfig,
    load_quantizer,
)
from torchrec_sid.quantizers.stream import EmbeddingStream
from torchrec_sid.seeding import derived_generator

QuantizerName = Literal["residual_kmeans", "discrete_pca", "rq_vae"]


@dataclass(frozen=True)
class QuantizeConfig:
    """One run."""

    data: str
    """Folder with items.parquet and item_emb.npy, as in docs/data.md; events are not needed."""
    output: str = "out/sids"
    """Folder to write."""
    source: str | None = None
    """Embedding source; default: the folder's own."""
    quantizer: QuantizerName = "residual_kmeans"
    """What learns the SIDs."""
    held_out: float = 0.1
    """Share of items kept out of the fit, on which errors are measured; 0 measures on the fitted ones."""
    beam: int = 1
    """Hypotheses per level while encoding; above 1 lowers the error at several times the cost."""
    label: str | None = None
    """Category column of items.parquet for the purity of prefixes."""
    separator: str | None = None
    """What stands between several categories of one item; the first one counts."""
    last_digit: int = 0
    """Cardinality of a last digit that tells items of one SID apart; 0 for none."""
    append_to: str | None = None
    """OUTPUT of an earlier run: encode with its quantizer and append to its catalog."""
    overwrite: bool = False
    """Replace a catalog that OUTPUT holds already."""
    parquet: bool = False
    """Export the catalog to OUTPUT/sids.parquet too."""
    report: bool = True
    """Write plots and HTML; quality.json is always written."""
    seed: int = 0
    """Seed of the choice of held-out items; the quantizer has its own."""
    residual_kmeans: ResidualKMeansConfig = field(default_factory=ResidualKMeansConfig)
    discrete_pca: DiscretePcaConfig = field(default_factory=DiscretePcaConfig)
    rq_vae: RqVaeConfig = field(default_factory=RqVaeConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.held_out < 1:
            raise SidError("held_out", str(self.held_out), "Choose a share of at least 0 and below 1.")
        if self.last_digit == 1 or self.last_digit < 0:
            raise SidError("last_digit", str(self.last_digit), "Choose 0, or 2 and more.")


class Quantization(NamedTuple):
    """What :func:`quantize` returns."""

    quantizer: Quantizer
    catalog: SidCatalog
    quality: QualityReport
    report: Path
    """The HTML report, or quality.json where none was asked for."""


def main(argv: Sequence[str] | None = None) -> None:
    """Command line; ``argv`` stands in for the arguments of the process."""
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    config = parse_config(QuantizeConfig, __doc__, argv)
    console = Console()
    try:
        result = quantize(config, progress=True)
    except SidError as error:
        sys.exit(f"error: {error}")
    console.print(describe(result.quality))
    console.print(f"catalog: {len(result.catalog):,} items, {result.catalog.fingerprint[:12]}")
    console.print(f"report: {result.report}")


def quantize(
    config: QuantizeConfig, *, fit_rows: np.ndarray[Any, Any] | None = None, progress: bool = False
) -> Quantization:
    """Learn SIDs for every item of a folder, or append new items to an earlier run's catalog.

    Args:
        config: see :class:`QuantizeConfig`.
        fit_rows: ``[N]`` bool, which items to learn from, e.g. those of the training period; errors are
            measured on the others. By default a random share ``1 - held_out``.
        progress: show bars.

    Raises:
        SidError: a folder whose parts do not fit, embeddings that are not finite.
        ArtifactError: OUTPUT holds a catalog and ``overwrite`` is False; ``append_to`` is damaged or was
            made by another quantizer.
    """
    folder = LogFolder.open(config.data, source=config.source, events=False)
    output = Path(config.output)
    labels = _labels(config, folder)
    if config.append_to is not None:
        quantizer, catalog, chosen = _append(config, folder, Path(config.append_to), progress)
        learned = ~chosen
    else:
        if SidCatalog.exists(output / "catalog") and not config.overwrite:
            raise SidError(
                str(output), "holds a catalog already", "Choose another folder, or pass --overwrite true."
            )
        learned = _fit_rows(config, len(folder)) if fit_rows is None else np.asarray(fit_rows, dtype=bool)
        chosen = np.ones(len(folder), dtype=bool)
        quantizer = _fit(config, folder, learned, progress)
        quantizer.save(output / "quantizer.safetensors")
        catalog = _create(config, folder, quantizer, output / "catalog", progress)
    held_out = chosen & ~learned
    quality = measure_quality(
        quantizer,
        _stream(folder, held_out if held_out.any() else chosen),
        items=_stream(folder, chosen),
        labels={name: values[torch.from_numpy(chosen)] for name, values in labels.items()},
        progress=progress,
        beam=config.beam,
    )
    if config.parquet:
        catalog.to_parquet(output / "sids.parquet")
    settings = {
        "data": str(config.data),
        "source": config.source or folder.default_source,
        "quantizer": quantizer.kind,
        "quantizer_fingerprint": quantizer.fingerprint,
        "catalog_fingerprint": catalog.fingerprint,
        "catalog_generation": catalog.generation,
        "catalog_items": len(catalog),
        "command": shlex.join(["python", "-m", "apps.quantize", *sys.argv[1:]]),
    }
    examples = examples_by_prefix(quantizer, folder, np.flatnonzero(chosen), beam=config.beam)
    path = write_report(output, settings, quality, examples, html=config.report)
    return Quantization(quantizer, catalog, quality, path)


def _fit_rows(config: QuantizeConfig, items: int) -> np.ndarray[Any, Any]:
    draws = torch.rand(items, generator=derived_generator(config.seed, "quantize.held_out"))
    return (draws >= config.held_out).numpy()


def _fit(
    config: QuantizeConfig, folder: LogFolder, rows: np.ndarray[Any, Any], progress: bool
) -> Quantizer:
    stream = _stream(folder, rows)
    quantizer: Quantizer
    if config.quantizer == "discrete_pca":
        quantizer = DiscretePca(stream.dim, config.discrete_pca)
    elif config.quantizer == "rq_vae":
        quantizer = RqVae(stream.dim, config.rq_vae)
    else:
        quantizer = ResidualKMeans(stream.dim, config.residual_kmeans)
    quantizer.fit(stream, progress=progress)
    return quantizer.eval()


def _create(
    config: QuantizeConfig, folder: LogFolder, quantizer: Quantizer, path: Path, progress: bool
) -> SidCatalog:
    every = np.ones(len(folder), dtype=bool)
    mark = quantizer.fingerprint
    if not config.last_digit:
        pairs = _encoded(config, folder, quantizer, every, progress)
        return SidCatalog.create(
            path, quantizer.spec, pairs, quantizer_fingerprint=mark, overwrite=config.overwrite
        )
    ids, codes = _gathered(config, folder, quantizer, every, progress)
    digits = add_last_digit(quantizer.spec, ids, codes, cardinality=config.last_digit)
    return SidCatalog.create(path, digits.spec, ids, digits.codes, mark, overwrite=config.overwrite)


def _append(
    config: QuantizeConfig, folder: LogFolder, earlier: Path, progress: bool
) -> tuple[Quantizer, SidCatalog, np.ndarray[Any, Any]]:
    """Quantizer and catalog of an earlier run, with the new items appended; ``[N]`` bool, which are new."""
    quantizer = load_quantizer(earlier / "quantizer.safetensors")
    catalog = SidCatalog.open(earlier / "catalog")
    new = ~catalog.contains(folder.item_ids).numpy()
    if not new.any():
        raise SidError(
            str(config.data), "every item is in the catalog already", "There is nothing to append."
        )
    mark = quantizer.fingerprint
    levels = catalog.spec.levels
    if levels == quantizer.spec.levels:
        pairs = _encoded(config, folder, quantizer, new, progress)
        return quantizer, catalog.append(pairs, quantizer_fingerprint=mark), new
    ids, codes = _gathered(config, folder, quantizer, new, progress)
    cardinality = catalog.spec.cardinalities[-1]
    digits = add_last_digit(quantizer.spec, ids, codes, cardinality=cardinality, published=catalog)
    return quantizer, catalog.append(ids, digits.codes, mark), new


def _encoded(
    config: QuantizeConfig,
    folder: LogFolder,
    quantizer: Quantizer,
    rows: np.ndarray[Any, Any],
    progress: bool,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Item ids and codes of the chosen rows, batch by batch."""
    ids = torch.from_numpy(folder.item_ids[rows])
    begin = 0
    stream = _stream(folder, rows)
    for batch in track(stream, "encoding", total=_batches(stream), show=progress):
        yield ids[begin : begin + len(batch)], quantizer.encode(batch, beam=config.beam).cpu()
        begin += len(batch)


def _gathered(
    config: QuantizeConfig,
    folder: LogFolder,
    quantizer: Quantizer,
    rows: np.ndarray[Any, Any],
    progress: bool,
) -> tuple[Tensor, Tensor]:
    pairs = list(_encoded(config, folder, quantizer, rows, progress))
    return torch.cat([ids for ids, _ in pairs]), torch.cat([codes for _, codes in pairs])


def _stream(folder: LogFolder, rows: np.ndarray[Any, Any]) -> EmbeddingStream:
    """The embeddings of the chosen rows ``[N]`` bool, in item order."""
    stream = folder.embeddings()
    if not rows.any():
        raise SidError(str(folder.path), "no item to learn from", "Lower held_out or add items.")
    if rows.all():
        return stream
    mask = torch.from_numpy(rows)

    def start() -> Iterator[Tensor]:
        begin = 0
        for batch in stream:
            kept = batch[mask[begin : begin + len(batch)]]
            begin += len(batch)
            if len(kept):
                yield kept

    return EmbeddingStream(start, stream.dim, int(rows.sum()), stream.name)


def _labels(config: QuantizeConfig, folder: LogFolder) -> dict[str, Tensor]:
    """The first category of each item; items without one are a category of their own."""
    if config.label is None:
        return {}
    shares = folder.category(config.label, config.separator).probabilities
    label = np.where(shares.any(1), shares.argmax(1), shares.shape[1])
    return {config.label: torch.from_numpy(label)}


def _batches(stream: EmbeddingStream) -> int | None:
    return None if stream.rows is None else -(-stream.rows // 16_384)


if __name__ == "__main__":
    main()
