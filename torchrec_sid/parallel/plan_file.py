"""Sharding plans as JSON files: what TorchRec's ``ShardingPlan`` holds, all of it, and back.

TorchRec writes a plan as JSON but cannot read one, and leaves out cache, bounds check and output settings.
"""

from __future__ import annotations

import dataclasses
import enum
import json
from pathlib import Path
from typing import Any

from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, CacheAlgorithm
from torch import nn
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharding_spec.api import EnumerableShardingSpec
from torchrec.distributed.types import (
    CacheParams,
    EmbeddingModuleShardingPlan,
    ParameterSharding,
    ShardingPlan,
)
from torchrec.modules.embedding_configs import DataType

from torchrec_sid.artifact import write_json
from torchrec_sid.errors import ArtifactError, SidError
from torchrec_sid.parallel.checkpoint_files import read_checkpoint
from torchrec_sid.parallel.embedding_tables import find_tables

LAYOUT_VERSION = 1
_ENUMS = {"bounds_check_mode": BoundsCheckMode, "output_dtype": DataType}


def plan_to_json(plan: ShardingPlan) -> dict[str, Any]:
    """A plan as JSON-serialisable values.

    Raises:
        SidError: it has key-value (SSD) parameters, which have no JSON form here.
    """
    modules = {}
    for path, module_plan in plan.plan.items():
        modules[path] = {name: _parameter_to_json(name, p) for name, p in module_plan.items()}
    return {"kind": "sharding_plan", "version": LAYOUT_VERSION, "modules": modules}


def plan_from_json(value: Any, where: str = "sharding plan") -> ShardingPlan:
    """The plan that :func:`plan_to_json` described.

    Raises:
        ArtifactError: another kind of file, a newer version, or a field that is missing or unknown.
    """
    if not isinstance(value, dict) or value.get("kind") != "sharding_plan":
        raise ArtifactError(
            where, "is not a sharding plan", "Pass the plan.json that torchrec-sid plan writes."
        )
    if value["version"] > LAYOUT_VERSION:
        raise ArtifactError(
            where,
            f"has layout version {value['version']}, this release reads up to {LAYOUT_VERSION}",
            "Upgrade torchrec-sid.",
        )
    plans = {}
    try:
        for path, tables in value["modules"].items():
            plans[path] = EmbeddingModuleShardingPlan()
            for name, fields in tables.items():
                plans[path][name] = _parameter_from_json(fields)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ArtifactError(where, f"cannot be read ({error!r})", "Write the plan again.") from error
    return ShardingPlan(plans)


def save_plan(path: str | Path, plan: ShardingPlan) -> None:
    """Write a plan atomically as JSON."""
    write_json(path, plan_to_json(plan))


def load_plan(path: str | Path) -> ShardingPlan:
    """Read a plan written by :func:`save_plan`; equal to the one that was saved.

    Args:
        path: the file, or a checkpoint's directory, whose metadata holds the plan under ``plan``.

    Raises:
        ArtifactError: missing, not JSON, not a plan, a checkpoint without one.
    """
    path = Path(path)
    if path.is_dir():
        return plan_from_json(read_checkpoint(path).metadata.get("plan"), str(path))
    if not path.is_file():
        raise ArtifactError(str(path), "no such file", "Make a plan with torchrec-sid plan.")
    try:
        value = json.loads(path.read_text())
    except (ValueError, UnicodeDecodeError) as error:
        raise ArtifactError(str(path), f"is not JSON ({error})", "Write the plan again.") from error
    return plan_from_json(value, str(path))


