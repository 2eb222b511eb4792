"""The side by side of a plan: what each way to embed an item needs at 10^6 to 10^9 items."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from torchrec_sid.errors import SidError
from torchrec_sid.parallel.embedding_tables import find_tables, table_parameters
from torchrec_sid.parallel.optimizer import TableOptimizer
from torchrec_sid.parallel.planner_config import PlannerConfig, TableConstraint
from torchrec_sid.parallel.planning import PlannedModel, make_plan
from torchrec_sid.parallel.wire import wire_bytes

from .plan_arms import PLAN_ARMS, ArmPlanInput, PlanInputs, build_arm

WORLDS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
"""Clusters that are tried, smallest first: whole nodes from 8 on."""


@dataclass(frozen=True)
class ArmCost:
    """One arm at one number of items."""

    arm: str
    items: int
    gpus: int | None
    """Smallest world of :data:`WORLDS` that the tables fit; None: more than the largest."""
    table_rows: int
    """Of all tables."""
    table_bytes: int
    """Weights of all tables."""
    planned_bytes: int | None
    """Over all ranks of the world asked for: weights, optimizer state, buffers of ids and embeddings."""
    bytes_per_event: int
    """At rest: the item of one history event."""
    wire_bytes_per_batch: int | None
    """Sent between the ranks of the world asked for in one step, over all ranks; None: does not fit."""
    step_ms: float | None
    """Predicted time in tables of one step in that world; None: does not fit."""


def cost_of(
    arm: str, inputs: PlanInputs, items: int, planner: PlannerConfig, optimizer: TableOptimizer
) -> ArmCost:
    """Plan one arm for the configured world, and find the smallest world that it fits."""
    built = build_arm(arm, inputs, items)
    tables = find_tables(built.module)
    weights = table_parameters(built.module, tables)
    optimizer.mark(weights.values())
    # In device memory: tables that spill to the host would fit any world, at a tenth of the speed.
    kernels = {"*": TableConstraint(compute_kernels=("fused", "dense"))} if tables else {}
    planner = replace(planner, tables=kernels)
    weight_bytes = sum(w.numel() * w.element_size() for w in weights.values())
    planned = _try(built, planner)
    wire = step = held = None
    if planned is not None:
        local = min(planner.topology.local_world_size or 8, planned.summary.world_size)
        wire = wire_bytes(planned.summary, planner.batch_size, local).total
        step = planned.summary.step_time.total
        held = sum(load.hbm_bytes + load.ddr_bytes for load in planned.summary.ranks)
    return ArmCost(
        arm=arm,
        items=items,
        gpus=_smallest_world(built, planner, weight_bytes),
        table_rows=sum(table.rows for table in tables.values()),
        table_bytes=weight_bytes,
        planned_bytes=held,
        bytes_per_event=built.bytes_per_event,
        wire_bytes_per_batch=wire,
        step_ms=step,
    )


def compare_arms(
    inputs: PlanInputs, sizes: tuple[int, ...], planner: PlannerConfig, optimizer: TableOptimizer
) -> list[dict[str, Any]]:
    """The cost of every arm at every number of items, as JSON rows.

    Constraints of the planner file that name tables are left out, as the arms have different tables.
    """
    costs: dict[tuple[str, int], ArmCost] = {}
    for arm in PLAN_ARMS:
        for items in sizes:
            # Only raw ids have tables that grow with the items.
            done = costs.get((arm, sizes[0])) if arm != "full_id" else None
            costs[arm, items] = (
                replace(done, items=items) if done else cost_of(arm, inputs, items, planner, optimizer)
            )
    return [asdict(cost) for cost in costs.values()]


def _smallest_world(built: ArmPlanInput, planner: PlannerConfig, weight_bytes: int) -> int | None:
    topology = planner.topology
    memory = topology.value("hbm_gib" if topology.device == "cuda" else "ddr_gib") * 2**30
    for world in WORLDS:
        # The weights alone must fit before it is worth asking the planner.
        if weight_bytes > world * memory:
            continue
        local = min(world, topology.local_world_size or 8)
        candidate = replace(topology, world_size=world, local_world_size=local)
        if _try(built, replace(planner, topology=candidate)) is not None:
            return world
    return None


def _try(built: ArmPlanInput, planner: PlannerConfig) -> PlannedModel | None:
    try:
        return make_plan(built.module, planner, feature_lengths=built.feature_lengths)
    except SidError as error:
        if "do not fit" in error.found:
            return None
        raise
