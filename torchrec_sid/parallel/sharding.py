"""`shard_model`: a model over processes, with weights that do not depend on how many there are."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.types import ShardingEnv, ShardingPlan
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from torchrec_sid.errors import SidError
from torchrec_sid.parallel.buffers import dense_buffer_names, move_buffers, synchronise_buffers
from torchrec_sid.parallel.embedding_tables import Table, find_tables, table_parameters
from torchrec_sid.parallel.hybrid import shard_hybrid
from torchrec_sid.parallel.initialise import initialise_tables
from torchrec_sid.parallel.optimizer import TableOptimizer
from torchrec_sid.parallel.plan_file import check_plan
from torchrec_sid.parallel.plan_summary import PlanSummary
from torchrec_sid.parallel.planner_config import PlannerConfig
from torchrec_sid.parallel.planning import make_plan
from torchrec_sid.parallel.ranks import Ranks
from torchrec_sid.parallel.sharders import sid_sharders


@dataclass(frozen=True)
class ShardedModel:
    """A model over processes, and the plan it follows."""

    model: DistributedModelParallel
    plan: ShardingPlan
    tables: dict[str, Table]
    """Of the unsharded model, by name."""
    table_optimizer: TableOptimizer
    summary: PlanSummary | None
    """What the planner expects; None for a plan that was given."""
    report: str
    """TorchRec's table of statistics; empty for a plan that was given."""

    def make_optimizer(self, dense: Callable[[Any], torch.optim.Optimizer]) -> CombinedOptimizer:
        """One optimizer over all parameters: fused tables, data-parallel tables, dense parameters.

        Data-parallel tables have no fused optimizer and would be trained by the dense one; here they get
        the table optimizer like the others.

        Args:
            dense: parameters -> optimizer, e.g. ``lambda p: torch.optim.AdamW(p, lr=1e-3)``.
        """
        weights = {table.weight_key for table in self.tables.values()}
        rest = dict(in_backward_optimizer_filter(self.model.named_parameters()))
        replicated = {name: p for name, p in rest.items() if name in weights}
        other = {name: p for name, p in rest.items() if name not in weights}
        parts: list[KeyedOptimizer] = [self.model.fused_optimizer]
        if replicated:
            parts.append(KeyedOptimizerWrapper(replicated, self.table_optimizer.factory()))
        if other:
            parts.append(KeyedOptimizerWrapper(other, dense))
        return CombinedOptimizer(parts)


def shard_model(
    model: nn.Module,
    plan: ShardingPlan | PlannerConfig,
    *,
    device: torch.device,
    table_optimizer: TableOptimizer,
    seed: int,
    batch_size: int | None = None,
    feature_lengths: Mapping[str, float] | None = None,
    replicas: int = 1,
) -> ShardedModel:
    """Shard the tables of a model and replicate the rest; a collective call.

    Afterwards the tables hold the weights that :func:`~torchrec_sid.parallel.initialise.initialise_tables`
    draws from ``seed`` (an unsharded model starts equal if it is given the same), dense parameters and
    buffers are rank 0's, and every gradient is a mean over the global batch, so that training equals the
    unsharded model on that batch.

    Args:
        model: unsharded; buffers and dense parameters on a real device, tables on any (meta for large
            ones). It is changed in place: use only the result afterwards.
        plan: a plan, or how to make one.
        device: of this process.
        table_optimizer: fused into the backward pass of every table.
        seed: of the tables' weights.
        batch_size: samples per rank and step, for the planner; None takes the configuration's.
        feature_lengths: see :func:`~torchrec_sid.parallel.planning.make_plan`.
        replicas: with more than 1, 2D parallelism: so many groups of ranks, each with all tables; see
            :func:`~torchrec_sid.parallel.hybrid.shard_hybrid`. The plan is for one group.

    Raises:
        SidError: no process group, a plan that does not fit model, world or device, an optimizer that the
            device does not have, a buffer on meta, a constraint that cannot be met.
    """
    if not dist.is_initialized():
        raise SidError(
            "shard_model", "no process group", "Call torch.distributed.init_process_group first."
        )
    ranks = Ranks.open()
    table_optimizer.require_device(device.type)
    tables = find_tables(model)
    buffers = dense_buffer_names(model)
    table_optimizer.mark(table_parameters(model, tables).values())
    summary, report = None, ""
    if isinstance(plan, PlannerConfig):
        topology = replace(plan.topology, device=device.type)
        plan = replace(plan, topology=topology, batch_size=batch_size or plan.batch_size)
        planned = make_plan(model, plan, feature_lengths=feature_lengths, replicas=replicas)
        plan, summary, report = planned.plan, planned.summary, planned.report
    else:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.size))
        check_plan(plan, model, ranks.size // replicas, device.type, max(1, local // replicas))
    move_buffers(model, device)
    if replicas > 1:
        sharded = shard_hybrid(model, plan, device, replicas, sid_sharders())
    else:
        sharded = DistributedModelParallel(
            model,
            env=ShardingEnv.from_process_group(dist.GroupMember.WORLD),
            device=device,
            plan=plan,
            sharders=sid_sharders(),
        )
    initialise_tables(sharded, tables, seed)
    synchronise_buffers(sharded.module, buffers, ranks)
    return ShardedModel(sharded, plan, tables, table_optimizer, summary, report)
