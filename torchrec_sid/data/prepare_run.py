"""What the steps of one preparation share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from torchrec_sid.data.engines import Engine, Table
from torchrec_sid.data.event_columns import EventColumns
from torchrec_sid.data.given_histories import GivenHistories
from torchrec_sid.data.lake import ParquetTable
from torchrec_sid.data.parquet import Array
from torchrec_sid.data.prepare_config import PrepareConfig
from torchrec_sid.data.schema import LogFolder
from torchrec_sid.data.specification import Specification


@dataclass
class PrepareRun:
    """One preparation of one log."""

    folder: LogFolder
    config: PrepareConfig
    specification: Specification
    """Empty, where the log has none."""
    engine: Engine
    work: Path
    """Folder to fill."""
    scratch: Path
    """Folder for what passes between queries."""
    progress: Callable[[str], None]
    source: ParquetTable
    """events.parquet."""
    columns: EventColumns
    release: Array
    """``[N]`` int8: first split of each item, by its hold-out."""
    given: GivenHistories | None

    @property
    def buckets(self) -> int:
        """Buckets of users."""
        return self.config.buckets

    @property
    def positives_only(self) -> bool:
        """Whether histories hold positives alone."""
        return self.config.history == "positives"

    def pass_on(self, name: str, table: pa.Table) -> Table:
        """Hand rows of this process to the engine."""
        pq.write_table(table, self.scratch / f"{name}.parquet")
        return self.engine.read(name, ParquetTable.find(self.scratch, name))
