"""Memory kept free on every rank, on a CPU as well.

TorchRec's reservations take their share of device memory alone: on a CPU the tables could fill the host's.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn
from torchrec.distributed.planner.storage_reservations import (
    FixedPercentageStorageReservation,
    HeuristicalStorageReservation,
)
from torchrec.distributed.planner.types import Topology

from torchrec_sid.parallel.embedding_tables import Table
from torchrec_sid.parallel.planner_config import PlannerConfig

_GIB = 2**30


class ShareReservation(FixedPercentageStorageReservation):
    """A share of every rank's memory.

    Args:
        percentage: the share, 0 to 1.
    """

    def reserve(self, topology: Topology, *args: Any, **kwargs: Any) -> Topology:
        """The topology without what is reserved."""
        return _take_host_share(self, topology, super().reserve(topology, *args, **kwargs))


class DenseReservation(HeuristicalStorageReservation):
    """A share of every rank's memory, the dense model and the buffers of ids.

    Args:
        percentage: the share, 0 to 1.
        dense_tensor_estimate: bytes of the dense model with gradients and optimizer.
    """

    def reserve(self, topology: Topology, *args: Any, **kwargs: Any) -> Topology:
        """The topology without what is reserved."""
        return _take_host_share(self, topology, super().reserve(topology, *args, **kwargs))


def _take_host_share(reservation: Any, topology: Topology, reserved: Topology) -> Topology:
    if topology.compute_device == "cpu":
        for before, device in zip(topology.devices, reserved.devices, strict=True):
            device.storage.ddr -= int(reservation._percentage * before.storage.ddr)
    reservation._last_reserved_topology = copy.deepcopy(reserved)
    return reserved


def make_reservation(
    config: PlannerConfig, model: nn.Module, tables: Mapping[str, Table]
) -> ShareReservation | DenseReservation:
    """The reservation that a configuration with a resolved topology asks for.

    Args:
        config: its ``reservation`` and ``topology``.
        model: unsharded.
        tables: of the model.
    """
    kept = config.reservation
    if kept.kind == "percentage":
        return ShareReservation(kept.share)
    if kept.kind == "fixed":
        memory = config.topology.value("hbm_gib" if config.topology.device == "cuda" else "ddr_gib")
        return ShareReservation(min(1.0, kept.gib / memory))
    # Always stated: on meta tensors TorchRec's own estimate of the dense part is unreliable.
    dense = kept.dense_gib * _GIB if kept.dense_gib is not None else 6 * dense_bytes(model, tables)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return DenseReservation(kept.share, dense_tensor_estimate=max(1, int(dense)))


def dense_bytes(model: nn.Module, tables: Mapping[str, Table]) -> int:
    """Bytes of the parameters and buffers outside the tables."""
    weights = {table.weight_key for table in tables.values()}
    parameters = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if n not in weights)
    return parameters + sum(b.numel() * b.element_size() for b in model.buffers())
