"""Learn Semantic IDs: the content of a folder's items -> quantizer -> catalog -> pieces.

The one way to do it, for the commands that quantize, compare and repeat papers, and for programs of one's
own. SIDs are learned where the traffic of the training period is, as in production, and later items are
encoded like new ones; a folder without events is learned from by a random share of its items.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from torchrec_sid.artifact import folder_lock, work_folder, write_json
from torchrec_sid.catalog import SidCatalog, add_last_digit
from torchrec_sid.data.prepared import PreparedLog
from torchrec_sid.data.schema import ItemIndex
from torchrec_sid.errors import SidError
from torchrec_sid.item_content import CLASSES, Array, ItemContent
from torchrec_sid.new_generation import align_to_catalog, earlier_catalog, earlier_quantizer
from torchrec_sid.progress import track
from torchrec_sid.quality import QualityReport, measure_quality
from torchrec_sid.quantizers import Quantizer, ResidualKMeans, load_quantizer, make_quantizer, quantizer_of
from torchrec_sid.quantizers.collectives import Collectives
from torchrec_sid.quantizers.sample import impressed_rows
from torchrec_sid.seeding import derived_generator
from torchrec_sid.sid_stamp import begin, describe_sources, finish, progress_of
from torchrec_sid.tables import PieceTrainerConfig, train_pieces

_CHECKPOINT = "fit.safetensors"
_QUALITY = "quality.json"
_QUANTIZER = "quantizer.safetensors"
_PIECES = "pieces.safetensors"


@dataclass(frozen=True)
class SidRecipe:
    """How to learn one catalog.

    Raises:
        SidError: a field out of range, or a configuration of no quantizer.
    """

    quantizer: Any
    """Configuration of what learns the SIDs, e.g. ``ResidualKMeansConfig``; of a plugin's quantizer too."""
    source: str | None = None
    """Embedding source; default: the folder's own."""
    sources: tuple[str, ...] = ()
    """Embedding sources that a fusion reads; default: all of the folder's."""
    categories: tuple[str, ...] = ()
    """Category columns of items.parquet that it fuses in."""
    separator: str | None = None
    """What stands between several values of a category."""
    impressed: bool = True
    """Fit on items in proportion to their training events, instead of on every item of training once.
    A fusion reads each once."""
    pieces: PieceTrainerConfig | None = None
    """Vocabulary to train on the SIDs, weighted by training events; None: none."""
    held_out: float = 0.1
    """Share of items kept out of the fit where there are no events."""
    seed: int = 0
    """Of the choice of those items; a quantizer has its own."""
    beam: int = 1
    """Hypotheses per level while encoding; above 1 lowers the error at several times the cost."""
    last_digit: int = 0
    """Cardinality of a last digit that tells items of one SID apart; 0 for none."""

    def __post_init__(self) -> None:
        quantizer_of(self.quantizer)
        if not 0 <= self.held_out < 1:
            raise SidError("held_out", str(self.held_out), "Choose a share of at least 0 and below 1.")
        if self.last_digit == 1 or self.last_digit < 0:
            raise SidError("last_digit", str(self.last_digit), "Choose 0, or 2 and more.")
        if self.beam < 1:
            raise SidError("beam", str(self.beam), "Choose 1 or more.")


class LearnedSids(NamedTuple):
    """Where the artefacts are, and what they are."""

    quantizer: Path
    catalog: Path
    pieces: Path | None
    fingerprint: str
    """Of the catalog."""
    quality: Path
    """quality.json: the diagnostics, and how many items have no SID."""

    def report(self) -> QualityReport:
        """The diagnostics."""
        return QualityReport.from_dict(json.loads(self.quality.read_text()))


@dataclass(frozen=True)
class LearnOptions:
    """What a caller may ask for beside the recipe."""

    fit_on: Array | None = None
    """``[N]`` bool over the rows of items.parquet: which to learn from, instead of those of the recipe."""
    overwrite: bool = True
    """Replace the catalog of another recipe, log or content."""
    label: str | None = None
    """Category column of items.parquet for the purity of prefixes."""
    progress: bool = False
    """Show bars."""
    device: torch.device | str = "cpu"
    """Where the quantizer lives."""
    embeddings: str | None = None
    """Folder of the embeddings, where they do not lie with the items; what they hold counts, not where."""
    checkpoint_every: int = 0
    """Steps of a gradient fit between writes of OUTPUT/fit.safetensors, where the same call goes on."""
    group: dist.ProcessGroup | None = None
    """Processes that fit together; all of them call, the first one writes."""
    align_to: str | None = None
    """Folder of an earlier run: its codes lend their names to those of the new fit, and a residual k-means
    begins at its codebooks."""


