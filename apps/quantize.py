"""Learn Semantic IDs from a folder of items and embeddings; write quantizer, catalog and a report.

    torchrec-sid quantize --data ../shared/data/ml1m --output out/sids
    torchrec-sid quantize --data FOLDER_WITH_NEW_ITEMS --append_to out/sids --output out/new_items
    torchrec-sid quantize --data LATER_FOLDER --align_to out/sids --output out/sids_of_spring
    torchrun --nproc_per_node 2 -m apps.quantize --data FOLDER --output out/sids --quantizer rq_vae

OUTPUT gets quantizer.safetensors, catalog/ (item id -> SID), quality.json, quality.png, report.html. Where
the folder has events, SIDs are learned from the traffic of the training period, as the comparisons learn
them; else from a share of the items. The second form encodes the items of FOLDER that a catalog lacks with
its own frozen quantizer, adds them to that catalog, and reports how well the quantizer still fits them. The
third fits a new generation of SIDs whose codes mean what they meant, and reports what drifted. The last
lets several processes train a quantizer that learns by gradients (rq_vae, vq_fusion) together; the
first of them writes. The same command again goes on where it was cut off, or finds all done.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console

from torchrec_sid.catalog import DriftReport, ItemValues, SidCatalog, measure_drift
from torchrec_sid.data.prepare import PrepareConfig, log_fingerprint, prepare
from torchrec_sid.data.prepared import PreparedLog
from torchrec_sid.errors import SidError
from torchrec_sid.item_content import Array, ItemContent
from torchrec_sid.learn import (
    LearnedSids,
    LearnOptions,
    SidRecipe,
    append_items,
    help_fit,
    learn_sids,
    refuse_another,
)
from torchrec_sid.options import options_of
from torchrec_sid.quality import QualityReport
from torchrec_sid.quantizers import QUANTIZERS, Quantizer, ResidualKMeansConfig, load_quantizer
from torchrec_sid.tables import PieceTrainerConfig

from .cli import command_line, parse_config, plain_errors
from .quantize_report import describe, examples_by_prefix, missing_items, write_report


@dataclass(frozen=True)
class QuantizeConfig:
    """One run."""

    data: str
    """Folder with items.parquet and item_emb.npy, as in docs/data.md; with events or without."""
    output: str = "out/sids"
    """Folder to write."""
    quantizer: Any = field(default_factory=ResidualKMeansConfig)
    """Configuration of what learns the SIDs."""
    source: str | None = None
    """Embedding source; default: the folder's own."""
    sources: tuple[str, ...] = ()
    """Embedding sources that vq_fusion fuses; default: all of the folder's."""
    categories: tuple[str, ...] = ()
    """Category columns of items.parquet that vq_fusion fuses in."""
    separator: str | None = None
    """What stands between several categories of one item; for purity the first one counts."""
    events: bool = True
    """Learn from the traffic of the training period where the folder has events; false: from items."""
    prepared: str | None = None
    """Folder of the prepared log, made there if it is not up to date; default: OUTPUT/prepared."""
    held_out: float = 0.1
    """Without events: share of items kept out of the fit, on which errors are measured; 0 measures on the
    fitted ones."""
    beam: int = 1
    """Hypotheses per level while encoding; above 1 lowers the error at several times the cost."""
    label: str | None = None
    """Category column of items.parquet for the purity of prefixes."""
    last_digit: int = 0
    """Cardinality of a last digit that tells items of one SID apart; 0 for none."""
    pieces: int = 0
    """Size of a SentencePiece vocabulary to train on the SIDs, OUTPUT/pieces.safetensors; 0 for none."""
    append_to: str | None = None
    """OUTPUT of an earlier run: encode with its quantizer and append to its catalog."""
    align_to: str | None = None
    """OUTPUT of an earlier run: give the codes of this fit the names of its codes, such that as much of the
    traffic as possible keeps its SID; a residual k-means begins at its codebooks. Reports the drift too."""
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
    plugin: tuple[str, ...] = ()
    """Python files that register quantizers or other parts of one's own, imported first."""

    def __post_init__(self) -> None:
        _ = self.recipe
        if self.align_to and self.append_to:
            raise SidError(
                "align_to, append_to",
                "both given",
                "Append encodes with the earlier quantizer: leave one out.",
            )
        if self.checkpoint_every < 0:
            raise SidError("checkpoint_every", str(self.checkpoint_every), "Choose 0 or more steps.")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise SidError(
                "device", "cuda, but no card is to be seen", "Choose cpu, or install CUDA's torch."
            )

    @property
    def recipe(self) -> SidRecipe:
        """How the SIDs are learned."""
        own = {f.name for f in dataclasses.fields(self)}
        shared = {f.name for f in dataclasses.fields(SidRecipe)} & own - {"pieces"}
        pieces = PieceTrainerConfig(self.pieces) if self.pieces else None
        return SidRecipe(**{name: getattr(self, name) for name in shared}, pieces=pieces)


