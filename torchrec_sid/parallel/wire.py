"""Bytes that a plan sends between ranks in one training step, counted from how each table is sharded.

Counted is what leaves a rank for another one, summed over all ranks: ids to the ranks that hold their rows
and the lengths of their bags (8 bytes each), embeddings back, gradients of embeddings forth again. Ids are
taken to be spread evenly.
The all-reduce of the dense model is not in it: it is the same for every way to embed an item.
"""

from __future__ import annotations

from typing import NamedTuple

from torchrec_sid.parallel.plan_summary import PlanSummary, TablePlan

_ID_BYTES = 8


class WireBytes(NamedTuple):
    """Bytes of one step over all ranks."""

    ids: int
    """To the holders of the rows, with the lengths of bags."""
    embeddings: int
    """Back to the ranks that asked."""
    gradients: int
    """To the holders again; of data-parallel tables, the all-reduce."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.ids + self.embeddings + self.gradients


def wire_bytes(
    summary: PlanSummary, batch_size: int, local_world_size: int, *, element_bytes: int = 4
) -> WireBytes:
    """Count the bytes of one step.

    Args:
        summary: of the plan.
        batch_size: samples per rank.
        local_world_size: ranks per node, for the types that reduce within a node first.
        element_bytes: of an embedding's element as it travels.
    """
    parts = [
        _table(t, summary.world_size, batch_size, local_world_size, element_bytes) for t in summary.tables
    ]
    return WireBytes(*(sum(column) for column in zip(*parts, strict=True))) if parts else WireBytes(0, 0, 0)


def _table(table: TablePlan, world: int, batch: int, local: int, element: int) -> WireBytes:
    if world == 1:
        return WireBytes(0, 0, 0)
    elsewhere = (world - 1) / world
    if table.sharding_type == "data_parallel":
        # Ring all-reduce: every rank sends twice its share of the others.
        return WireBytes(0, 0, round(2 * table.rows * table.dim * element * elsewhere * world))
    samples = world * batch
    # A table of which every event is a bag has many bags a sample; others have one a feature.
    counts = table.num_poolings or (1.0,) * len(table.pooling_factors)
    ids = samples * sum(n * bags for n, bags in zip(table.pooling_factors, counts, strict=True))
    bags = samples * sum(counts)
    columns = table.column_shards if table.sharding_type in _BY_COLUMN else 1
    # Under row-wise sharding every holder learns how many of its rows each bag has.
    lengths = bags * (world if table.sharding_type == "row_wise" else columns)
    sent = round((ids * columns + lengths) * _ID_BYTES * elsewhere)
    if not table.pooled:
        embeddings = ids * table.dim * element * elsewhere
    else:
        pooled = bags * table.dim * element
        embeddings = pooled * _pooled_copies(table.sharding_type, world, local)
    return WireBytes(sent, round(embeddings), round(embeddings))


_BY_COLUMN = ("column_wise", "table_column_wise", "grid_shard")


def _pooled_copies(sharding_type: str, world: int, local: int) -> float:
    """How often the pooled embeddings of the whole batch travel."""
    if sharding_type == "row_wise":
        # Every rank holds a partial sum of every sample and sends all but its own samples'.
        return world - 1
    if sharding_type in ("table_row_wise", "grid_shard"):
        # Partial sums within the node first, then one copy between the nodes.
        nodes = max(1, world // local)
        return (local - 1) + (nodes - 1) / nodes
    return (world - 1) / world