def learn_sids(
    recipe: SidRecipe,
    data: str | Path,
    log: PreparedLog | None,
    output: str | Path,
    options: LearnOptions | None = None,
) -> LearnedSids:
    """Learn SIDs for every item of a folder that has content.

    A second call with the same recipe, log and content does nothing.

    Args:
        recipe: how.
        data: folder of the items.
        log: the same, prepared; None where it has no events.
        output: folder to write: quantizer.safetensors, catalog/, quality.json, pieces.safetensors.
        options: see :class:`LearnOptions`.

    Raises:
        SidError: a source or column that the folder does not have, content that cannot be learned from, or
            another catalog in the place of this one that must not be overwritten.
    """
    output, options = Path(output), options or LearnOptions()
    wanted, made = _wanted(recipe, data, log.fingerprint if log is not None else None, output, options)
    if Collectives(options.group).agree(not made):
        content = _content(recipe, data, log, options)
        chosen = _choose(recipe, content, log, options)
        labels = _labels(content, options, recipe.separator)
        with folder_lock(output), work_folder(output) as work:
            _publish(_learn(recipe, content, chosen, labels, output, work, options), work, output, wanted)
            (output / _CHECKPOINT).unlink(missing_ok=True)
    return _learned(output, pieces=recipe.pieces is not None)


def refuse_another(
    recipe: SidRecipe, data: str | Path, log: str | None, output: str | Path, options: LearnOptions
) -> None:
    """Refuse what :func:`learn_sids` would refuse to overwrite, before anything is written.

    Args:
        recipe: how SIDs are to be learned.
        data: folder of the items.
        log: fingerprint that the prepared log will have; None where there are no events.
        output: folder of the SIDs.
        options: see :class:`LearnOptions`.

    Raises:
        SidError: ``output`` holds the catalog of another recipe, log or content.
    """
    if not options.overwrite and SidCatalog.exists(Path(output) / "catalog"):
        _wanted(recipe, data, log, Path(output), options)


def _wanted(
    recipe: SidRecipe, data: str | Path, log: str | None, output: Path, options: LearnOptions
) -> tuple[dict[str, Any], bool]:
    """What the SIDs are to be made of, and whether they are made already."""
    wanted = describe_sources(
        {
            "quantizer_type": type(recipe.quantizer).__name__,
            **asdict(recipe),
            **({"aligned_to": earlier_catalog(options.align_to).fingerprint} if options.align_to else {}),
        },
        (data, *((options.embeddings,) if options.embeddings else ())),
        output,
        log=log,
        fit_on=options.fit_on,
        label=options.label,
        processes=Collectives(options.group).size,
    )
    progress = progress_of(output, wanted)
    if progress == "other" and not options.overwrite and SidCatalog.exists(output / "catalog"):
        raise SidError(
            str(output),
            "holds a catalog already, of another recipe, log or content",
            "Choose another folder, or pass --overwrite.",
        )
    return wanted, progress == "made" and (output / _QUALITY).is_file()


def help_fit(
    recipe: SidRecipe,
    data: str | Path,
    log: PreparedLog | None,
    output: str | Path,
    options: LearnOptions,
) -> None:
    """The part of every process of ``options.group`` but the first: train along; nothing is written."""
    if Collectives(options.group).agree(False) and quantizer_of(recipe.quantizer).trains:
        content = _content(recipe, data, log, options)
        _fit(recipe, content, _choose(recipe, content, log, options), Path(output), options)


