"""Rows of several sources side by side, streamed in step, with flags for what is missing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from torchrec_sid.errors import SidError
from torchrec_sid.quantizers.fusion.sources import CategorySource, Source
from torchrec_sid.streams import EmbeddingStream, check_batch, open_stream

_ROWS = 8192
_ELEMENTS = 1 << 26
"""Of a batch, at most: sources with many columns come in batches of fewer rows."""


@dataclass(frozen=True)
class SparseShares:
    """Distributions over many classes, of which each row has few: ``[N, classes]`` without its zeros.

    A row without a value is one of zeros; its flag in ``present`` says that it is missing.
    """

    offsets: Tensor
    """``[N + 1]`` int64: row i has the values ``offsets[i]`` to ``offsets[i + 1]``."""
    members: Tensor
    """``[values]`` int64, classes, each once in a row."""
    shares: Tensor
    """``[values]`` float32, above 0; those of a row sum to 1."""
    classes: int

    ndim = 2

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def shape(self) -> tuple[int, int]:
        """``(N, classes)``."""
        return len(self), self.classes

    @property
    def present(self) -> Tensor:
        """``[N]`` bool: whether a row has a value."""
        return self.offsets.diff() > 0

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        """The rows ``[n, classes]`` float32, zeros included."""
        index = torch.arange(len(self))[rows]
        begin, lengths = self.offsets[index], self.offsets.diff()[index]
        owner = torch.repeat_interleave(torch.arange(len(index)), lengths)
        first = lengths.cumsum(0) - lengths
        at = torch.arange(len(owner)) - first[owner] + begin[owner]
        dense = torch.zeros(len(index), self.classes)
        dense[owner, self.members[at]] = self.shares[at]
        return dense


class _Opened(NamedTuple):
    name: str
    source: Source
    data: Tensor | np.ndarray[Any, Any] | SparseShares | EmbeddingStream
    present: Tensor | None  # [N] bool

    def rows(self) -> int | None:
        return self.data.rows if isinstance(self.data, EmbeddingStream) else len(self.data)


class FusionData:
    """Every ``iter()`` is a pass over raw rows ``[n, D + K]``: values (zeros where missing), then flags.

    Args:
        data: by source name. An embedding is anything
            :func:`~torchrec_sid.streams.open_stream` takes; a category ``[N]`` integers (-1 is
            missing) or ``[N, classes]`` probabilities, as tensor, array, ``.npy`` file or
            :class:`SparseShares`.
        sources: what the columns mean.
        present: by source name ``[N]`` bool, where rows of that source are missing; their values are
            ignored, but must be finite. A source left out of ``data`` is missing everywhere.

    Raises:
        SidError: an unknown source, different numbers of rows, a row without any source; in a pass, a
            label outside the classes, probabilities that are negative or do not sum to 1, or what
            :func:`~torchrec_sid.streams.open_stream` refuses.
    """

    def __init__(
        self,
        data: Mapping[str, Any],
        sources: Mapping[str, Source],
        present: Mapping[str, Any] | None = None,
    ) -> None:
        unknown = sorted({*data, *(present or {})} - set(sources))
        if unknown or not data:
            raise SidError("data", f"sources {unknown or 'none'}", f"Pass some of {sorted(sources)}.")
        self._sources = dict(sources)
        self._opened = {
            n: _open(n, sources[n], data[n], (present or {}).get(n)) for n in sources if n in data
        }
        known = {n: o.rows() for n, o in self._opened.items() if o.rows() is not None}
        known |= {
            f"present[{n!r}]": len(o.present) for n, o in self._opened.items() if o.present is not None
        }
        if len(set(known.values())) > 1:
            raise SidError(
                "data", f"rows {known}", "Every source needs one row per item, in the same order."
            )
        self.rows = next(iter(known.values()), None)

    def __iter__(self) -> Iterator[Tensor]:
        begin = 0
        for pieces in _in_step({n: _batches(o) for n, o in self._opened.items()}):
            batch = self._join(pieces, begin)
            begin += len(batch)
            yield batch

    def gather(self, index: Tensor) -> Tensor:
        """Raw rows ``[n, D + K]`` of the items at ``index`` ``[n]``.

        Raises:
            SidError: a source that is a stream and has no random access.
        """
        pieces = {}
        for name, opened in self._opened.items():
            if isinstance(opened.data, EmbeddingStream):
                raise SidError(f"source {name!r}", "a stream", "Pairs need tensors, arrays or .npy files.")
            whole = opened.data
            picked = whole[index.numpy()] if isinstance(whole, np.ndarray) else whole[index]
            present = None if opened.present is None else opened.present[index]
            pieces[name] = _values(opened, torch.as_tensor(picked), present, 0)
        return self._join(pieces, 0)

    def _join(self, pieces: Mapping[str, Tensor], begin: int) -> Tensor:
        rows = len(next(iter(pieces.values())))
        columns, flags = [], []
        for name, source in self._sources.items():
            piece = pieces.get(name)
            columns.append(torch.zeros(rows, source.width) if piece is None else piece[:, :-1])
            flags.append(torch.zeros(rows) if piece is None else piece[:, -1])
        present = torch.stack([f.to(columns[0].device) for f in flags], dim=1)
        empty = (present.sum(1) == 0).nonzero()
        if len(empty):
            raise SidError(
                "data",
                f"row {begin + int(empty[0])} has no source at all",
                "Drop the item, or give it at least one source.",
            )
        return torch.cat([*(c.to(columns[0].device) for c in columns), present], dim=1)


def _open(name: str, source: Source, data: Any, present: Any) -> _Opened:
    mask = None if present is None else torch.as_tensor(present)
    if mask is not None and (mask.dim() != 1 or mask.dtype != torch.bool):
        raise SidError(f"present[{name!r}]", f"{mask.dtype} {tuple(mask.shape)}", "Pass [N] booleans.")
    if isinstance(data, (str, Path)) and Path(data).suffix == ".npy" and Path(data).is_file():
        data = np.load(data, mmap_mode="r")
    if isinstance(source, CategorySource):
        if not isinstance(data, (Tensor, np.ndarray, SparseShares)):
            raise SidError(
                f"source {name!r}", f"a {type(data).__name__}", "Pass a tensor, an array or a .npy file."
            )
        if data.ndim not in (1, 2) or (data.ndim == 2 and data.shape[1] != source.classes):
            raise SidError(
                f"source {name!r}",
                f"shape {tuple(data.shape)}",
                f"Pass [N] labels or [N, {source.classes}].",
            )
        return _Opened(name, source, data, mask)
    if isinstance(data, (Tensor, np.ndarray)):
        stream = open_stream(data, name=f"source {name!r}")
        _check_dim(name, source, stream.dim)
        return _Opened(name, source, data, mask)
    stream = open_stream(data, name=f"source {name!r}")
    _check_dim(name, source, stream.dim)
    return _Opened(name, source, stream, mask)


def _check_dim(name: str, source: Source, dim: int) -> None:
    if dim != source.width:
        raise SidError(
            f"source {name!r}", f"embeddings of {dim} dimensions", f"It was declared with {source.width}."
        )


def _batches(opened: _Opened) -> Iterator[Tensor]:
    """One pass over ``[n, width + 1]``: values, then the flag."""
    begin = 0
    stream: Any = opened.data if isinstance(opened.data, EmbeddingStream) else _slices(opened.data)
    for batch in stream:
        present = None if opened.present is None else opened.present[begin : begin + len(batch)]
        if present is not None and len(present) != len(batch):
            raise SidError(
                f"present[{opened.name!r}]",
                f"{len(opened.present or ())} values, more rows",
                "Give one per row.",
            )
        yield _values(opened, batch, present, begin)
        begin += len(batch)


def _slices(data: Tensor | np.ndarray[Any, Any] | SparseShares) -> Iterator[Tensor]:
    width = data.shape[1] if data.ndim == 2 else 1
    rows = max(1, min(_ROWS, _ELEMENTS // width))
    for begin in range(0, len(data), rows):
        piece = data[begin : begin + rows]
        yield piece if isinstance(piece, Tensor) else torch.from_numpy(np.array(piece))


def _values(opened: _Opened, batch: Tensor, present: Tensor | None, begin: int) -> Tensor:
    flag = torch.ones(len(batch), dtype=torch.bool) if present is None else present
    flag = flag.to(batch.device)
    if isinstance(opened.source, CategorySource):
        values, labelled = _probabilities(opened, batch, flag, begin)
        flag = flag & labelled
    else:
        values = check_batch(batch, opened.source.width, f"source {opened.name!r}", begin)
    column = flag.to(torch.float32)[:, None]
    return torch.cat([values * column, column], dim=1)


def _probabilities(opened: _Opened, batch: Tensor, flag: Tensor, begin: int) -> tuple[Tensor, Tensor]:
    classes = opened.source.width
    name = f"source {opened.name!r}"
    if batch.dim() == 1:
        if batch.dtype.is_floating_point:
            raise SidError(name, f"labels of dtype {batch.dtype}", "Labels are integers.")
        labels = batch.to(torch.int64)
        bad = (flag & ((labels < -1) | (labels >= classes))).nonzero()
        if len(bad):
            row = int(bad[0])
            raise SidError(
                name,
                f"category {int(labels[row])} at row {begin + row}, outside 0..{classes - 1}",
                "Pass -1 for an unknown category, or fit again with more classes.",
            )
        known = (labels >= 0) & (labels < classes)
        one_hot = torch.nn.functional.one_hot(labels.clamp(0, classes - 1), classes)
        return one_hot.to(torch.float32), known
    values = check_batch(batch, classes, name, begin)
    bad = (flag & ((values < 0).any(1) | ((values.sum(1) - 1).abs() > 1e-2))).nonzero()
    if len(bad):
        raise SidError(
            name,
            f"row {begin + int(bad[0])} is no distribution (sum {float(values[int(bad[0])].sum()):.3f})",
            "Probabilities are not negative and sum to 1; mark a missing row in present.",
        )
    return values, torch.ones_like(flag)


def _in_step(streams: Mapping[str, Iterator[Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Cut the batches of several streams so that they cover the same rows."""
    held: dict[str, Tensor] = {}
    while True:
        for name, stream in streams.items():
            while len(held.get(name, ())) == 0:
                batch = next(stream, None)
                if batch is None:
                    break
                held[name] = batch
        ended = [name for name in streams if len(held.get(name, ())) == 0]
        if len(ended) == len(streams):
            return
        if ended:
            raise SidError("data", f"source {ended[0]!r} has fewer rows", "Every source needs every item.")
        size = min(len(batch) for batch in held.values())
        yield {name: batch[:size] for name, batch in held.items()}
        held = {name: batch[size:] for name, batch in held.items()}
