"""From `TableConstraint`s by name or pattern to TorchRec's `ParameterConstraints`, checked.

TorchRec ignores a constraint on a table it does not know, and reports a combination that cannot be without
saying what could. Here both are errors that list the choices, before the planner starts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, CacheAlgorithm
from torch import nn
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.types import CacheParams
from torchrec.modules.embedding_configs import DataType

from torchrec_sid.errors import SidError
from torchrec_sid.parallel.embedding_tables import Table, find_tables
from torchrec_sid.parallel.planner_config import PlannerConfig, TableConstraint
from torchrec_sid.parallel.sharders import CPU_DEFAULT_TYPES, CpuBagSharder, CpuSequenceSharder

PINNABLE_TYPES = ("table_wise", "column_wise")
"""Types whose shards may be confined to some ranks; the others use every rank, or every rank of a node."""


UNEVEN_TYPES = ("table_wise", "column_wise")
"""Types of tables with many bags a sample, unless a constraint names others.

Sharded by row, every rank would send a partial sum of every bag: with more ranks than rows in a bag that is
more than the rows themselves. On a CPU nothing else runs: gloo reduces equal parts only, and ranks have
different numbers of such bags."""


def table_features(model: nn.Module) -> set[str]:
    """Features of the batch that the tables of a model read.

    A module that makes keys of its own from them states them as ``input_features``.
    """
    features = {name for table in find_tables(model).values() for name in table.config.feature_names}
    for module in model.modules():
        features |= set(getattr(module, "input_features", ()))
    return features


def model_num_poolings(
    model: nn.Module, feature_lengths: Mapping[str, float] | None = None
) -> dict[str, tuple[float, ...]]:
    """Mean bags per sample of the tables that have another number than one, one for each feature.

    A module whose bags are something else than samples states them through a method
    ``num_poolings(feature_lengths)``: SID collections do for tables of which every event is a bag. Ranks
    have different numbers of such bags.

    Args:
        model: unsharded.
        feature_lengths: as for :func:`model_pooling_factors`.
    """
    found = {}
    for module in model.modules():
        state = getattr(module, "num_poolings", None)
        if callable(state):
            stated = state(dict(feature_lengths or {}))
            found.update({name: tuple(map(float, values)) for name, values in stated.items()})
    return found


def model_pooling_factors(
    model: nn.Module, feature_lengths: Mapping[str, float] | None = None
) -> dict[str, tuple[float, ...]]:
    """Mean ids per sample of each table: what the planner calls pooling factors, one for each feature.

    A module that turns items into several ids states them itself, through a method
    ``pooling_factors(feature_lengths)`` that returns table name -> one number for each feature: SID
    collections do (prefixes or pieces per item, times items per sample). Other tables have one id per item.

    Args:
        model: unsharded.
        feature_lengths: feature -> mean items per sample, as the data has them; 1 where it is not said.
    """
    lengths = dict(feature_lengths or {})
    factors = {
        name: tuple(float(lengths.get(feature, 1.0)) for feature in table.config.feature_names)
        for name, table in find_tables(model).items()
    }
    for module in model.modules():
        state = getattr(module, "pooling_factors", None)
        if callable(state):
            factors.update({name: tuple(map(float, values)) for name, values in state(lengths).items()})
    return factors


def match_constraints(
    config: PlannerConfig, tables: Mapping[str, Table]
) -> dict[str, tuple[str, TableConstraint]]:
    """The constraint of each table that has one, with the name or pattern it stands under.

    Raises:
        SidError: a name or pattern that no table has; lists the tables.
    """
    for pattern in config.tables:
        if not any(fnmatchcase(name, pattern) for name in tables):
            raise SidError(
                f"planner table {pattern!r}",
                "matches no table of the model",
                f"Tables are {_listed(tables)}.",
            )
    matched = {}
    for name in tables:
        hits = [name] if name in config.tables else [p for p in config.tables if fnmatchcase(name, p)]
        if hits:
            matched[name] = (hits[0], config.tables[hits[0]])
    return matched


def resolve_constraints(
    config: PlannerConfig,
    tables: Mapping[str, Table],
    factors: Mapping[str, Sequence[float]],
    poolings: Mapping[str, Sequence[float]],
) -> dict[str, ParameterConstraints]:
    """TorchRec's constraints for every table of the model.

    Args:
        config: its ``tables``, and the device of its ``topology``.
        tables: of the unsharded model.
        factors: table name -> mean ids per bag of each feature; a configured ``pooling_factors`` wins.
        poolings: table name -> mean bags per sample of each feature, where it is not one; likewise.

    Raises:
        SidError: an unknown table, a combination that the device does not have, pooling factors that do not
            fit the features, ranks outside the world. Each lists what would do.
    """
    matched = match_constraints(config, tables)
    return {
        name: _resolve(
            table,
            *matched.get(name, (name, TableConstraint())),
            config,
            factors.get(name),
            poolings.get(name),
        )
        for name, table in tables.items()
    }


def _resolve(
    table: Table,
    where: str,
    constraint: TableConstraint,
    config: PlannerConfig,
    stated: Sequence[float] | None,
    bags: Sequence[float] | None,
) -> ParameterConstraints:
    device = config.topology.device
    uneven = bags is not None
    types = list(constraint.sharding_types) if constraint.sharding_types else None
    if types is None and constraint.ranks is not None:
        types = list(PINNABLE_TYPES)
    if types is None and uneven:
        types = list(UNEVEN_TYPES[:1] if device == "cpu" else UNEVEN_TYPES)
    if types is None and device == "cpu":
        types = list(CPU_DEFAULT_TYPES)
    kernels = list(constraint.compute_kernels) if constraint.compute_kernels else None
    _require_combination(table, where, device, types, kernels, uneven and device == "cpu")
    if constraint.ranks is not None:
        _require_pinnable(where, constraint.ranks, types, config.topology.world_size)
    features = len(table.config.feature_names)
    factors = _per_feature(
        where, "pooling_factors", constraint.pooling_factors or stated or (1.0,), features
    )
    poolings = constraint.num_poolings or bags
    return ParameterConstraints(
        sharding_types=types,
        compute_kernels=kernels,
        min_partition=constraint.min_partition,
        pooling_factors=factors,
        num_poolings=_per_feature(where, "num_poolings", poolings, features) if poolings else None,
        cache_params=_cache(constraint),
        enforce_hbm=constraint.enforce_hbm,
        stochastic_rounding=constraint.stochastic_rounding,
        bounds_check_mode=BoundsCheckMode[constraint.bounds_check.upper()]
        if constraint.bounds_check
        else None,
        output_dtype=DataType[constraint.output_dtype.upper()] if constraint.output_dtype else None,
        feature_names=list(table.config.feature_names),
    )


def _require_combination(
    table: Table,
    where: str,
    device: str,
    types: list[str] | None,
    kernels: list[str] | None,
    uneven: bool,
) -> None:
    sharder: Any = CpuBagSharder() if table.pooled else CpuSequenceSharder()
    offered = {kind: list(sharder.compute_kernels(kind, device)) for kind in sharder.sharding_types(device)}
    if uneven:
        offered = {kind: able for kind, able in offered.items() if kind in (*UNEVEN_TYPES, "data_parallel")}
        if types is not None and (wrong := sorted(set(types) - set(offered))):
            raise SidError(
                f"planner table {where!r}",
                f"{wrong[0]} on a CPU, and ranks have different numbers of its bags",
                f"It can be {', '.join(offered)}; or let its events keep their rows (events='rows').",
            )
    possible = any(
        (types is None or kind in types) and (kernels is None or set(kernels) & set(able))
        for kind, able in offered.items()
    )
    if not possible:
        kind_of_table = "an EmbeddingBagCollection" if table.pooled else "an EmbeddingCollection"
        asked = f"{', '.join(types or ['any type'])} with {', '.join(kernels or ['any kernel'])}"
        listed = "; ".join(f"{kind}: {', '.join(able)}" for kind, able in offered.items())
        raise SidError(
            f"planner table {where!r}",
            f"{kind_of_table} on {device} cannot be {asked}",
            f"It can be {listed}.",
        )


def _require_pinnable(
    where: str, ranks: tuple[int, ...], types: list[str] | None, world_size: int | None
) -> None:
    other = [kind for kind in types or () if kind not in PINNABLE_TYPES]
    if other:
        raise SidError(
            f"planner table {where!r}",
            f"ranks are set, but {other[0]} spreads over all ranks or a whole node",
            f"With ranks, sharding_types are {' and '.join(PINNABLE_TYPES)}.",
        )
    if world_size is not None and max(ranks) >= world_size:
        raise SidError(
            f"planner table {where!r}", f"rank {max(ranks)}", f"Ranks are 0 to {world_size - 1}."
        )


def _per_feature(where: str, name: str, values: Sequence[float], features: int) -> list[float]:
    if len(values) == 1:
        return list(values) * features
    if len(values) != features:
        raise SidError(
            f"planner table {where!r}",
            f"{len(values)} {name}, the table has {features} features",
            "Give one number for each feature, or one for all.",
        )
    return list(values)


def _cache(constraint: TableConstraint) -> CacheParams | None:
    if constraint.cache_load_factor is None and constraint.cache_policy is None:
        return None
    policy = constraint.cache_policy
    return CacheParams(
        algorithm=CacheAlgorithm[policy.upper()] if policy else None,
        load_factor=constraint.cache_load_factor,
    )


def _listed(tables: Mapping[str, Table]) -> str:
    names = sorted(tables)
    shown = ", ".join(names[:30])
    return shown if len(names) <= 30 else f"{shown} and {len(names) - 30} more"