def append_items(
    home: str | Path,
    data: str | Path,
    output: str | Path,
    *,
    source: str | None = None,
    separator: str | None = None,
    beam: int = 1,
    options: LearnOptions | None = None,
) -> LearnedSids:
    """Encode the items that a catalog lacks with its own frozen quantizer, and add them to it.

    Args:
        home: OUTPUT of the run that made the catalog.
        data: folder with the new items.
        output: folder for quality.json, which is about the new items.
        source: embedding source; default: the folder's own.
        separator: what stands between several values of the label of ``options``.
        beam: hypotheses per level while encoding.
        options: see :class:`LearnOptions`.

    Raises:
        SidError: no new item.
        ArtifactError: ``home`` is damaged, or its quantizer did not make its catalog.
    """
    home, output, options = Path(home), Path(output), options or LearnOptions()
    quantizer = load_quantizer(home / _QUANTIZER).to(options.device)
    content = ItemContent.of_quantizer(data, quantizer, home, source=source)
    labels = _labels(content, options, separator)
    catalog = SidCatalog.open(home / "catalog")
    new = ~catalog.contains(content.item_ids).numpy() & content.present
    if not new.any():
        bare = int((~content.present).sum())
        but = f", but {bare} without content" if bare else ""
        raise SidError(
            str(data), f"every item is in the catalog already{but}", "There is nothing to append."
        )
    pairs = _encoded(quantizer, content, new, beam, options.progress)
    if catalog.spec.levels == quantizer.spec.levels:
        catalog = catalog.append(pairs, quantizer_fingerprint=quantizer.fingerprint)
    else:
        ids, codes = _gathered(pairs)
        digits = add_last_digit(
            quantizer.spec, ids, codes, cardinality=catalog.spec.cardinalities[-1], published=catalog
        )
        catalog = catalog.append(ids, digits.codes, quantizer.fingerprint)
    learned = _Chosen(np.zeros_like(new), None, None, f"the quantizer of {home}")
    _measure(quantizer, content, learned, new, labels, catalog, output, beam, options.progress)
    return LearnedSids(home / _QUANTIZER, home / "catalog", None, catalog.fingerprint, output / _QUALITY)


class _Chosen(NamedTuple):
    """What a fit reads."""

    rows: Array  # [N] bool, items that are learned from
    sample: Tensor | None  # [n] int64 row numbers with repeats, drawn by traffic; None: each row once
    weights: Tensor | None  # [N] int64 training events; None where there are none
    how: str  # in words


def _content(
    recipe: SidRecipe, data: str | Path, log: PreparedLog | None, options: LearnOptions
) -> ItemContent:
    described = None if log is None else log.specification
    return ItemContent.choose(
        data,
        fuses=quantizer_of(recipe.quantizer).fuses,
        source=recipe.source,
        sources=recipe.sources,
        categories=recipe.categories,
        separator=recipe.separator,
        item_id=None if described is None else described.columns.item_id,
        embeddings=options.embeddings,
    )


def _choose(
    recipe: SidRecipe, content: ItemContent, log: PreparedLog | None, options: LearnOptions
) -> _Chosen:
    present = content.present
    if options.fit_on is not None:
        return _Chosen(
            present & np.asarray(options.fit_on, bool), None, None, "rows of the caller's choice"
        )
    if log is None:
        draws = torch.rand(
            int(present.sum()), generator=derived_generator(recipe.seed, "quantize.held_out")
        )
        rows = present.copy()
        rows[present] = (draws >= recipe.held_out).numpy()
        return _Chosen(rows, None, None, f"a random {1 - recipe.held_out:.0%} of the items")
    impressions = torch.from_numpy(_impressions(content, log) * present)
    rows = (impressions > 0).numpy()
    if not rows.any():
        raise SidError(
            str(content.folder.path),
            "no item with content has an event in the training period",
            "Check the times and splits of the events, or choose another source.",
        )
    if content.fuses or not recipe.impressed:
        return _Chosen(rows, None, impressions, "items with training events, each once")
    sample = impressed_rows(impressions, seed=getattr(recipe.quantizer, "seed", 0))
    return _Chosen(rows, sample, impressions, "items by their training events")


def _impressions(content: ItemContent, log: PreparedLog) -> Array:
    """Training events of each item, ``[N]`` int64."""
    at = ItemIndex(np.array(log.item_ids))(content.item_ids)
    counts: Array = np.where(at >= 0, np.array(log.item_train_events)[at], 0)
    return counts


def _learn(
    recipe: SidRecipe,
    content: ItemContent,
    chosen: _Chosen,
    labels: dict[str, Tensor],
    output: Path,
    work: Path,
    options: LearnOptions,
) -> SidCatalog:
    """Fill ``work``: what is refused on the way leaves ``output`` as it was."""
    quantizer, aligned = _fit(recipe, content, chosen, output, options), None
    if options.align_to is not None:
        aligned = align_to_catalog(quantizer, content, chosen.weights, options.align_to, beam=recipe.beam)
    mark = quantizer.save(work / _QUANTIZER)
    if content.classes.names:
        content.classes.write(work / CLASSES)
    spec = quantizer.spec
    pairs = _encoded(quantizer, content, content.present, recipe.beam, options.progress)
    path = work / "catalog"
    if recipe.last_digit:
        ids, codes = _gathered(pairs)
        digits = add_last_digit(spec, ids, codes, cardinality=recipe.last_digit)
        catalog = SidCatalog.create(path, digits.spec, ids, digits.codes, mark)
    else:
        catalog = SidCatalog.create(path, spec, pairs, quantizer_fingerprint=mark)
    if recipe.pieces is not None:
        ids = torch.from_numpy(content.item_ids[content.present])
        weights = None if chosen.weights is None else chosen.weights[torch.from_numpy(content.present)]
        pieces = train_pieces(catalog.spec, catalog.codes(ids), recipe.pieces, weights=weights)
        pieces.save(work / _PIECES)
    everything = content.present
    _measure(
        quantizer,
        content,
        chosen,
        everything,
        labels,
        catalog,
        work,
        recipe.beam,
        options.progress,
        aligned,
    )
    return catalog


