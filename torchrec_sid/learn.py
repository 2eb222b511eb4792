"""Learn Semantic IDs: the content of a folder's items -> quantizer -> catalog -> pieces.

The one way to do it, for the commands that quantize, compare and repeat papers, and for programs of one's
own. SIDs are learned where the traffic of the training period is, as in production, and later items are
encoded like new ones; a folder without events is learned from by a random share of its items.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from torchrec_sid.artifact import folder_lock, read_manifest, write_json
from torchrec_sid.artifact.place import Place
from torchrec_sid.catalog import SidCatalog, add_last_digit
from torchrec_sid.data.fingerprint import file_entry
from torchrec_sid.data.lake import folder_at
from torchrec_sid.data.prepared import PreparedLog
from torchrec_sid.data.schema import ItemIndex
from torchrec_sid.errors import SidError
from torchrec_sid.item_content import CLASSES, Array, ItemContent
from torchrec_sid.progress import track
from torchrec_sid.quality import QualityReport, measure_quality
from torchrec_sid.quantizers import Quantizer, load_quantizer, make_quantizer, quantizer_of
from torchrec_sid.quantizers.collectives import Collectives
from torchrec_sid.quantizers.sample import impressed_rows
from torchrec_sid.seeding import derived_generator
from torchrec_sid.tables import PieceTrainerConfig, train_pieces

_STAMP = "recipe.json"
_CHECKPOINT = "fit.safetensors"
_QUALITY = "quality.json"


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
    """What a caller may ask for beside the recipe; no SID depends on it, except by the number of ranks."""

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
    wanted = _identity(recipe, data, log, options, output)
    made = _is_made(output, wanted)
    if not made and not options.overwrite and SidCatalog.exists(output / "catalog"):
        raise SidError(
            str(output),
            "holds a catalog already, of another recipe, log or content",
            "Choose another folder, or pass --overwrite.",
        )
    if Collectives(options.group).agree(not made):
        content = _content(recipe, data, log, options)
        chosen = _choose(recipe, content, log, options)
        labels = _labels(content, options, recipe.separator)
        with folder_lock(output):
            # What is there is nobody's until all of it is written.
            (output / _STAMP).unlink(missing_ok=True)
            _learn(recipe, content, chosen, labels, output, options)
            fingerprint = SidCatalog.open(output / "catalog", verify=False).fingerprint
            write_json(output / _STAMP, {**wanted, "catalog": fingerprint})
    return _learned(output, pieces=recipe.pieces is not None)


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
    quantizer = load_quantizer(home / "quantizer.safetensors").to(options.device)
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
    return LearnedSids(
        home / "quantizer.safetensors", home / "catalog", None, catalog.fingerprint, output / _QUALITY
    )


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
    options: LearnOptions,
) -> None:
    quantizer = _fit(recipe, content, chosen, output, options)
    output.mkdir(parents=True, exist_ok=True)
    mark = quantizer.save(output / "quantizer.safetensors")
    if content.classes.names:
        content.classes.write(output / CLASSES)
    (output / _CHECKPOINT).unlink(missing_ok=True)
    spec = quantizer.spec
    pairs = _encoded(quantizer, content, content.present, recipe.beam, options.progress)
    path = output / "catalog"
    if recipe.last_digit:
        ids, codes = _gathered(pairs)
        digits = add_last_digit(spec, ids, codes, cardinality=recipe.last_digit)
        catalog = SidCatalog.create(path, digits.spec, ids, digits.codes, mark, overwrite=True)
    else:
        catalog = SidCatalog.create(path, spec, pairs, quantizer_fingerprint=mark, overwrite=True)
    if recipe.pieces is not None:
        ids = torch.from_numpy(content.item_ids[content.present])
        weights = None if chosen.weights is None else chosen.weights[torch.from_numpy(content.present)]
        pieces = train_pieces(catalog.spec, catalog.codes(ids), recipe.pieces, weights=weights)
        pieces.save(output / "pieces.safetensors")
    everything = content.present
    _measure(
        quantizer,
        content,
        chosen,
        everything,
        labels,
        catalog,
        output,
        recipe.beam,
        options.progress,
    )


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
    }
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / _QUALITY, {**figures, **quality.to_dict()})


def _learned(output: Path, *, pieces: bool) -> LearnedSids:
    catalog = output / "catalog"
    return LearnedSids(
        output / "quantizer.safetensors",
        catalog,
        output / "pieces.safetensors" if pieces else None,
        SidCatalog.open(catalog, verify=False).fingerprint,
        output / _QUALITY,
    )


# ---- what the artefacts of a folder were made of


def _identity(
    recipe: SidRecipe,
    data: str | Path,
    log: PreparedLog | None,
    options: LearnOptions,
    output: Path,
) -> dict[str, Any]:
    """Recipe, log and content; files that did not change since the last stamp are not hashed again."""
    fit_on = options.fit_on
    plain = {
        "recipe": asdict(recipe),
        "quantizer": type(recipe.quantizer).__name__,
        "log": log.fingerprint if log is not None else None,
        "fit_on": None if fit_on is None else hashlib.sha256(np.packbits(fit_on).tobytes()).hexdigest(),
        "label": options.label,
        "processes": Collectives(options.group).size,
        "inputs": _inputs(data, options.embeddings, _read_stamp(output).get("inputs", {})),
    }
    identity: dict[str, Any] = json.loads(json.dumps(plain))
    return identity


def _inputs(data: str | Path, embeddings: str | None, known: dict[str, Any]) -> dict[str, Any]:
    """Size, modification time and SHA-256 of the items and their embeddings, by file."""
    found = {}
    for folder in (data, *((embeddings,) if embeddings else ())):
        place = folder_at(folder)
        tops = [top for top in place.iterdir() if top.name.startswith("item")]
        for path in sorted((file for top in tops for file in _files_below(top)), key=str):
            name = str(path).removeprefix(f"{place}/")
            found[name] = file_entry(path, known.get(name, {}))
    return found


def _files_below(path: Place) -> list[Place]:
    if path.is_file():
        return [path]
    return [file for below in path.iterdir() for file in _files_below(below)]


def _read_stamp(output: Path) -> dict[str, Any]:
    try:
        stamp: dict[str, Any] = json.loads((output / _STAMP).read_text())
    except (OSError, ValueError):
        return {}
    return stamp


def _is_made(output: Path, wanted: dict[str, Any]) -> bool:
    """Whether the stamp says that ``wanted`` made what is there, and the catalog and quantizer agree."""
    stamp = _read_stamp(output)
    mark = stamp.pop("catalog", None)
    if not _same_content(stamp, wanted):
        return False
    try:
        catalog = SidCatalog.open(output / "catalog", verify=False)
        quantizer = read_manifest(output / "quantizer.safetensors").contents["fingerprint"]
    except SidError:
        return False
    whole = (output / _QUALITY).is_file()
    whole &= wanted["recipe"]["pieces"] is None or (output / "pieces.safetensors").is_file()
    return whole and catalog.extends(str(mark)) and catalog.quantizer_fingerprint == quantizer


def _same_content(stamp: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Equal but for the times of files."""

    def hashes(identity: dict[str, Any]) -> dict[str, Any]:
        return {name: entry["sha256"] for name, entry in identity.get("inputs", {}).items()}

    rest = {k: v for k, v in stamp.items() if k != "inputs"}
    return rest == {k: v for k, v in wanted.items() if k != "inputs"} and hashes(stamp) == hashes(wanted)