class Quantization(NamedTuple):
    """What :func:`quantize` returns."""

    quantizer: Quantizer
    catalog: SidCatalog
    quality: QualityReport
    drift: DriftReport | None
    """Against the catalog of ``drift_from`` or ``align_to``."""
    missing: dict[str, int]
    """By source, how many items lack it; under ``any`` those without a SID."""
    alignment: str | None
    """What ``align_to`` did, in words."""
    report: Path
    """The HTML report, or quality.json where none was asked for."""


def main(argv: Sequence[str] | None = None) -> None:
    """Command line; ``argv`` stands in for the arguments of the process."""
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    console = Console()
    with plain_errors(), fitting_processes() as group:
        config = _chosen(parse_config(quantize_options, __doc__, argv))
        if group is not None and dist.get_rank(group) > 0:
            help_along(config, group)
            return
        result = quantize(config, progress=True, group=group)
    console.print(describe(result.quality))
    console.print(missing_items(result.missing))
    if result.alignment is not None:
        console.print(f"aligned: {result.alignment}")
    if result.drift is not None:
        console.print(f"drift: {result.drift.describe()}")
    console.print(f"catalog: {len(result.catalog):,} items, {result.catalog.fingerprint[:12]}")
    console.print(f"report: {result.report}", markup=False)


def quantize_options() -> type[Any]:
    """The options of the command: a quantizer by its kind, and a group for each kind that is registered."""
    kinds = tuple(QUANTIZERS)
    texts = {option.name: option.text for option in options_of(QuantizeConfig)}
    texts["quantizer"] = "What learns the SIDs."
    fields: list[Any] = []
    for plain in dataclasses.fields(QuantizeConfig):
        if plain.name == "quantizer":
            hint: Any = Literal[kinds]
            fields.append((plain.name, hint, field(default="residual_kmeans")))
        else:
            fields.append((plain.name, plain.type, plain))
    for kind in kinds:
        texts[kind] = f"Of --quantizer {kind}."
        config_type = QUANTIZERS[kind].config_type
        fields.append((kind, config_type, field(default_factory=config_type)))
    lines = "\n".join(f"    {name}: {text}" for name, text in texts.items())
    namespace = {"__doc__": f"One run.\n\nArgs:\n{lines}\n", "__module__": __name__}
    return dataclasses.make_dataclass("QuantizeOptions", fields, namespace=namespace, frozen=True)


def _chosen(options: Any) -> QuantizeConfig:
    values = {f.name: getattr(options, f.name) for f in dataclasses.fields(QuantizeConfig)}
    return QuantizeConfig(**{**values, "quantizer": getattr(options, options.quantizer)})