def _publish(made: SidCatalog, work: Path, output: Path, wanted: dict[str, Any]) -> None:
    """Put what is complete into place; readers of the catalog that was there keep its parts."""
    files = [path.name for path in work.iterdir() if path.is_file() and not path.name.startswith(".")]
    begin(output, wanted)
    mark = made.quantizer_fingerprint
    SidCatalog.create(
        output / "catalog", made.spec, made.batches(), quantizer_fingerprint=mark, overwrite=True
    )
    for name in files:
        (work / name).replace(output / name)
    finish(output, wanted, tuple(name for name in files if name != _QUALITY))


def _labels(content: ItemContent, options: LearnOptions, separator: str | None) -> dict[str, Tensor]:
    return {options.label: content.label(options.label, separator)} if options.label else {}


def _fit(
    recipe: SidRecipe, content: ItemContent, chosen: _Chosen, output: Path, options: LearnOptions
) -> Quantizer:
    quantizer = make_quantizer(content.shape, recipe.quantizer, device=options.device)
    data = content.data(chosen.rows) if chosen.sample is None else content.take(chosen.sample)
    more: dict[str, Any] = {}
    if quantizer.trains:
        more["group"] = options.group
        if options.checkpoint_every:
            more |= {"checkpoint": output / _CHECKPOINT, "checkpoint_every": options.checkpoint_every}
    if options.align_to is not None and isinstance(quantizer, ResidualKMeans):
        more["start"] = earlier_quantizer(options.align_to, quantizer)
    quantizer.fit(data, progress=options.progress, **more)
    return quantizer.eval()


def _encoded(
    quantizer: Quantizer, content: ItemContent, rows: Array, beam: int, progress: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Item ids and codes of the chosen rows, batch by batch."""
    ids = torch.from_numpy(content.item_ids[rows])
    begin = 0
    stream = quantizer.rows(content.data(rows))
    for batch in track(stream, "encoding", total=-(-len(ids) // 16_384), show=progress):
        yield ids[begin : begin + len(batch)], quantizer.encode(batch, beam=beam).cpu()
        begin += len(batch)


def _gathered(pairs: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    parts = list(pairs)
    return torch.cat([ids for ids, _ in parts]), torch.cat([codes for _, codes in parts])


def _measure(
    quantizer: Quantizer,
    content: ItemContent,
    chosen: _Chosen,
    rows: Array,
    labels: dict[str, Tensor],
    catalog: SidCatalog,
    output: Path,
    beam: int,
    progress: bool,
    aligned: dict[str, Any] | None = None,
) -> None:
    """Write quality.json about the chosen rows; errors are those of items that were not learned from."""
    held_out = rows & ~chosen.rows
    measured = held_out if held_out.any() else rows
    quality = measure_quality(
        quantizer,
        content.data(measured),
        items=content.data(rows),
        labels={name: values[torch.from_numpy(rows)] for name, values in labels.items()},
        progress=progress,
        beam=beam,
    )
    kept = content.source_reports(quantizer, measured, beam)
    figures = {
        "data": str(content.folder.path),
        "source": "+".join(content.embeddings),
        "sources": kept,
        "fitted_on": {"items": int(chosen.rows.sum()), "how": chosen.how},
        "without_sid": content.missing(),
        "quantizer": quantizer.kind,
        "quantizer_fingerprint": quantizer.fingerprint,
        "catalog_fingerprint": catalog.fingerprint,
        "catalog_generation": catalog.generation,
        "catalog_items": len(catalog),
        "alignment": aligned,
    }
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / _QUALITY, {**figures, **quality.to_dict()})


def _learned(output: Path, *, pieces: bool) -> LearnedSids:
    catalog = output / "catalog"
    return LearnedSids(
        output / _QUANTIZER,
        catalog,
        output / _PIECES if pieces else None,
        SidCatalog.open(catalog, verify=False).fingerprint,
        output / _QUALITY,
    )