def check_plan(
    plan: ShardingPlan, model: nn.Module, world_size: int, device: str, local_world_size: int | None = None
) -> None:
    """Compare a plan with the unsharded model and the processes that are to use it.

    Args:
        plan: the plan.
        model: unsharded.
        world_size: processes.
        device: kind of device of the processes.
        local_world_size: processes per node; on GPUs a plan names the GPU of each rank. None: not checked.

    Raises:
        SidError: a table without plan or a plan without table, a table of another size, a rank that does
            not run, a placement on another kind of device or another GPU of its node.
    """
    planned = {name: (path, p) for path, tables in plan.plan.items() for name, p in tables.items()}
    tables = find_tables(model)
    remedy = "Plan again for this model, or train with the configuration that the plan was made for."
    for name in sorted(set(planned) ^ set(tables)):
        lacking = "the plan" if name in tables else "the model"
        raise SidError(f"table {name!r}", f"is not in {lacking}", remedy)
    for name, (path, parameter) in planned.items():
        table = tables[name]
        if path != table.module_path:
            raise SidError(
                f"table {name!r}", f"is planned in {path!r}, it is in {table.module_path!r}", remedy
            )
        if any(rank >= world_size for rank in parameter.ranks or ()):
            raise SidError(
                f"table {name!r}",
                f"is planned on rank {max(parameter.ranks)}, {world_size} processes run",
                f"Plan for --world-size {world_size}.",
            )
        if parameter.sharding_spec is None:
            continue
        shards = parameter.sharding_spec.shards
        size = [max(s.shard_offsets[i] + s.shard_sizes[i] for s in shards) for i in range(2)]
        if size != [table.rows, table.dim]:
            raise SidError(
                f"table {name!r}", f"is planned as {size}, it is {[table.rows, table.dim]}", remedy
            )
        _check_placements(name, shards, device, local_world_size)


def _check_placements(name: str, shards: Any, device: str, local_world_size: int | None) -> None:
    for shard in shards:
        placed, rank = shard.placement.device(), shard.placement.rank()
        if placed.type != device:
            raise SidError(
                f"table {name!r}",
                f"is planned for {placed.type}, this run is on {device}",
                f"Plan for {device}.",
            )
        if placed.index is not None and local_world_size and placed.index != rank % local_world_size:
            raise SidError(
                f"table {name!r}",
                f"has rank {rank} on GPU {placed.index}, the nodes have {local_world_size} each",
                f"Plan with local_world_size {local_world_size}.",
            )


def _parameter_to_json(name: str, parameter: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(parameter):
        value = getattr(parameter, field.name)
        if value is None:
            continue
        if field.name == "sharding_spec":
            fields["shards"] = [
                {
                    "offsets": list(s.shard_offsets),
                    "sizes": list(s.shard_sizes),
                    "placement": str(s.placement),
                }
                for s in value.shards
            ]
        elif field.name == "cache_params":
            fields[field.name] = _cache_to_json(name, value)
        elif isinstance(value, enum.Enum):
            fields[field.name] = value.name
        elif isinstance(value, (str, int, float, bool, list, tuple)):
            fields[field.name] = list(value) if isinstance(value, tuple) else value
        else:
            raise SidError(
                f"table {name!r}", f"its plan has {field.name}, which has no JSON form", "Plan without it."
            )
    return fields


def _parameter_from_json(fields: dict[str, Any]) -> ParameterSharding:
    fields = dict(fields)
    shards = fields.pop("shards", None)
    for name, kind in _ENUMS.items():
        if name in fields:
            fields[name] = kind[fields[name]]
    if "cache_params" in fields:
        cache = dict(fields["cache_params"])
        if "algorithm" in cache:
            cache["algorithm"] = CacheAlgorithm[cache["algorithm"]]
        if "precision" in cache:
            cache["precision"] = DataType[cache["precision"]]
        fields["cache_params"] = CacheParams(**cache)
    spec = None
    if shards is not None:
        spec = EnumerableShardingSpec(
            [ShardMetadata(s["offsets"], s["sizes"], s["placement"]) for s in shards]
        )
    return ParameterSharding(sharding_spec=spec, **fields)


def _cache_to_json(name: str, cache: CacheParams) -> dict[str, Any]:
    values = {f.name: getattr(cache, f.name) for f in dataclasses.fields(cache)}
    plain = {k: v.name if isinstance(v, enum.Enum) else v for k, v in values.items() if v is not None}
    # Statistics of the planner's own estimate; nothing trains with them.
    plain.pop("stats", None)
    for key, value in plain.items():
        if not isinstance(value, (str, int, float, bool)):
            raise SidError(
                f"table {name!r}", f"its cache has {key}, which has no JSON form", "Plan without it."
            )
    return plain