def quantize(
    config: QuantizeConfig,
    *,
    fit_rows: Array | None = None,
    progress: bool = False,
    group: dist.ProcessGroup | None = None,
) -> Quantization:
    """Learn SIDs for every item of a folder, or append new items to an earlier run's catalog; report.

    Args:
        config: see :class:`QuantizeConfig`.
        fit_rows: ``[N]`` bool over items.parquet, which items to learn from; errors are measured on the
            others.
        progress: show bars.
        group: processes that fit together; this is the first of them, the others call :func:`help_along`.

    Raises:
        SidError: a folder whose parts do not fit, embeddings that are not finite.
        ArtifactError: ``append_to`` is damaged or was made by another quantizer.
    """
    output = Path(config.output)
    earlier = config.drift_from or config.align_to
    before = SidCatalog.open(Path(earlier) / "catalog") if earlier else None
    options = _options(config, fit_rows, progress, group)
    fresh, log = None, None
    if config.append_to is None:
        log = _log(config, options)
        learned = learn_sids(config.recipe, config.data, log, output, options)
    else:
        learned, fresh = _append(config, output, options)
    quantizer, catalog = load_quantizer(learned.quantizer), SidCatalog.open(learned.catalog)
    content = ItemContent.of_quantizer(
        config.data, quantizer, learned.quantizer.parent, source=config.source
    )
    if config.parquet:
        catalog.to_parquet(output / "sids.parquet")
    drift = _drift(config, before, catalog, content, log) if before is not None else None
    chosen = content.present if fresh is None else fresh
    examples = examples_by_prefix(quantizer, content, chosen, beam=config.beam)
    path = write_report(
        learned.quality,
        {"drift": drift.to_dict() if drift is not None else None, "command": command_line()},
        examples,
        html=config.report,
    )
    aligned = json.loads(learned.quality.read_text()).get("alignment")
    words = aligned["text"] if aligned else None
    return Quantization(quantizer, catalog, learned.report(), drift, content.missing(), words, path)


def _drift(
    config: QuantizeConfig,
    before: SidCatalog,
    after: SidCatalog,
    content: ItemContent,
    log: PreparedLog | None,
) -> DriftReport:
    """By items, by their training events, and by the purity of the label."""
    traffic, ids = None, torch.from_numpy(content.item_ids.copy())
    if log is not None:
        events = torch.from_numpy(np.array(log.item_train_events))
        traffic = ItemValues(torch.from_numpy(np.array(log.item_ids)), events)
    labels = {}
    if config.label:
        labels[config.label] = ItemValues(ids, content.label(config.label, config.separator))
    return measure_drift(before, after, traffic=traffic, labels=labels)


def help_along(config: QuantizeConfig, group: dist.ProcessGroup) -> None:
    """The part of every process but the first: train along; nothing is written."""
    if config.append_to is None:
        options = _options(config, None, False, group)
        help_fit(config.recipe, config.data, _log(config, options), config.output, options)


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


def _log(config: QuantizeConfig, options: LearnOptions) -> PreparedLog | None:
    """The log, prepared; a run that will be refused is refused before that is written."""
    out = config.prepared or Path(config.output) / "prepared"
    events = config.events and any(Path(config.data).glob("events*"))
    mark = log_fingerprint(config.data, out) if events else None
    refuse_another(config.recipe, config.data, mark, config.output, options)
    return prepare(config.data, out, PrepareConfig()) if events else None


def _options(
    config: QuantizeConfig, fit_rows: Array | None, progress: bool, group: dist.ProcessGroup | None
) -> LearnOptions:
    card = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return LearnOptions(
        fit_on=fit_rows,
        overwrite=config.overwrite,
        label=config.label,
        progress=progress,
        device="cpu" if config.device == "cpu" else card,
        checkpoint_every=config.checkpoint_every,
        group=group,
        align_to=config.align_to,
    )


def _append(config: QuantizeConfig, output: Path, options: LearnOptions) -> tuple[LearnedSids, Array]:
    """The new generation, and which of the folder's items it added."""
    home = Path(str(config.append_to))
    known = SidCatalog.open(home / "catalog")
    learned = append_items(
        home,
        config.data,
        output,
        source=config.source,
        separator=config.separator,
        beam=config.beam,
        options=options,
    )
    content = ItemContent.of_quantizer(
        config.data, load_quantizer(learned.quantizer), home, source=config.source
    )
    return learned, np.logical_and(~known.contains(content.item_ids).numpy(), content.present)


if __name__ == "__main__":
    main()
