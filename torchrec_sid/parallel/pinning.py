"""A partitioner that keeps chosen tables on chosen ranks."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torchrec.distributed.planner.partitioners import GreedyPerfPartitioner
from torchrec.distributed.planner.types import (
    Partitioner,
    PlannerError,
    PlannerErrorType,
    ShardingOption,
    Topology,
)


class PinningPartitioner(Partitioner):
    """Places pinned tables first, on the least loaded of their ranks; the others as ``inner`` does.

    Args:
        ranks: table name -> ranks that may hold its shards.
        inner: partitioner of the other tables.
    """

    def __init__(self, ranks: Mapping[str, tuple[int, ...]], inner: Partitioner | None = None) -> None:
        self._ranks = dict(ranks)
        self._inner: Any = GreedyPerfPartitioner() if inner is None else inner

    def partition(
        self, proposal: list[ShardingOption], storage_constraint: Topology
    ) -> list[ShardingOption]:
        """Fill in the rank of every shard of a proposal.

        Raises:
            PlannerError: a pinned table does not fit its ranks, or the rest does not fit.
        """
        pinned = [option for option in proposal if option.name in self._ranks]
        if not pinned:
            return list(self._inner.partition(proposal, storage_constraint))
        topology = copy.deepcopy(storage_constraint)
        for option in sorted(
            pinned, key=lambda o: (o.total_storage.hbm, o.total_storage.ddr), reverse=True
        ):
            self._place(option, topology)
        rest = [option for option in proposal if option.name not in self._ranks]
        if rest:
            self._inner.partition(rest, topology)
        return proposal

    def _place(self, option: ShardingOption, topology: Topology) -> None:
        for shard in option.shards:
            devices = [topology.devices[rank] for rank in self._ranks[option.name]]
            fitting = [device for device in devices if shard.storage.fits_in(device.storage)]
            if not fitting:
                raise PlannerError(
                    f"table {option.name} does not fit its ranks {self._ranks[option.name]}",
                    PlannerErrorType.PARTITION,
                )
            best = min(fitting, key=lambda device: device.perf.total)
            shard.rank = best.rank
            best.storage -= shard.storage
            best.perf += shard.perf
