"""How a log becomes examples."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torchrec_sid.data.negatives import NegativeSampling
from torchrec_sid.errors import SidError

EngineName = Literal["duckdb", "spark"]


@dataclass(frozen=True)
class PrepareConfig:
    """How a log becomes examples."""

    holdout: bool = True
    """Remove the events of items with ``cold_holdout`` 1 before valid, 2 before test, where given."""
    history: Literal["all", "positives"] = "all"
    """Which past events are history: all with their action, or those with label 1."""
    action_column: str | None = None
    """Integer column that says what the user did; None: ``rating`` where there is one, else ``label``."""
    train_share: float = 0.8
    """Share of the events in train, by time, where the log names no splits."""
    valid_share: float = 0.1
    """Share in valid; the rest is test."""
    negatives: NegativeSampling | None = field(default_factory=NegativeSampling)
    """How negatives are drawn if the log has none of its own; None refuses such a log."""
    shuffle_window: int = 1 << 17
    """Training rows are permuted within windows of this many, those of one request together; 0 keeps the
    order of time."""
    block_rows: int = 256
    """Rows per block, the unit that readers read."""
    buckets: int = 1
    """Buckets of users, a power of two; each has its own histories and examples."""
    seed: int = 0
    """Of the shuffle and the negatives."""
    engine: EngineName = "duckdb"
    """What runs the queries; every engine gives the same log."""
    memory: str = "2GB"
    """Memory of the embedded engine; what does not fit is on disk."""

    def __post_init__(self) -> None:
        if not (0 < self.train_share < 1 and 0 < self.valid_share < 1 - self.train_share):
            raise SidError(
                "train_share, valid_share",
                f"{self.train_share}, {self.valid_share}",
                "Leave a share for each.",
            )
        if self.block_rows < 1 or self.shuffle_window < 0:
            raise SidError(
                "PrepareConfig",
                f"block_rows {self.block_rows}, shuffle_window {self.shuffle_window}",
                "Rows are positive; a shuffle window of 0 turns it off.",
            )
        if self.history not in ("all", "positives"):
            raise SidError("history", f"{self.history!r}", "Choose 'all' or 'positives'.")
        if self.buckets < 1 or self.buckets & (self.buckets - 1):
            raise SidError("buckets", f"{self.buckets}", "Choose a power of two.")
