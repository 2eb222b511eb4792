"""Configuration of the sharding planner: the cluster, the tables, what to keep free, how to search.

Every field has a default, every value is checked at construction, and every error lists what is allowed.
:mod:`torchrec_sid.parallel.planner_file` reads the same from YAML or TOML.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torchrec_sid.errors import SidError
from torchrec_sid.parallel.presets import node_preset

SHARDING_TYPES = (
    "data_parallel",
    "table_wise",
    "column_wise",
    "row_wise",
    "table_row_wise",
    "table_column_wise",
    "grid_shard",
)
COMPUTE_KERNELS = ("dense", "fused", "fused_uvm", "fused_uvm_caching")
DEVICES = ("cuda", "cpu")
PROPOSERS = ("grid", "greedy", "greedy_flat", "uniform", "dynamic_programming")
PARTITIONERS = ("greedy_perf", "memory_balanced")
RESERVATIONS = ("heuristic", "percentage", "fixed")
BOUNDS_CHECKS = ("fatal", "warning", "ignore", "none")
OUTPUT_DTYPES = ("fp32", "fp16", "bf16")
CACHE_POLICIES = ("lru", "lfu")


@dataclass(frozen=True)
class TopologyConfig:
    """The cluster that a plan is for.

    Args:
        device: ``cuda`` or ``cpu``.
        world_size: processes; None takes the running process group's.
        local_world_size: processes per node; None takes the node's GPUs, at most the world.
        node: a preset of :mod:`torchrec_sid.parallel.presets`; the fields below replace its values.
        hbm_gib: device memory of a rank.
        ddr_gib: host memory of a rank; on ``cpu`` the default is this machine's memory over its ranks.
        hbm_gbps: device memory bandwidth, GB/s.
        ddr_gbps: host memory bandwidth of a rank, GB/s.
        host_to_device_gbps: PCIe, GB/s.
        intra_node_gbps: between the GPUs of a node, GB/s in one direction.
        inter_node_gbps: network of a rank, GB/s.

    Raises:
        SidError: an unknown device or preset, a size that is not positive, a world that the nodes do not
            divide.
    """

    device: str = "cuda"
    world_size: int | None = None
    local_world_size: int | None = None
    node: str = "h100_80gb"
    hbm_gib: float | None = None
    ddr_gib: float | None = None
    hbm_gbps: float | None = None
    ddr_gbps: float | None = None
    host_to_device_gbps: float | None = None
    intra_node_gbps: float | None = None
    inter_node_gbps: float | None = None

    def __post_init__(self) -> None:
        one_of("topology.device", self.device, DEVICES)
        node_preset(self.node)
        for name in (*_SIZES, "world_size", "local_world_size"):
            positive(f"topology.{name}", getattr(self, name))
        world, local = self.world_size, self.local_world_size
        if world is not None and local is not None and world % local:
            raise SidError(
                "topology.world_size", f"{world} is not a multiple of {local} per node", "Fill whole nodes."
            )

    def value(self, name: str) -> float:
        """A size or bandwidth: the field of that name if set, else the preset's."""
        own = getattr(self, name)
        return float(getattr(node_preset(self.node), name) if own is None else own)


_SIZES = (
    "hbm_gib",
    "ddr_gib",
    "hbm_gbps",
    "ddr_gbps",
    "host_to_device_gbps",
    "intra_node_gbps",
    "inter_node_gbps",
)


