"""`RankingBatch`: what a ranking model reads, in the form that TorchRec pipelines and shards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from torchrec_sid.errors import SidError

KJT_FIELDS = ("item", "history", "history_action", "history_age", "item_sid", "history_sid")
"""Keys that a batch's KeyedJaggedTensor can carry."""
BYTE_FIELDS = ("item_bytes", "history_bytes")
"""Packed SIDs that ride beside it."""

HISTORY_AGES = 40
"""Values of ``history_age``: 0 where the time is unknown, else 1 + floor(log2(seconds before the event)),
at most 39."""


@dataclass(frozen=True)
class BatchConfig:
    """What a batch holds."""

    batch_size: int = 512
    """Rows per rank."""
    history_length: int | None = 64
    """The most recent events kept of each history; None keeps all."""
    fields: tuple[str, ...] = ("item", "history")
    """Keys of the KeyedJaggedTensor, in this order, and any of :data:`BYTE_FIELDS`."""
    tasks: tuple[int, ...] = ()
    """Further labels: for each action a here, whether the user's action was at least a."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "fields", tuple(self.fields))
        object.__setattr__(self, "tasks", tuple(self.tasks))
        if self.batch_size < 1:
            raise SidError("batch_size", f"{self.batch_size}", "A batch has at least one row.")
        if self.history_length is not None and self.history_length < 1:
            raise SidError(
                "history_length", f"{self.history_length}", "Keep one event or more, or None for all."
            )
        known = KJT_FIELDS + BYTE_FIELDS
        for name in self.fields:
            if name not in known:
                raise SidError("fields", f"{name!r}", f"Choose from {', '.join(known)}.")
        if len(set(self.fields)) < len(self.fields) or not self.kjt_fields:
            raise SidError(
                "fields", f"{self.fields}", f"Name each field once, and one of {', '.join(KJT_FIELDS)}."
            )

    @property
    def kjt_fields(self) -> tuple[str, ...]:
        """The fields that are keys of the KeyedJaggedTensor."""
        return tuple(name for name in self.fields if name in KJT_FIELDS)


@dataclass
class RankingBatch(Pipelineable):
    """B examples. Rows with weight 0 are padding, so that every rank has the same number of batches."""

    dense: Tensor
    """``[B, F]`` float32, past-only features."""
    features: KeyedJaggedTensor
    """int64 values, contiguous; histories oldest to newest."""
    labels: Tensor
    """``[B]`` float32, 0 or 1; ``[B, 1 + T]`` with T further tasks."""
    weights: Tensor
    """``[B]`` float32, 1, or 0 for padding."""
    segment: Tensor
    """``[B]`` int64: popularity of the item, 0 head, 1 torso, 2 tail, 3 cold; -1 for padding."""
    history_lengths: Tensor
    """``[B]`` int64 events of each history, as cut to ``history_length``."""
    history_bytes: Tensor | None = None
    """``[events, nbytes]`` uint8 packed SIDs of all histories, one after the other."""
    item_bytes: Tensor | None = None
    """``[B, nbytes]`` uint8 packed SID of the item."""

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
        parts: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        parts = {name: None if part is None else change(part) for name, part in parts.items()}
        return RankingBatch(**parts)
