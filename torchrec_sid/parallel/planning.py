"""From a model and a `PlannerConfig` to a sharding plan, with or without a process group."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torchrec.distributed.planner import EmbeddingShardingPlanner
from torchrec.distributed.planner.partitioners import GreedyPerfPartitioner, MemoryBalancedPartitioner
from torchrec.distributed.planner.proposers import (
    DynamicProgrammingProposer,
    GreedyProposer,
    GridSearchProposer,
    UniformProposer,
)
from torchrec.distributed.planner.stats import EmbeddingStats
from torchrec.distributed.planner.types import (
    HardwareConfig,
    KernelConfig,
    ParameterConstraints,
    PlannerError,
    Topology,
    TopologyFactory,
    TrainerConfig,
)
from torchrec.distributed.types import ShardingPlan
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_sid.errors import SidError
from torchrec_sid.parallel.constraints import (
    match_constraints,
    model_num_poolings,
    model_pooling_factors,
    resolve_constraints,
    table_features,
)
from torchrec_sid.parallel.embedding_tables import Table, find_tables, table_parameters
from torchrec_sid.parallel.pinning import PinningPartitioner
from torchrec_sid.parallel.plan_summary import PlanSummary, summarise
from torchrec_sid.parallel.planner_config import PlannerConfig, TopologyConfig
from torchrec_sid.parallel.presets import node_preset
from torchrec_sid.parallel.ranks import Ranks
from torchrec_sid.parallel.reservation import make_reservation
from torchrec_sid.parallel.sharders import sid_sharders

_GIB = 2**30
_PROPOSERS = {
    "grid": GridSearchProposer,
    "greedy": GreedyProposer,
    "greedy_flat": lambda: GreedyProposer(use_depth=False),
    "uniform": UniformProposer,
    "dynamic_programming": DynamicProgrammingProposer,
}


@dataclass(frozen=True)
class PlannedModel:
    """A sharding plan and what the planner expects of it."""

    plan: ShardingPlan
    """For DistributedModelParallel."""
    summary: PlanSummary
    """Memory, time and balance, per rank and per table."""
    report: str
    """TorchRec's own table of statistics, as text; empty if the model has no tables."""


class _CaptureStats(EmbeddingStats):
    """Keeps what TorchRec would only log."""

    def __init__(self) -> None:
        super().__init__()
        self.options: list[Any] = []
        self.report = ""

    def log(self, *args: Any, **kwargs: Any) -> None:
        super().log(*args, **kwargs)
        self.options = kwargs["best_plan"]
        self.report = "\n".join(getattr(self, "_stats_table", []))


def make_plan(
    model: nn.Module,
    config: PlannerConfig,
    *,
    feature_lengths: Mapping[str, float] | None = None,
    replicas: int = 1,
) -> PlannedModel:
    """Plan the sharding of a model's tables.

    Mark the tables with their optimizer first (:class:`~torchrec_sid.parallel.optimizer.TableOptimizer`),
    or the plan leaves its memory out. Tables may be on the meta device. Within a process group rank 0
    plans and the others receive the plan; without one, any cluster can be planned for.

    Args:
        model: unsharded.
        config: the planner's configuration.
        feature_lengths: feature -> mean items per sample, measured in the data. Together with what the
            model's SID collections know (prefixes or pieces per item) they give the pooling factors of
            every table that the configuration gives none.
        replicas: groups of ranks that hold the same tables (2D parallelism); the plan is for one group.

    Raises:
        SidError: a feature that no table reads, a constraint that cannot be met, or tables that do not fit,
            with what to change and what TorchRec says.
    """
    known = table_features(model)
    if unknown := sorted(set(feature_lengths or ()) - known):
        raise SidError(
            f"feature_lengths[{unknown[0]!r}]", "no table reads it", f"Features are {sorted(known)}."
        )
    ranks = Ranks.open()
    running = None if ranks.group is None else ranks.size
    config = replace(config, topology=resolve_topology(config.topology, running, replicas))
    factors = model_pooling_factors(model, feature_lengths)
    poolings = model_num_poolings(model, feature_lengths)
    tables = find_tables(model)
    return ranks.first(lambda: _plan(model, config, tables, factors, poolings), where="sharding plan")


def measure_feature_lengths(batches: Iterable[KeyedJaggedTensor]) -> dict[str, float]:
    """Mean ids per sample of each feature, over some batches: what :func:`make_plan` wants to know.

    Raises:
        SidError: no batch, or batches without samples.
    """
    samples, totals = 0, dict[str, float]()
    for batch in batches:
        samples += batch.stride()
        counts = batch.lengths().view(len(batch.keys()), -1).sum(dim=1).tolist()
        for name, count in zip(batch.keys(), counts, strict=True):
            totals[name] = totals.get(name, 0.0) + count
    if samples == 0:
        raise SidError("feature lengths", "no batch with a sample", "Pass a few batches of training data.")
    return {name: total / samples for name, total in totals.items()}


