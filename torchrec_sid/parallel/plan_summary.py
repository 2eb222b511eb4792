"""What a plan costs, as plain numbers: memory and predicted time per rank and per table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torchrec_sid.parallel.embedding_tables import Table


@dataclass(frozen=True)
class StepTime:
    """Predicted milliseconds of one training step spent on tables, from TorchRec's estimator."""

    forward_compute: float = 0.0
    """Look-ups."""
    forward_comms: float = 0.0
    """Embeddings to the ranks that need them."""
    backward_compute: float = 0.0
    """Gradients and the fused optimizer."""
    backward_comms: float = 0.0
    """Gradients to the ranks that hold the rows."""
    input_dist: float = 0.0
    """Ids to the ranks that hold the rows; hidden by the pipeline, so not in the total."""
    prefetch: float = 0.0
    """Rows into the cache."""

    @property
    def total(self) -> float:
        """Everything but the distribution of the ids."""
        hidden = self.input_dist
        return sum(asdict(self).values()) - hidden

    def __add__(self, other: StepTime) -> StepTime:
        mine, theirs = asdict(self), asdict(other)
        return StepTime(**{name: mine[name] + theirs[name] for name in mine})


@dataclass(frozen=True)
class RankLoad:
    """What one rank holds and does."""

    rank: int
    hbm_bytes: int
    """Device memory for tables, optimizer state and input and output buffers."""
    ddr_bytes: int
    """Host memory for the same."""
    time: StepTime
    tables: int
    """Tables with a shard here."""


@dataclass(frozen=True)
class TablePlan:
    """What became of one table."""

    name: str
    rows: int
    dim: int
    sharding_type: str
    compute_kernel: str
    ranks: tuple[int, ...]
    """That hold a shard."""
    pooled: bool
    """Whether one vector per sample travels, or one per id."""
    column_shards: int
    """Shards side by side; 1 unless sharded by column."""
    pooling_factors: tuple[float, ...]
    """Mean ids per bag of each feature, as planned with."""
    hbm_bytes: int
    """Over all ranks."""
    ddr_bytes: int
    """Over all ranks."""
    time: StepTime
    """Summed over its shards."""
    num_poolings: tuple[float, ...] = ()
    """Mean bags per sample of each feature; empty: one."""


@dataclass(frozen=True)
class PlanSummary:
    """A plan in numbers."""

    device: str
    world_size: int
    hbm_capacity: int
    """Bytes of a rank; 0 without device memory."""
    ddr_capacity: int
    """Bytes of a rank."""
    reserved_bytes: int
    """Of a rank's memory kept for the dense model and the input buffers."""
    ranks: tuple[RankLoad, ...]
    tables: tuple[TablePlan, ...]

    @property
    def step_time(self) -> StepTime:
        """Of the slowest rank: the others wait for it."""
        return max((load.time for load in self.ranks), key=lambda t: t.total, default=StepTime())

    @property
    def balance(self) -> float:
        """Mean over maximum of the ranks' time: 1 is perfect, 1 / world_size is one busy rank."""
        return _balance([load.time.total for load in self.ranks])

    @property
    def memory_balance(self) -> float:
        """Mean over maximum of the ranks' memory for tables."""
        return _balance([load.hbm_bytes + load.ddr_bytes for load in self.ranks])

    def to_json(self) -> dict[str, Any]:
        """As JSON-serialisable values, with the derived numbers."""
        return {
            **asdict(self),
            "step_time_ms": {**asdict(self.step_time), "total": self.step_time.total},
            "balance": self.balance,
            "memory_balance": self.memory_balance,
        }


_HOST_KERNELS = ("fused_uvm", "fused_uvm_caching")


