"""2D parallelism: tables sharded over groups of ranks, the groups replicas of one another.

TorchRec's ``DMPCollection`` refuses a CPU. Two things in it are tied to an accelerator, a check of the
device type and placements like ``cpu:1``; :class:`CpuDmpCollection` replaces both, so that a 2D run can be
rehearsed on a laptop. Replicas average weights and optimizer states after each step: with SGD that equals
training on one process. With Adagrad it does not, on any device: the average of the replicas' accumulated
squares is not the accumulated square of the mean gradient.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.remote_device import _remote_device
from torchrec.distributed.model_parallel import DistributedModelParallel, DMPCollection
from torchrec.distributed.types import DMPCollectionContext, ShardingEnv2D, ShardingPlan

from torchrec_sid.errors import SidError


def shard_hybrid(
    model: nn.Module, plan: ShardingPlan, device: torch.device, replicas: int, sharders: list[Any]
) -> DMPCollection:
    """Shard a model over each of ``replicas`` groups of ranks.

    Rank r belongs to group ``r % replicas``. After every optimizer step the groups must be averaged with
    ``model.sync()``; ``TrainPipelineSparseDist`` does it by itself.

    Args:
        model: unsharded.
        plan: for one group: made for ``world_size / replicas`` ranks.
        device: of this process.
        replicas: number of groups, at least 2.
        sharders: as for DistributedModelParallel.

    Raises:
        SidError: the world is not a multiple of ``replicas``.
    """
    world = dist.get_world_size()
    if replicas < 2 or world % replicas:
        raise SidError(
            "replicas",
            f"{replicas} over {world} processes",
            "Choose a divisor of the processes, at least 2.",
        )
    plan = copy.deepcopy(plan)  # TorchRec moves it to the ranks of this process's group in place.
    if device.type == "cpu":
        return CpuDmpCollection(model, plan, world // replicas, sharders)
    return DMPCollection(
        module=model,
        device=device,
        plan=plan,
        world_size=world,
        sharding_group_size=world // replicas,
        global_pg=dist.GroupMember.WORLD,
        sharders=sharders,
    )


class CpuDmpCollection(DMPCollection):
    """``DMPCollection`` on a CPU over gloo; see the module.

    Args:
        module: unsharded.
        plan: for one group; changed in place.
        group_size: ranks of a group.
        sharders: as for DistributedModelParallel.
    """

    def __init__(self, module: nn.Module, plan: ShardingPlan, group_size: int, sharders: list[Any]) -> None:
        device = torch.device("cpu")
        world = dist.get_world_size()
        self._device = device
        self._pg = dist.GroupMember.WORLD
        self._global_rank = dist.get_rank()
        self._custom_all_reduce = self._average
        self._sharder_map = {sharder.module_type: sharder for sharder in sharders}
        context = DMPCollectionContext(module=None, plan=plan, sharding_group_size=group_size)
        self._default_ctx, self._ctxs = context, [context]
        self._submodule_ctxs: list[Any] = []
        self._use_sharded_relay, self._sharded_relay_state = False, None
        context.device_mesh, context.sharding_pg, context.replica_pg = self._create_process_groups(
            self._global_rank, world, group_size
        )
        self._remap_sharding_plan(plan, self._global_rank, world // group_size, group_size)
        _drop_device_index(plan)
        env = ShardingEnv2D(
            global_pg=self._pg,
            sharding_pg=context.sharding_pg,
            replica_pg=context.replica_pg,
            device_mesh=context.device_mesh,
        )
        DistributedModelParallel.__init__(self, module, env, device, plan, sharders)
        self._group_sharded_modules(self._ctxs)
        self._cache_sync_tensors(self._ctxs)

    def _average(self, tensors: list[Tensor]) -> None:
        group = self._default_ctx.replica_pg
        for tensor in tensors:  # gloo has no mean
            dist.all_reduce(tensor, group=group)
            tensor.div_(group.size())


def _drop_device_index(plan: ShardingPlan) -> None:
    for tables in plan.plan.values():
        for parameter in tables.values():
            for shard in parameter.sharding_spec.shards if parameter.sharding_spec else ():
                shard.placement = _remote_device(f"rank:{shard.placement.rank()}/cpu")
