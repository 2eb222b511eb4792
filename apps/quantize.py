"""Learn Semantic IDs from a folder of items and embeddings; write quantizer, catalog and a report.

    torchrec-sid quantize --data ../shared/data/ml1m --output out/sids
    torchrec-sid quantize --data FOLDER_WITH_NEW_ITEMS --append_to out/sids --output out/new_items
    torchrun --nproc_per_node 2 -m apps.quantize --data FOLDER --output out/sids --quantizer rq_vae

OUTPUT gets quantizer.safetensors, catalog/ (item id -> SID), quality.json, quality.png, report.html. The
second form encodes the items of FOLDER that a catalog lacks with its own frozen quantizer, adds them to
that catalog, and reports how well the quantizer still fits them. The third lets several processes train a
quantizer that learns by gradients (rq_vae, vq_fusion) together; the first of them writes.
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor

from torchrec_sid.catalog import DriftReport, SidCatalog, add_last_digit, measure_drift
from torchrec_sid.data.schema import LogFolder
from torchrec_sid.errors import SidError
from torchrec_sid.progress import track
from torchrec_sid.quality import QualityReport, measure_quality
from torchrec_sid.quantizers import (
    DiscretePcaConfig,
    Quantizer,
    ResidualKMeansConfig,
    RqVae,
    RqVaeConfig,
    VqFusionConfig,
    load_quantizer,
    make_quantizer,
)
from torchrec_sid.seeding import derived_generator

from .cli import parse_config, plain_errors
from .quantize_content import Array, Content, fit_fusion, item_stream
from .quantize_report import describe, examples_by_prefix, write_report

QuantizerName = Literal["residual_kmeans", "discrete_pca", "rq_vae", "vq_fusion"]


@dataclass(frozen=True)
class QuantizeConfig:
    """One run."""

    data: str
    """Folder with items.parquet and item_emb.npy, as in docs/data.md; events are not needed."""
    output: str = "out/sids"
    """Folder to write."""
    source: str | None = None
    """Embedding source; default: the folder's own."""
    sources: tuple[str, ...] = ()
    """Embedding sources that vq_fusion fuses; default: all of the folder's."""
    categories: tuple[str, ...] = ()
    """Category columns of items.parquet that vq_fusion fuses in."""
    quantizer: QuantizerName = "residual_kmeans"
    """What learns the SIDs."""
    held_out: float = 0.1
    """Share of items kept out of the fit, on which errors are measured; 0 measures on the fitted ones."""
    beam: int = 1
    """Hypotheses per level while encoding; above 1 lowers the error at several times the cost."""
    label: str | None = None
    """Category column of items.parquet for the purity of prefixes."""
    separator: str | None = None
    """What stands between several categories of one item; for purity the first one counts."""
    last_digit: int = 0
    """Cardinality of a last digit that tells items of one SID apart; 0 for none."""
    append_to: str | None = None
    """OUTPUT of an earlier run: encode with its quantizer and append to its catalog."""
    drift_from: str | None = None
    """OUTPUT of an earlier run: report how many of its SIDs this one would move."""
    overwrite: bool = False
    """Replace a catalog that OUTPUT holds already."""
    checkpoint_every: int = 0
    """Training steps of rq_vae and vq_fusion between writes of OUTPUT/fit.safetensors, from which the same
    command continues when it was cut off; 0 for none."""
    parquet: bool = False
    """Export the catalog to OUTPUT/sids.parquet too."""
    report: bool = True
    """Write plots and HTML; quality.json is always written."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the quantizer lives; of several processes, each takes the card of its local rank."""
    seed: int = 0
    """Seed of the choice of held-out items; the quantizer has its own."""
    residual_kmeans: ResidualKMeansConfig = field(default_factory=ResidualKMeansConfig)
    discrete_pca: DiscretePcaConfig = field(default_factory=DiscretePcaConfig)
    rq_vae: RqVaeConfig = field(default_factory=RqVaeConfig)
    vq_fusion: VqFusionConfig = field(default_factory=VqFusionConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.held_out < 1:
            raise SidError("held_out", str(self.held_out), "Choose a share of at least 0 and below 1.")
        if self.last_digit == 1 or self.last_digit < 0:
            raise SidError("last_digit", str(self.last_digit), "Choose 0, or 2 and more.")
        if self.checkpoint_every < 0:
            raise SidError("checkpoint_every", str(self.checkpoint_every), "Choose 0 or more steps.")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise SidError(
                "device", "cuda, but no card is to be seen", "Choose cpu, or install CUDA's torch."
            )


class Quantization(NamedTuple):
    """What :func:`quantize` returns."""

    quantizer: Quantizer
    catalog: SidCatalog
    quality: QualityReport
    drift: DriftReport | None
    """Against the catalog of ``drift_from``."""
    report: Path
    """The HTML report, or quality.json where none was asked for."""


def main(argv: Sequence[str] | None = None) -> None:
    """Command line; ``argv`` stands in for the arguments of the process."""
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    console = Console()
    with plain_errors(), fitting_processes() as group:
        config = parse_config(QuantizeConfig, __doc__, argv)
        if group is not None and dist.get_rank(group) > 0:
            help_fit(config, group)
            return
        result = quantize(config, progress=True, group=group)
    console.print(describe(result.quality))
    if result.drift is not None:
        console.print(f"drift: {result.drift.describe()}")
    console.print(f"catalog: {len(result.catalog):,} items, {result.catalog.fingerprint[:12]}")
    console.print(f"report: {result.report}")


def quantize(
    config: QuantizeConfig,
    *,
    fit_rows: Array | None = None,
    progress: bool = False,
    group: dist.ProcessGroup | None = None,
) -> Quantization:
    """Learn SIDs for every item of a folder, or append new items to an earlier run's catalog.

    Args:
        config: see :class:`QuantizeConfig`.
        fit_rows: ``[N]`` bool, which items to learn from, e.g. those of the training period; errors are
            measured on the others. By default a random share ``1 - held_out``.
        progress: show bars.
        group: processes that fit together; this is the first of them, the others call :func:`help_fit`.

    Raises:
        SidError: a folder whose parts do not fit, embeddings that are not finite.
        ArtifactError: OUTPUT holds a catalog and ``overwrite`` is False; ``append_to`` is damaged or was
            made by another quantizer.
    """
    folder = LogFolder.open(config.data, source=config.source, events=False)
    output = Path(config.output)
    labels = _labels(config, folder)
    before = SidCatalog.open(Path(config.drift_from) / "catalog") if config.drift_from else None
    made = (
        _append(config, folder, progress)
        if config.append_to
        else _learn(config, folder, fit_rows, progress, group)
    )
    measured = made.held_out if made.held_out.any() else made.items
    quality = measure_quality(
        made.content.view,
        made.content.stream(measured),
        items=made.content.stream(made.items),
        labels={name: values[torch.from_numpy(made.items)] for name, values in labels.items()},
        progress=progress,
        beam=config.beam,
    )
    if config.parquet:
        made.catalog.to_parquet(output / "sids.parquet")
    drift = measure_drift(before, made.catalog) if before is not None else None
    settings = {
        "data": str(config.data),
        "source": config.source or folder.default_source,
        "sources": made.content.sources(measured, config.beam),
        "quantizer": made.quantizer.kind,
        "quantizer_fingerprint": made.quantizer.fingerprint,
        "catalog_fingerprint": made.catalog.fingerprint,
        "catalog_generation": made.catalog.generation,
        "catalog_items": len(made.catalog),
        "drift": drift.to_dict() if drift is not None else None,
        "command": shlex.join(["python", "-m", "apps.quantize", *sys.argv[1:]]),
    }
    examples = examples_by_prefix(made.content, made.items, beam=config.beam)
    path = write_report(output, settings, quality, examples, html=config.report)
    return Quantization(made.quantizer, made.catalog, quality, drift, path)


class _Made(NamedTuple):
    quantizer: Quantizer
    content: Content
    catalog: SidCatalog
    items: Array  # [N] bool: whose SIDs were made in this run
    held_out: Array  # [N] bool: those of them that the quantizer did not learn from


def help_fit(config: QuantizeConfig, group: dist.ProcessGroup) -> None:
    """The part of every process but the first: train along; nothing is written."""
    if config.append_to is None and config.quantizer in ("rq_vae", "vq_fusion"):
        folder = LogFolder.open(config.data, source=config.source, events=False)
        _fit(config, folder, _fit_rows(config, len(folder)), False, group)


@contextmanager
def fitting_processes() -> Iterator[dist.ProcessGroup | None]:
    """The process group of a launch by torchrun or TorchX; None for a process on its own."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield None
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield dist.group.WORLD
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _learn(
    config: QuantizeConfig,
    folder: LogFolder,
    fit_rows: Array | None,
    progress: bool,
    group: dist.ProcessGroup | None,
) -> _Made:
    output = Path(config.output)
    if SidCatalog.exists(output / "catalog") and not config.overwrite:
        raise SidError(
            str(output), "holds a catalog already", "Choose another folder, or pass --overwrite true."
        )
    learned = _fit_rows(config, len(folder)) if fit_rows is None else np.asarray(fit_rows, dtype=bool)
    quantizer = _fit(config, folder, learned, progress, group)
    quantizer.save(output / "quantizer.safetensors")
    _checkpoint(config).unlink(missing_ok=True)
    content = Content(folder, quantizer, output)
    catalog = _create(config, content, quantizer.fingerprint, output / "catalog", progress)
    return _Made(quantizer, content, catalog, np.ones(len(folder), dtype=bool), ~learned)


def _fit_rows(config: QuantizeConfig, items: int) -> Array:
    draws = torch.rand(items, generator=derived_generator(config.seed, "quantize.held_out"))
    return (draws >= config.held_out).numpy()


def _checkpoint(config: QuantizeConfig) -> Path:
    return Path(config.output) / "fit.safetensors"


def _fit(
    config: QuantizeConfig,
    folder: LogFolder,
    rows: Array,
    progress: bool,
    group: dist.ProcessGroup | None,
) -> Quantizer:
    device = _device(config)
    options: dict[str, Any] = {"progress": progress, "group": group}
    if config.checkpoint_every:
        options |= {"checkpoint": _checkpoint(config), "checkpoint_every": config.checkpoint_every}
    if config.quantizer == "vq_fusion":
        settings = config.sources, config.categories, config.separator, config.vq_fusion
        return fit_fusion(folder, *settings, rows, Path(config.output), options, device).eval()
    stream = item_stream(folder, rows)
    quantizer = make_quantizer(stream.dim, getattr(config, config.quantizer), device=device)
    if isinstance(quantizer, RqVae):
        quantizer.fit(stream, **options)
    else:
        quantizer.fit(stream, progress=progress)
    return quantizer.eval()


def _device(config: QuantizeConfig) -> torch.device:
    if config.device == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def _create(config: QuantizeConfig, content: Content, mark: str, path: Path, progress: bool) -> SidCatalog:
    every = np.ones(len(content.folder), dtype=bool)
    spec = content.view.spec
    pairs = _encoded(config, content, every, progress)
    if not config.last_digit:
        return SidCatalog.create(path, spec, pairs, quantizer_fingerprint=mark, overwrite=config.overwrite)
    ids, codes = _gathered(pairs)
    digits = add_last_digit(spec, ids, codes, cardinality=config.last_digit)
    return SidCatalog.create(path, digits.spec, ids, digits.codes, mark, overwrite=config.overwrite)


def _append(config: QuantizeConfig, folder: LogFolder, progress: bool) -> _Made:
    home = Path(str(config.append_to))
    quantizer = load_quantizer(home / "quantizer.safetensors").to(_device(config))
    content = Content(folder, quantizer, home)
    catalog = SidCatalog.open(home / "catalog")
    new = ~catalog.contains(folder.item_ids).numpy()
    if not new.any():
        raise SidError(
            str(config.data), "every item is in the catalog already", "There is nothing to append."
        )
    pairs = _encoded(config, content, new, progress)
    if catalog.spec.levels == quantizer.spec.levels:
        catalog = catalog.append(pairs, quantizer_fingerprint=quantizer.fingerprint)
    else:
        ids, codes = _gathered(pairs)
        cardinality = catalog.spec.cardinalities[-1]
        digits = add_last_digit(quantizer.spec, ids, codes, cardinality=cardinality, published=catalog)
        catalog = catalog.append(ids, digits.codes, quantizer.fingerprint)
    return _Made(quantizer, content, catalog, new, new)


def _encoded(
    config: QuantizeConfig, content: Content, rows: Array, progress: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Item ids and codes of the chosen rows, batch by batch."""
    ids = torch.from_numpy(content.folder.item_ids[rows])
    begin = 0
    for batch in track(content.stream(rows), "encoding", total=-(-len(ids) // 16_384), show=progress):
        yield ids[begin : begin + len(batch)], content.view.encode(batch, beam=config.beam).cpu()
        begin += len(batch)


def _gathered(pairs: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    parts = list(pairs)
    return torch.cat([ids for ids, _ in parts]), torch.cat([codes for _, codes in parts])


def _labels(config: QuantizeConfig, folder: LogFolder) -> dict[str, Tensor]:
    """The first category of each item; items without one are a category of their own."""
    if config.label is None:
        return {}
    shares = folder.category(config.label, config.separator).probabilities
    label = np.where(shares.any(1), shares.argmax(1), shares.shape[1])
    return {config.label: torch.from_numpy(label)}


if __name__ == "__main__":
    main()
