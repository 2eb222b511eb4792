"""What a quantizer reads of a log folder: one embedding per item, or several sources side by side."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from torchrec_sid.artifact import write_json
from torchrec_sid.data.schema import LogFolder
from torchrec_sid.errors import ArtifactError, SidError
from torchrec_sid.quantizers import (
    CategorySource,
    EmbeddingSource,
    Quantizer,
    VqFusion,
    VqFusionConfig,
)
from torchrec_sid.quantizers.fusion.source_rows import FusionData
from torchrec_sid.streams import EmbeddingStream

Array = np.ndarray[Any, Any]
_CLASSES = "classes.json"


def item_stream(folder: LogFolder, rows: Array) -> EmbeddingStream:
    """The embeddings of the chosen rows ``[N]`` bool in the folder's default source, in item order.

    Raises:
        SidError: no row is chosen.
    """
    stream = folder.embeddings()
    if not rows.any():
        raise SidError(str(folder.path), "no item to read", "Lower held_out or add items.")
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


@dataclass(frozen=True)
class Classes:
    """What the classes of fused categories stand for."""

    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """By category column, the values of classes 0, 1, ..."""
    separator: str | None = None
    """What stands between several values of one item."""

    @classmethod
    def read(cls, path: Path) -> Classes:
        """From the JSON that :func:`fit_fusion` wrote.

        Raises:
            ArtifactError: no such file.
        """
        if not path.is_file():
            raise ArtifactError(str(path), "no such file", "Copy the whole folder of the earlier run.")
        body = json.loads(path.read_text())
        return cls({column: tuple(names) for column, names in body["names"].items()}, body["separator"])


class FusionRows(NamedTuple):
    """Arguments of :class:`VqFusion` methods."""

    data: dict[str, Array]
    present: dict[str, Array]


def fusion_rows(
    folder: LogFolder, embeddings: tuple[str, ...], classes: Classes, rows: Array
) -> FusionRows:
    """Embeddings and categories of the chosen rows ``[N]`` bool, and which items have them.

    Values of a category that are not among the classes count as missing.
    """
    data: dict[str, Array] = {}
    present: dict[str, Array] = {}
    for name in embeddings:
        source = folder.source(name)
        data[name] = source.matrix if rows.all() else source.matrix[rows]
        present[name] = source.present[rows]
    for column, names in classes.names.items():
        category = folder.category(column, classes.separator)
        shares = np.zeros((int(rows.sum()), len(names)), np.float32)
        for mine, name in enumerate(category.names):
            if name in names:
                shares[:, names.index(name)] = category.probabilities[rows, mine]
        total = shares.sum(axis=1, keepdims=True)
        data[column] = shares / np.maximum(total, 1e-6)
        present[column] = total[:, 0] > 0
    return FusionRows(data, present)


def fit_fusion(
    folder: LogFolder,
    embeddings: tuple[str, ...],
    categories: tuple[str, ...],
    separator: str | None,
    config: VqFusionConfig,
    rows: Array,
    output: Path,
    options: Mapping[str, Any],
    device: torch.device | None = None,
) -> VqFusion:
    """Fuse the chosen sources; the first process writes what the classes stand for to OUTPUT/classes.json.

    ``options`` are more arguments of :meth:`VqFusion.fit`, ``device`` is where the quantizer lives.

    Raises:
        SidError: an unknown source or column, or one name for both.
    """
    embeddings = embeddings or folder.sources
    both = sorted(set(embeddings) & set(categories))
    if both:
        raise SidError("categories", f"{both} are embedding sources too", "Rename one of the two.")
    names = {column: folder.category(column, separator).names for column in categories}
    classes = Classes(names, separator)
    sources = {name: EmbeddingSource(folder.source(name).file.dim) for name in embeddings}
    labels = {column: CategorySource(len(values)) for column, values in names.items()}
    fusion = VqFusion({**sources, **labels}, config, device=device)
    chosen = fusion_rows(folder, embeddings, classes, rows)
    fusion.fit(chosen.data, present=chosen.present, **options)
    group = options.get("group")
    if group is None or dist.get_rank(group) == 0:
        write_json(output / _CLASSES, asdict(classes))
    return fusion


class Content:
    """The items of a folder as vectors, and a quantizer of such vectors.

    Args:
        folder: the items.
        quantizer: fitted.
        home: folder of the run that fitted it, with ``classes.json`` where it fuses categories.

    Raises:
        SidError: a source that the folder does not have.
        ArtifactError: ``classes.json`` is missing.
    """

    def __init__(self, folder: LogFolder, quantizer: Quantizer, home: Path) -> None:
        self.folder = folder
        self.fusion = quantizer if isinstance(quantizer, VqFusion) else None
        self.view = quantizer
        """Encodes and decodes the vectors."""
        self._classes = Classes()
        self._embeddings: tuple[str, ...] = ()
        if self.fusion is not None:
            columns = [n for n, s in self.fusion.sources.items() if isinstance(s, CategorySource)]
            self._embeddings = tuple(n for n in self.fusion.sources if n not in columns)
            if columns:
                self._classes = Classes.read(home / _CLASSES)

    def stream(self, rows: Array) -> EmbeddingStream:
        """Vectors of the chosen rows ``[N]`` bool, in item order."""
        fusion = self.fusion
        if fusion is None:
            return item_stream(self.folder, rows)
        chosen = self._rows(rows)
        return fusion.rows(FusionData(chosen.data, fusion.sources, chosen.present))

    def sources(self, rows: Array, beam: int) -> dict[str, dict[str, Any]]:
        """What a fused SID keeps of each source of the chosen rows; empty for other quantizers."""
        if self.fusion is None:
            return {}
        chosen = self._rows(rows)
        reports = self.fusion.report(chosen.data, present=chosen.present, beam=beam)
        return {name: asdict(report) for name, report in reports.items()}

    def _rows(self, rows: Array) -> FusionRows:
        return fusion_rows(self.folder, self._embeddings, self._classes, rows)