def summarise(
    options: Sequence[Any],
    tables: Mapping[str, Table],
    topology: Any,
    reserved: Any,
    poolings: Mapping[str, tuple[float, ...]],
) -> PlanSummary:
    """Sum up placed sharding options.

    Args:
        options: TorchRec's ``ShardingOption`` list of the best plan.
        tables: of the model.
        topology: the cluster.
        reserved: the cluster with the reservation taken off.
        poolings: table -> bags per sample of each feature, where it is not one.
    """
    memory = [[0, 0] for _ in range(topology.world_size)]
    times = [StepTime() for _ in range(topology.world_size)]
    counts: list[set[str]] = [set() for _ in range(topology.world_size)]
    plans = []
    for option in options:
        whole = StepTime()
        for shard in option.shards:
            time = _time(shard.perf)
            whole += time
            memory[shard.rank][0] += shard.storage.hbm
            memory[shard.rank][1] += shard.storage.ddr
            times[shard.rank] += time
            counts[shard.rank].add(option.name)
        bags = poolings.get(option.name, ())
        plans.append(_table_plan(option, tables[option.name], whole, bags))
    device = topology.devices[0].storage
    kind = "ddr" if topology.compute_device == "cpu" else "hbm"
    kept = getattr(device, kind) - getattr(reserved.devices[0].storage, kind)
    loads = tuple(
        RankLoad(rank, hbm, ddr, times[rank], len(counts[rank])) for rank, (hbm, ddr) in enumerate(memory)
    )
    return PlanSummary(
        topology.compute_device, topology.world_size, device.hbm, device.ddr, kept, loads, tuple(plans)
    )


def format_summary(summary: PlanSummary) -> str:
    """A few lines of text: every table, the most loaded rank, the predicted step."""
    lines = [
        f"{'table':32} {'rows':>13} {'dim':>5} {'sharding':>18} {'kernel':>17} {'ranks':>9} {'memory':>11}"
    ]
    for table in summary.tables:
        held = table.hbm_bytes + table.ddr_bytes
        ranks = f"{table.ranks[0]}" if len(table.ranks) == 1 else f"{len(table.ranks)} ranks"
        lines.append(
            f"{table.name[:32]:32} {table.rows:13,} {table.dim:5} {table.sharding_type:>18} "
            f"{table.compute_kernel:>17} {ranks:>9} {held / 2**30:7.2f} GiB"
        )
    spilled = [table.name for table in summary.tables if table.compute_kernel in _HOST_KERNELS]
    if spilled:
        lines.append(
            f"{len(spilled)} tables live in host memory ({', '.join(spilled[:5])}): allow compute_kernels "
            "fused alone to forbid it"
        )
    time = summary.step_time
    fullest = max((load.hbm_bytes + load.ddr_bytes for load in summary.ranks), default=0)
    lines.append(
        f"world {summary.world_size} ({summary.device}); fullest rank {fullest / 2**30:.2f} GiB; "
        f"predicted {time.total:.2f} ms a step in tables (look-up {time.forward_compute:.2f}, "
        f"out {time.forward_comms:.2f}, backward {time.backward_compute:.2f}, "
        f"back {time.backward_comms:.2f}); balance {summary.balance:.2f}"
    )
    return "\n".join(lines)


def _table_plan(option: Any, table: Table, time: StepTime, bags: tuple[float, ...]) -> TablePlan:
    return TablePlan(
        name=option.name,
        rows=table.rows,
        dim=table.dim,
        sharding_type=option.sharding_type,
        compute_kernel=option.compute_kernel,
        ranks=tuple(sorted({shard.rank for shard in option.shards})),
        pooled=table.pooled,
        column_shards=len({shard.offset[1] for shard in option.shards}),
        pooling_factors=tuple(float(x) for x in option.input_lengths),
        hbm_bytes=sum(shard.storage.hbm for shard in option.shards),
        ddr_bytes=sum(shard.storage.ddr for shard in option.shards),
        time=time,
        num_poolings=bags,
    )


def _time(perf: Any) -> StepTime:
    return StepTime(
        perf.fwd_compute,
        perf.fwd_comms,
        perf.bwd_compute,
        perf.bwd_comms,
        getattr(perf, "input_dist_comms", 0.0),
        perf.prefetch_compute,
    )


def _balance(values: list[float] | list[int]) -> float:
    top = max(values, default=0)
    return sum(values) / (top * len(values)) if top > 0 else 1.0