def resolve_topology(
    config: TopologyConfig, running_world: int | None, replicas: int = 1
) -> TopologyConfig:
    """The topology of one replica, its world filled in from the running process group if there is one.

    Raises:
        SidError: no world size and no process group, one that differs from the process group's, or one
            that is not a multiple of the replicas.
    """
    world = config.world_size or running_world
    if world is None:
        raise SidError("topology.world_size", "is not set", "Say how many processes the plan is for.")
    if running_world is not None and world != running_world:
        raise SidError(
            "topology.world_size",
            f"{world}, but {running_world} processes run",
            "Plan for the processes that run.",
        )
    if world % replicas:
        raise SidError(
            "replicas", f"{replicas} over {world} processes", "Choose a divisor of the processes."
        )
    local = config.local_world_size
    if local is None and running_world is not None:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", running_world))
    if local is None:
        local = min(world, node_preset(config.node).gpus)
    # The ranks of a group alternate with those of the others, on every node.
    group_local = max(1, local // replicas)
    resolved = replace(config, world_size=world // replicas, local_world_size=group_local)
    if config.device == "cpu" and config.ddr_gib is None:
        pages, page = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
        resolved = replace(resolved, ddr_gib=pages * page / _GIB / local)
    return resolved


def build_topology(config: TopologyConfig) -> Topology:
    """TorchRec's topology for a resolved configuration."""
    gbps = 1e6  # GB/s -> bytes/ms
    cuda = config.device == "cuda"
    return TopologyFactory.create_topology(
        TrainerConfig(world_size=config.world_size, local_world_size=config.local_world_size),
        HardwareConfig(
            hbm_cap_bytes=int(config.value("hbm_gib") * _GIB) if cuda else None,
            ddr_cap_bytes=int(config.value("ddr_gib") * _GIB),
            intra_host_bw=config.value("intra_node_gbps") * gbps,
            inter_host_bw=config.value("inter_node_gbps") * gbps,
            hbm_mem_bw=config.value("hbm_gbps") * gbps,
            ddr_mem_bw=config.value("ddr_gbps") * gbps,
            hbm_to_ddr_mem_bw=config.value("host_to_device_gbps") * gbps,
        ),
        KernelConfig(compute_device=config.device, use_hardware_based_bandwidth=True),
    )


def _plan(
    model: nn.Module,
    config: PlannerConfig,
    tables: Mapping[str, Table],
    factors: Mapping[str, Sequence[float]],
    poolings: Mapping[str, Sequence[float]],
) -> PlannedModel:
    constraints = resolve_constraints(config, tables, factors, poolings)
    topology = build_topology(config.topology)
    stats = _CaptureStats()
    inner = (
        MemoryBalancedPartitioner() if config.partitioner == "memory_balanced" else GreedyPerfPartitioner()
    )
    pins = {n: c.ranks for n, (_, c) in match_constraints(config, tables).items() if c.ranks is not None}
    reservation = make_reservation(config, model, tables)
    planner = EmbeddingShardingPlanner(
        topology=topology,
        batch_size=config.batch_size,
        storage_reservation=reservation,
        proposer=[_PROPOSERS[name]() for name in config.proposers],
        partitioner=PinningPartitioner(pins, inner) if pins else inner,
        stats=[stats],
        constraints=constraints or None,
        timeout_seconds=config.timeout_seconds,
    )
    try:
        plan = planner.plan(model, sid_sharders())
    except (PlannerError, RuntimeError) as error:
        sizes = {name: w.numel() * w.element_size() for name, w in table_parameters(model, tables).items()}
        raise _explain(error, config, constraints, sizes) from error
    bags = {name: tuple(c.num_poolings) for name, c in constraints.items() if c.num_poolings}
    summary = summarise(stats.options, tables, topology, reservation.last_reserved_topology, bags)
    return PlannedModel(plan, summary, stats.report)


def _explain(
    error: Exception,
    config: PlannerConfig,
    constraints: Mapping[str, ParameterConstraints],
    sizes: Mapping[str, int],
) -> SidError:
    """What is large, and TorchRec's own words."""
    kind = getattr(getattr(error, "error_type", None), "value", None)
    words = " ".join(str(error).split())
    if kind not in ("insufficient_storage", "partition", "strict_constraints"):
        return SidError("sharding plan", words, "Change the constraints.")
    topology = config.topology
    memory = topology.value("hbm_gib" if topology.device == "cuda" else "ddr_gib")
    place = f"{topology.world_size} ranks of {memory:,.1f} GiB"
    ids = {name: _ids_per_sample(c) * config.batch_size for name, c in constraints.items()}
    widest = max(ids, key=lambda name: ids[name], default="")
    buffers = ids.get(widest, 0) * 8
    weights = sum(sizes.values())
    if buffers > weights / max(1, topology.world_size or 1):
        return SidError(
            "sharding plan",
            f"a batch of {config.batch_size:,} samples a rank reads {ids[widest]:,.0f} ids of table "
            f"{widest!r} ({buffers / _GIB:,.1f} GiB, and vectors to match), which {place} do not hold. "
            f"TorchRec: {words}",
            "Make the batch smaller, histories shorter, or feature_lengths truer.",
        )
    reserved = config.reservation
    kept = f"{reserved.gib:g} GiB" if reserved.kind == "fixed" else f"{reserved.share:.0%}"
    return SidError(
        "sharding plan",
        f"tables of {weights / _GIB:,.1f} GiB, with optimizer state, buffers and a reservation of "
        f"{kept}, do not fit {place} under these constraints. TorchRec: {words}",
        "Use more ranks, fewer rows, a table optimizer with less state (sgd, rowwise_adagrad), row_wise "
        "sharding of the largest tables, looser constraints, a smaller reservation, or the kernel "
        "fused_uvm_caching.",
    )


def _ids_per_sample(constraint: ParameterConstraints) -> float:
    factors = constraint.pooling_factors
    bags = constraint.num_poolings or [1.0] * len(factors)
    return sum(factor * count for factor, count in zip(factors, bags, strict=True))
