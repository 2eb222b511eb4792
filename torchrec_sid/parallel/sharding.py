"""`shard_model`: a model over processes, with weights that do not depend on how many there are."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.types import ShardingEnv, ShardingPlan
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from torchrec_sid.errors import SidError
from torchrec_sid.parallel.buffers import dense_buffer_names, move_buffers, synchronise_buffers
from torchrec_sid.parallel.embedding_tables import Table, find_tables, table_parameters
from torchrec_sid.parallel.hybrid import shard_hybrid
from torchrec_sid.parallel.initialise import copy_full_into_sharded, initialise_tables
from torchrec_sid.parallel.optimizer import TableOptimizer, TableOptimizers, optimizers_by_table
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
    table_optimizers: dict[str, TableOptimizer]
    """Of every table, by name."""
    frozen: frozenset[str]
    """Tables that do not train."""
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
        tables = {table.weight_key: name for name, table in self.tables.items()}
        rest = dict(in_backward_optimizer_filter(self.model.named_parameters()))
        other = {name: p for name, p in rest.items() if name not in tables}
        parts: list[KeyedOptimizer] = [self.model.fused_optimizer]
        for optimizer in dict.fromkeys(self.table_optimizers.values()):
            replicated = {
                key: rest[key]
                for key, name in tables.items()
                if key in rest and name not in self.frozen and self.table_optimizers[name] == optimizer
            }
            if replicated:
                parts.append(KeyedOptimizerWrapper(replicated, optimizer.factory()))
        if other:
            parts.append(KeyedOptimizerWrapper(other, dense))
        return CombinedOptimizer(parts)


def shard_model(
    model: nn.Module,
    plan: ShardingPlan | PlannerConfig,
    *,
    device: torch.device,
    table_optimizer: TableOptimizers,
    seed: int | None,
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
        table_optimizer: fused into the backward pass of every table, one or several by table. A table that
            already has one (``apply_optimizer_in_backward``) keeps it; a frozen one does not train.
        seed: of the tables' weights; None keeps those that the model has, as frozen tables always do.
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
    tables = find_tables(model)
    optimizers = optimizers_by_table(table_optimizer, tables)
    buffers = dense_buffer_names(model)
    weights = table_parameters(model, tables)
    for name, optimizer in optimizers.items():
        optimizer.require_device(device.type)
        optimizer.mark([weights[name]])
    frozen = frozenset(name for name, weight in weights.items() if not weight.requires_grad)
    kept = _weights_to_keep(weights, frozen if seed is not None else frozenset(tables))
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
    initialise_tables(sharded, {n: t for n, t in tables.items() if n not in kept}, seed or 0)
    state = sharded.state_dict()
    keys = {tables[name].weight_key: weight for name, weight in kept.items()}
    copy_full_into_sharded({key: state[key] for key in keys}, keys)
    synchronise_buffers(sharded.module, buffers, ranks)
    return ShardedModel(sharded, plan, tables, optimizers, frozen, summary, report)


def _weights_to_keep(weights: Mapping[str, nn.Parameter], names: frozenset[str]) -> dict[str, Tensor]:
    """Copies of tables whose rows must not be drawn anew.

    Raises:
        SidError: one is on meta: it has no rows.
    """
    for name in names:
        if weights[name].is_meta:
            raise SidError(
                f"table {name!r}",
                "is to keep its rows, but is on the meta device",
                "Load them first, or let the table train and give a seed.",
            )
    return {name: weights[name].detach().clone() for name in names}
