"""Items, events and histories: schema, preparation, readers, batches, synthetic logs.

``LogFolder``, ``prepare`` and ``write_synthetic`` need pyarrow; ``BatchReader``, ``BatchConfig`` and
``RankingBatch`` need TorchRec too, and are imported when they are first asked for.
"""

from typing import TYPE_CHECKING, Any

from torchrec_sid.data.history_store import HistoryStore
from torchrec_sid.data.negatives import NegativeSampling
from torchrec_sid.data.prepare import PrepareConfig, prepare
from torchrec_sid.data.prepared import SEGMENTS, PreparedLog
from torchrec_sid.data.schema import LogFolder
from torchrec_sid.data.specification import Specification
from torchrec_sid.data.synthetic import SyntheticConfig, write_synthetic

if TYPE_CHECKING:
    from torchrec_sid.data.batch import BatchConfig, RankingBatch
    from torchrec_sid.data.reader import BatchReader

__all__ = [
    "SEGMENTS",
    "BatchConfig",
    "BatchReader",
    "HistoryStore",
    "LogFolder",
    "NegativeSampling",
    "PrepareConfig",
    "PreparedLog",
    "RankingBatch",
    "Specification",
    "SyntheticConfig",
    "prepare",
    "write_synthetic",
]


def __getattr__(name: str) -> Any:
    if name in ("BatchConfig", "RankingBatch"):
        from torchrec_sid.data import batch

        return getattr(batch, name)
    if name == "BatchReader":
        from torchrec_sid.data.reader import BatchReader

        return BatchReader
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
