"""`RankingBatch`: what a ranking model reads, in the form that TorchRec pipelines and shards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from torchrec_sid.errors import SidError

LOG_FIELDS = ("item", "history", "history_action", "history_age")
"""Keys that a batch takes from every log. Others are keys of the features of its specification, or
``item_NAME`` and ``history_NAME``: a value of the candidate and of the events that the reader is given of
every item."""


@dataclass(frozen=True)
class BatchConfig:
    """What a batch holds."""

    batch_size: int = 512
    """Rows per rank."""
    history_length: int | None = 64
    """The most recent events kept of each history; None keeps all."""
    fields: tuple[str, ...] = ("item", "history")
    """Keys of the KeyedJaggedTensor, in this order, and rows beside it; see :data:`LOG_FIELDS`."""
    labels: tuple[str, ...] = ()
    """Names of the log's further labels."""
    tasks: tuple[int, ...] = ()
    """Further labels: for each action a here, whether the user's action was at least a."""

    dropped: Mapping[str, tuple[float, int]] = field(default_factory=dict)
    """NAME -> share of the values ``item_NAME`` and ``history_NAME`` that are dropped at random, and what
    stands in their place. The draws depend on seed, epoch and row alone."""

    by_request: bool = False
    """Rows that read the same events at the same time share one history: see :attr:`RankingBatch.rows`.
    What is dropped from it at random is then drawn once for all of them."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "fields", tuple(self.fields))
        object.__setattr__(self, "tasks", tuple(self.tasks))
        if self.batch_size < 1:
            raise SidError("batch_size", f"{self.batch_size}", "A batch has at least one row.")
        if self.history_length is not None and self.history_length < 1:
            raise SidError(
                "history_length", f"{self.history_length}", "Keep one event or more, or None for all."
            )
        if len(set(self.fields)) < len(self.fields) or not self.fields:
            raise SidError("fields", f"{self.fields}", f"Name each field once, and {LOG_FIELDS[0]!r}.")
        if self.by_request and {"request", "request_row"} & set(self.fields):
            raise SidError("fields", f"{self.fields} by request", "Give that feature another name.")


@dataclass
class RankingBatch(Pipelineable):
    """B examples. Rows with weight 0 are padding, so that every rank has the same number of batches."""

    dense: Tensor
    """``[B, F]`` float32, past-only features."""
    features: KeyedJaggedTensor
    """int64 values, contiguous; histories oldest to newest."""
    labels: Tensor
    """``[B]`` float32, 0 or 1; ``[B, 1 + T]`` with T further labels and tasks."""
    weights: Tensor
    """``[B]`` float32, 1 or what the log says, 0 for padding."""
    segment: Tensor
    """``[B]`` int64: popularity of the item, 0 head, 1 torso, 2 tail, 3 cold; -1 for padding."""
    history_lengths: Tensor
    """``[B]`` int64 events of each history, as cut to ``history_length``."""
    rows: dict[str, Tensor] = field(default_factory=dict)
    """What is no int64, by field: ``[B, ...]`` of an example, ``[events, ...]`` of histories, one after the
    other. By request also ``request`` ``[B]`` int64, the request of each row, 0 .. U - 1, and
    ``request_row`` ``[U]`` int64, ascending, the row whose bags hold the history of each; the bags of its
    other rows are empty."""

    def to(self, device: torch.device, non_blocking: bool = False) -> RankingBatch:
        """A copy on ``device``."""
        return self._map(lambda part: part.to(device=device, non_blocking=non_blocking))

    def pin_memory(self) -> RankingBatch:
        """A copy in page-locked memory."""
        return self._map(lambda part: part.pin_memory())

    def record_stream(self, stream: torch.Stream) -> None:
        """Keep the memory until ``stream`` is done with it."""
        self._map(lambda part: part.record_stream(stream) or part)

    def _map(self, change: Callable[[Any], Any]) -> RankingBatch:
        parts = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "rows"}
        moved: dict[str, Any] = {name: change(part) for name, part in parts.items()}
        return RankingBatch(**moved, rows={name: change(part) for name, part in self.rows.items()})
