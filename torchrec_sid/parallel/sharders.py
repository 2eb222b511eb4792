"""The sharders of EmbeddingBagCollection and EmbeddingCollection, with what really runs on a CPU.

TorchRec's lists for the CPU leave out row-wise sharding of bags, which works, and include data-parallel
EmbeddingCollections, whose dense kernel pools on a CPU and corrupts the heap.
"""

from __future__ import annotations

from typing import Any

from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder

CPU_BAG_TYPES = (
    "data_parallel",
    "table_wise",
    "column_wise",
    "table_column_wise",
    "row_wise",
    "table_row_wise",
    "grid_shard",
)
"""Ways to shard an EmbeddingBagCollection on a CPU."""
CPU_SEQUENCE_TYPES = ("table_wise", "row_wise", "column_wise")
"""Ways to shard an EmbeddingCollection on a CPU."""
CPU_DEFAULT_TYPES = ("table_wise", "row_wise")
"""What the planner may choose on a CPU unless a constraint names more: both reshard with any optimizer."""


class CpuBagSharder(EmbeddingBagCollectionSharder):
    """EmbeddingBagCollectionSharder that also offers the row-wise types on a CPU."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        """Names of the types that work."""
        if compute_device_type == "cpu":
            return list(CPU_BAG_TYPES)
        types: list[str] = super().sharding_types(compute_device_type)
        return types


class CpuSequenceSharder(EmbeddingCollectionSharder):
    """EmbeddingCollectionSharder without data parallelism on a CPU."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        """Names of the types that work."""
        if compute_device_type == "cpu":
            return list(CPU_SEQUENCE_TYPES)
        types: list[str] = super().sharding_types(compute_device_type)
        return types


def sid_sharders() -> list[Any]:
    """Sharders for planning and for DistributedModelParallel, on any device."""
    return [CpuBagSharder(), CpuSequenceSharder()]