@dataclass(frozen=True)
class TableConstraint:
    """What one table (or every table that a pattern matches) may become. None leaves TorchRec's default.

    Args:
        sharding_types: allowed ways to shard.
        compute_kernels: allowed kernels; ``fused_uvm_caching`` keeps rows in host memory behind a cache.
        ranks: only these ranks may hold shards of it.
        min_partition: narrowest column shard, a multiple of 4.
        pooling_factors: mean ids per sample, one for each feature of the table. A model's SID collections
            state their own (:func:`~torchrec_sid.parallel.planning.model_pooling_factors`).
        num_poolings: mean poolings per sample, one for each feature.
        cache_load_factor: part of the rows in the cache, above 0 and at most 1; needs
            ``fused_uvm_caching``.
        cache_policy: ``lru`` or ``lfu``.
        enforce_hbm: keep optimizer state in device memory even when rows are cached.
        stochastic_rounding: for fp16 tables.
        bounds_check: what an id out of range does: ``fatal``, ``warning``, ``ignore``, ``none``.
        output_dtype: of the embeddings that travel: ``fp32``, ``fp16``, ``bf16``.

    Raises:
        SidError: an unknown value, or a combination that cannot be.
    """

    sharding_types: tuple[str, ...] | None = None
    compute_kernels: tuple[str, ...] | None = None
    ranks: tuple[int, ...] | None = None
    min_partition: int | None = None
    pooling_factors: tuple[float, ...] | None = None
    num_poolings: tuple[float, ...] | None = None
    cache_load_factor: float | None = None
    cache_policy: str | None = None
    enforce_hbm: bool | None = None
    stochastic_rounding: bool | None = None
    bounds_check: str | None = None
    output_dtype: str | None = None

    def __post_init__(self) -> None:
        lists: tuple[tuple[str, tuple[str, ...]], ...] = (
            ("sharding_types", SHARDING_TYPES),
            ("compute_kernels", COMPUTE_KERNELS),
        )
        for name, allowed in lists:
            values = getattr(self, name)
            if values is not None and not values:
                raise SidError(
                    name, "is empty", f"Name at least one of {', '.join(allowed)}, or leave it out."
                )
            for value in values or ():
                one_of(name, value, allowed)
        optional = (
            ("cache_policy", CACHE_POLICIES),
            ("bounds_check", BOUNDS_CHECKS),
            ("output_dtype", OUTPUT_DTYPES),
        )
        for name, allowed in optional:
            if getattr(self, name) is not None:
                one_of(name, getattr(self, name), allowed)
        self._check_numbers()
        self._check_combination()

    def _check_numbers(self) -> None:
        for name in ("pooling_factors", "num_poolings"):
            for value in getattr(self, name) or ():
                positive(name, value)
        if self.min_partition is not None and (self.min_partition <= 0 or self.min_partition % 4):
            raise SidError("min_partition", str(self.min_partition), "Give a positive multiple of 4.")
        if self.ranks is not None and (not self.ranks or min(self.ranks) < 0):
            raise SidError("ranks", str(self.ranks), "Name at least one rank, from 0.")
        if self.cache_load_factor is not None and not 0 < self.cache_load_factor <= 1:
            raise SidError("cache_load_factor", str(self.cache_load_factor), "It is above 0, at most 1.")

    def _check_combination(self) -> None:
        kernels, types = self.compute_kernels, self.sharding_types
        cached = self.cache_load_factor is not None or self.cache_policy is not None
        if cached and kernels is not None and "fused_uvm_caching" not in kernels:
            raise SidError(
                "cache_load_factor",
                f"is set, but the kernels are {', '.join(kernels)}",
                "Allow fused_uvm_caching, the kernel that has a cache.",
            )
        if kernels is None or types is None:
            return
        if set(types) == {"data_parallel"} and "dense" not in kernels:
            raise SidError(
                "compute_kernels", f"{', '.join(kernels)} with data_parallel", "data_parallel needs dense."
            )
        if "data_parallel" not in types and set(kernels) == {"dense"}:
            raise SidError(
                "compute_kernels",
                f"dense with {', '.join(types)}",
                "The planner offers dense for data_parallel only: allow fused.",
            )


@dataclass(frozen=True)
class ReservationConfig:
    """Memory that the tables must leave free on every rank.

    Args:
        kind: ``heuristic`` keeps a share, the dense model and the input buffers; ``percentage`` a share
            alone; ``fixed`` a number of GiB.
        share: part of the memory, 0 to below 1, for ``heuristic`` and ``percentage``.
        gib: for ``fixed``.
        dense_gib: the dense model with its gradients and optimizer, for ``heuristic``; None takes six times
            its parameters (weight, gradient, bucket and optimizer state).

    Raises:
        SidError: an unknown kind or a number out of range.
    """

    kind: str = "heuristic"
    share: float = 0.15
    gib: float = 8.0
    dense_gib: float | None = None

    def __post_init__(self) -> None:
        one_of("reservation.kind", self.kind, RESERVATIONS)
        if not 0 <= self.share < 1:
            raise SidError(
                "reservation.share", str(self.share), "It is a part of the memory, 0 to below 1."
            )
        positive("reservation.gib", self.gib)
        positive("reservation.dense_gib", self.dense_gib)


@dataclass(frozen=True)
class PlannerConfig:
    """Everything that decides a sharding plan, beside the model.

    Args:
        topology: the cluster.
        batch_size: samples per rank and step.
        tables: table name, or a pattern with ``*`` and ``?``, -> constraint. A name beats a pattern; of
            several patterns the first that matches counts.
        reservation: memory to leave free.
        proposers: how to search, tried in order; TorchRec's four by default.
        partitioner: how shards are placed on ranks.
        timeout_seconds: stop searching after that and take the best plan so far.

    Raises:
        SidError: an unknown proposer or partitioner, a number that is not positive.

    Example:
        >>> PlannerConfig(
        ...     TopologyConfig(world_size=16, node="a100_80gb"),
        ...     tables={"history_*": TableConstraint(sharding_types=("row_wise",))},
        ... ).batch_size
        512
    """

    topology: TopologyConfig = field(default_factory=TopologyConfig)
    batch_size: int = 512
    tables: Mapping[str, TableConstraint] = field(default_factory=dict)
    reservation: ReservationConfig = field(default_factory=ReservationConfig)
    proposers: tuple[str, ...] = ("grid", "greedy", "greedy_flat", "uniform")
    partitioner: str = "greedy_perf"
    timeout_seconds: int | None = None

    def __post_init__(self) -> None:
        positive("batch_size", self.batch_size)
        positive("timeout_seconds", self.timeout_seconds)
        if not self.proposers:
            raise SidError("proposers", "is empty", f"Name at least one of {', '.join(PROPOSERS)}.")
        for name in self.proposers:
            one_of("proposers", name, PROPOSERS)
        one_of("partitioner", self.partitioner, PARTITIONERS)


def one_of(where: str, value: Any, allowed: Collection[str]) -> None:
    """Raise SidError unless the value is one of those allowed."""
    if value not in allowed:
        raise SidError(where, f"unknown value {value!r}", f"It is one of {', '.join(allowed)}.")


def positive(where: str, value: float | None) -> None:
    """Raise SidError unless the value is None or above zero."""
    if value is not None and not value > 0:
        raise SidError(where, str(value), "It must be above 0.")
