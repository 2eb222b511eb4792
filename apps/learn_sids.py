"""Learn the SIDs that a ranker reads: quantizer, catalog and, if asked, a SentencePiece vocabulary."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from torchrec_sid.artifact import write_json
from torchrec_sid.catalog import SidCatalog
from torchrec_sid.data.prepared import PreparedLog
from torchrec_sid.data.schema import LogFolder
from torchrec_sid.models.channels import Arm
from torchrec_sid.quality import measure_quality
from torchrec_sid.quantizers import (
    Quantizer,
    VqFusionConfig,
    make_quantizer,
)
from torchrec_sid.quantizers.sample import sample_impressed
from torchrec_sid.tables import PieceTrainerConfig, train_pieces

from .quantize_content import Content, fit_fusion
from .quantize_report import plot_quality


@dataclass(frozen=True)
class SidRecipe:
    """How to learn one catalog."""

    quantizer: Any
    """What learns the SIDs."""
    source: str | None = None
    """Embedding source; default: the log's own. Fusion takes ``sources``."""
    sources: tuple[str, ...] = ()
    """Embedding sources that VqFusion fuses; default: all of the log's."""
    categories: tuple[str, ...] = ()
    """Category columns of items.parquet that it fuses in."""
    separator: str | None = None
    """What stands between several values of a category."""
    impressed: bool = True
    """Fit on items in proportion to their training events, instead of on every item of training once."""
    pieces: PieceTrainerConfig | None = None
    """Vocabulary to train on the SIDs, weighted by training events; None: none."""


class LearnedSids(NamedTuple):
    """Where the artefacts are, and what they are."""

    quantizer: Path
    catalog: Path
    pieces: Path | None
    fingerprint: str
    """Of the catalog."""


def learn_sids(recipe: SidRecipe, data: Path, log: PreparedLog, output: Path) -> LearnedSids:
    """Learn on the training period, as in production; encode later items like new ones.

    A second call with the same recipe and log does nothing.

    Args:
        recipe: how.
        data: folder of the log.
        log: the same, prepared.
        output: folder to write.

    Raises:
        SidError: a source that the log does not have, or embeddings that cannot be learned from.
    """
    stamp = output / "recipe.json"
    kind = type(recipe.quantizer).__name__
    wanted = json.loads(json.dumps({"log": log.fingerprint, "kind": kind, "recipe": asdict(recipe)}))
    if not stamp.is_file() or json.loads(stamp.read_text()) != wanted:
        _learn(recipe, data, log, output)
        write_json(stamp, wanted)
    pieces = output / "pieces.safetensors"
    catalog = output / "catalog"
    return LearnedSids(
        output / "quantizer.safetensors",
        catalog,
        pieces if recipe.pieces is not None else None,
        SidCatalog.open(catalog).fingerprint,
    )


def sid_options(arm: Arm, tables: LearnedSids | None, side: LearnedSids | None) -> dict[str, Any]:
    """The options of a ``TrainConfig`` that give an arm the SIDs that it reads, and no others."""
    options = {}
    if "catalog" in arm.requires and tables is not None:
        options["catalog"] = str(tables.catalog)
    if "pieces" in arm.requires and tables is not None and tables.pieces is not None:
        options["pieces"] = str(tables.pieces)
    if "side_catalog" in arm.requires and side is not None:
        options |= {"side_catalog": str(side.catalog), "side_quantizer": str(side.quantizer)}
    return options


def _learn(recipe: SidRecipe, data: Path, log: PreparedLog, output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    impressions = torch.from_numpy(np.array(log.item_train_events))
    seen = impressions > 0
    folder = LogFolder.open(data)
    if isinstance(recipe.quantizer, VqFusionConfig):
        quantizer, codes = _fuse(recipe, folder, seen, output)
    else:
        matrix = torch.from_numpy(np.array(folder.embedding_matrix(recipe.source))).float()
        quantizer = make_quantizer(matrix.shape[1], recipe.quantizer)
        sample = matrix[seen]
        if recipe.impressed:
            sample = sample_impressed(matrix, impressions, seed=recipe.quantizer.seed)
        quantizer.fit(sample)
        quality = measure_quality(quantizer, matrix if bool(seen.all()) else matrix[~seen])
        write_json(output / "quality.json", quality.to_dict())
        plot_quality(quality, output / "quality.png")
        codes = quantizer.encode(matrix)
    mark = quantizer.save(output / "quantizer.safetensors")
    ids = np.array(log.item_ids)
    SidCatalog.create(output / "catalog", quantizer.spec, ids, codes, mark, overwrite=True)
    if recipe.pieces is not None:
        pieces = train_pieces(quantizer.spec, codes, recipe.pieces, weights=impressions)
        pieces.save(output / "pieces.safetensors")


def _fuse(recipe: SidRecipe, folder: LogFolder, seen: Tensor, output: Path) -> tuple[Quantizer, Tensor]:
    config = recipe.quantizer
    assert isinstance(config, VqFusionConfig)
    fusion = fit_fusion(
        folder, recipe.sources, recipe.categories, recipe.separator, config, seen.numpy(), output, {}
    )
    content = Content(folder, fusion, output)
    everything = np.ones(len(seen), bool)
    write_json(output / "sources.json", content.sources(everything, 1))
    return fusion, torch.cat([content.view.encode(batch) for batch in content.stream(everything)])
