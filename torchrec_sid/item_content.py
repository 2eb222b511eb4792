"""What a quantizer reads of a folder's items: one embedding of each, or several sources side by side."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchrec_sid.artifact import write_json
from torchrec_sid.data.schema import LogFolder
from torchrec_sid.errors import ArtifactError, SidError
from torchrec_sid.quantizers import CategorySource, EmbeddingSource, Quantizer, VqFusion
from torchrec_sid.quantizers.fusion.source_rows import FusionData, SparseShares
from torchrec_sid.streams import EmbeddingStream

Array = np.ndarray[Any, Any]
CLASSES = "classes.json"


@dataclass(frozen=True)
class Classes:
    """What the classes of fused categories stand for."""

    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """By category column, the values of classes 0, 1, ..."""
    separator: str | None = None
    """What stands between several values of one item."""

    @classmethod
    def read(cls, path: Path) -> Classes:
        """From what :meth:`write` wrote.

        Raises:
            ArtifactError: no such file.
        """
        if not path.is_file():
            raise ArtifactError(str(path), "no such file", "Copy the whole folder of the earlier run.")
        body = json.loads(path.read_text())
        return cls({column: tuple(names) for column, names in body["names"].items()}, body["separator"])

    def write(self, path: Path) -> None:
        """As JSON."""
        write_json(path, asdict(self))


@dataclass(frozen=True)
class ItemContent:
    """The content of a folder's items, for one quantizer.

    Rows ``[N]`` bool choose among all items of the folder; those without any content that the quantizer
    reads (:attr:`present`) cannot be chosen.
    """

    folder: LogFolder
    embeddings: tuple[str, ...]
    """Embedding sources that are read; one only, unless the quantizer fuses."""
    classes: Classes
    """Category columns that are fused in."""
    fuses: bool
    """Whether the quantizer reads a mapping of sources instead of one embedding."""

    @classmethod
    def choose(
        cls,
        data: str | Path,
        *,
        fuses: bool,
        source: str | None = None,
        sources: Sequence[str] = (),
        categories: Sequence[str] = (),
        separator: str | None = None,
        item_id: str | None = None,
        embeddings: str | Path | None = None,
    ) -> ItemContent:
        """What a quantizer that is to be fitted reads.

        Args:
            data: folder of the items.
            fuses: whether the quantizer reads several sources.
            source: the embedding source of a quantizer that reads one; default: the folder's own.
            sources: embedding sources that are fused; default: all.
            categories: category columns of items.parquet that are fused in.
            separator: what stands between several values of a category.
            item_id: key of items.parquet; None: a name that people use.
            embeddings: folder of the embeddings, where they do not lie in ``data``.

        Raises:
            SidError: an unknown source or column, or one name for both.
        """
        # Items without an embedding are read too, so that they can be counted.
        folder = LogFolder.open(
            data, source=None if fuses else source, events=False, whole=True, item_id=item_id,
            embeddings=embeddings,
        )  # fmt: skip
        if not fuses:
            return cls(folder, (folder.source().file.name,), Classes(), False)
        chosen = tuple(sources) or folder.sources
        both = sorted(set(chosen) & set(categories))
        if both:
            raise SidError("categories", f"{both} are embedding sources too", "Rename one of the two.")
        names = {column: folder.category(column, separator).names for column in categories}
        return cls(folder, chosen, Classes(names, separator), True)

    @classmethod
    def of_quantizer(
        cls, data: str | Path, quantizer: Quantizer, home: Path, *, source: str | None = None
    ) -> ItemContent:
        """What a fitted quantizer reads, of the same or other items.

        Args:
            data: folder of the items.
            quantizer: fitted.
            home: folder of the run that fitted it, with ``classes.json`` where it fuses categories.
            source: the embedding source of a quantizer that reads one.

        Raises:
            SidError: a source that the folder does not have.
            ArtifactError: ``classes.json`` is missing.
        """
        if not type(quantizer).fuses:
            return cls.choose(data, fuses=False, source=source)
        names: Mapping[str, Any] = quantizer.sources  # type: ignore[assignment]
        columns = [name for name, kind in names.items() if isinstance(kind, CategorySource)]
        classes = Classes.read(home / CLASSES) if columns else Classes()
        embeddings = tuple(name for name in names if name not in columns)
        return cls(LogFolder.open(data, events=False, whole=True), embeddings, classes, True)

    @property
    def item_ids(self) -> Array:
        """``[N]`` int64, of all items."""
        return self.folder.item_ids

    @property
    def shape(self) -> Any:
        """What ``make_quantizer`` takes: d, or the sources by name."""
        dims = {name: self.folder.source(name).file.dim for name in self.embeddings}
        if not self.fuses:
            return dims[self.embeddings[0]]
        sources: dict[str, Any] = {name: EmbeddingSource(dim) for name, dim in dims.items()}
        return sources | {name: CategorySource(len(values)) for name, values in self.classes.names.items()}

    @cached_property
    def present(self) -> Array:
        """``[N]`` bool: whether an item has any content that the quantizer reads."""
        has = np.zeros(len(self.folder), bool)
        for name in self.embeddings:
            has |= self.folder.source(name).present
        for column in self.classes.names:
            has |= self._shares(column).present.numpy()
        return has

    def missing(self) -> dict[str, int]:
        """By source, how many items lack it; under ``any`` those that lack all of them."""
        counts = {name: int((~self.folder.source(name).present).sum()) for name in self.embeddings}
        counts |= {c: int((~self._shares(c).present).sum()) for c in self.classes.names}
        return {**counts, "any": int((~self.present).sum())}

    def data(self, rows: Array) -> Any:
        """The chosen rows as ``fit`` and ``rows`` of the quantizer take them, in item order.

        Raises:
            SidError: no row is chosen.
        """
        if not rows.any():
            raise SidError(str(self.folder.path), "no item to read", "Lower held_out or add items.")
        if not self.fuses:
            return self._stream(rows)
        values: dict[str, Any] = {}
        present: dict[str, Any] = {}
        for name in self.embeddings:
            source = self.folder.source(name)
            values[name] = source.matrix if rows.all() else source.matrix[rows]
            present[name] = source.present[rows]
        for column in self.classes.names:
            values[column] = self._shares(column, rows)
            present[column] = values[column].present
        return FusionData(values, self.shape, present)

    def take(self, rows: Tensor) -> Tensor:
        """Embeddings ``[n, d]`` float32 at row numbers ``[n]``, which may repeat; of one source."""
        matrix = self.folder.source(self.embeddings[0]).matrix
        return torch.from_numpy(np.asarray(matrix[rows.numpy()])).float()

    def source_reports(self, quantizer: Quantizer, rows: Array, beam: int) -> dict[str, dict[str, Any]]:
        """What a fused SID keeps of each source of the chosen rows; empty for other quantizers."""
        if not isinstance(quantizer, VqFusion):
            return {}
        reports = quantizer.report(self.data(rows), beam=beam)
        return {name: asdict(report) for name, report in reports.items()}

    def label(self, column: str, separator: str | None) -> Tensor:
        """One class of each item for the purity of prefixes, ``[N]`` int64: the first of its categories.

        Items without one are a class of their own.
        """
        category = self.folder.category(column, separator)
        lengths = np.diff(category.offsets)
        owner = np.repeat(np.arange(len(lengths)), lengths)
        # The greatest share of each item comes first, of equal ones the first class.
        order = np.lexsort((category.classes, -category.shares, owner))
        label = np.full(len(lengths), len(category.names))
        has = lengths > 0
        label[has] = category.classes[order[category.offsets[:-1][has]]]
        return torch.from_numpy(label)

    def _stream(self, rows: Array) -> EmbeddingStream:
        source = self.folder.source(self.embeddings[0])
        stream = source.stream()
        if not bool(source.present[rows].all()):
            raise SidError(stream.name, "items without an embedding", "Choose among those that have one.")
        mask = torch.from_numpy(rows[source.present])
        if bool(mask.all()):
            return stream

        def start() -> Iterator[Tensor]:
            begin = 0
            for batch in stream:
                kept = batch[mask[begin : begin + len(batch)]]
                begin += len(batch)
                if len(kept):
                    yield kept

        return EmbeddingStream(start, stream.dim, int(rows.sum()), stream.name)

    def _shares(self, column: str, rows: Array | None = None) -> SparseShares:
        """Of all items, or of those chosen by ``rows`` ``[N]`` bool: values that are not among the classes
        count as missing, and the others share what is left."""
        names = {name: number for number, name in enumerate(self.classes.names[column])}
        category = self.folder.category(column, self.classes.separator)
        theirs = np.array([names.get(name, -1) for name in category.names], np.int64)
        owner = np.repeat(np.arange(len(self.folder)), np.diff(category.offsets))
        classes, kept = theirs[category.classes], theirs[category.classes] >= 0
        if rows is not None:
            kept &= rows[owner]
            owner = (np.cumsum(rows) - 1)[owner]
        items = len(self.folder) if rows is None else int(rows.sum())
        owner, classes, shares = owner[kept], classes[kept], category.shares[kept]
        totals = np.bincount(owner, shares, minlength=items)
        shares = (shares / np.maximum(totals[owner], 1e-6)).astype(np.float32)
        offsets = np.append(0, np.cumsum(np.bincount(owner, minlength=items)))
        return SparseShares(
            torch.from_numpy(offsets), torch.from_numpy(classes), torch.from_numpy(shares), len(names)
        )
