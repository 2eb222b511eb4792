"""`PlannerConfig` from a YAML or TOML file, checked key by key.

batch_size: 4096
topology: {node: h100_80gb, world_size: 64}
tables:
  history_*: {sharding_types: [row_wise], compute_kernels: [fused]}
  item_piece: {compute_kernels: [fused_uvm_caching], cache_load_factor: 0.2}
reservation: {kind: percentage, share: 0.2}
"""

from __future__ import annotations

import dataclasses
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from torchrec_sid.artifact import write_atomically
from torchrec_sid.errors import SidError
from torchrec_sid.parallel.planner_config import PlannerConfig


def load_planner_config(path: str | Path) -> PlannerConfig:
    """Read a planner configuration.

    Args:
        path: a ``.yaml``, ``.yml`` or ``.toml`` file with the fields of
            :class:`~torchrec_sid.parallel.planner_config.PlannerConfig`; all are optional.

    Raises:
        SidError: no such file, another suffix, a syntax error, an unknown key (lists those that are known),
            a value of the wrong type or out of range; the key is named with its path in the file.
    """
    path = Path(path)
    if not path.is_file():
        raise SidError(str(path), "no such file", "Pass a planner configuration in YAML or TOML.")
    if path.suffix not in (".yaml", ".yml", ".toml"):
        raise SidError(str(path), f"unknown suffix {path.suffix!r}", "Use .yaml, .yml or .toml.")
    try:
        text = path.read_text()
        value = tomllib.loads(text) if path.suffix == ".toml" else yaml.safe_load(text)
    except (yaml.YAMLError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        problem = " ".join(str(error).split())
        raise SidError(str(path), f"cannot be read ({problem})", "Mend the syntax.") from error
    return planner_config_from(value or {}, where=str(path))


def planner_config_from(value: Any, where: str = "planner") -> PlannerConfig:
    """The configuration that nested mappings describe; errors as in :func:`load_planner_config`."""
    config: PlannerConfig = _build(PlannerConfig, value, where, "")
    return config


def save_planner_config(path: str | Path, config: PlannerConfig) -> None:
    """Write a configuration as YAML, atomically; :func:`load_planner_config` reads it back equal."""
    text = yaml.safe_dump(planner_config_to_json(config), sort_keys=False)
    write_atomically(path, lambda temporary: temporary.write_text(text))


def planner_config_to_json(config: PlannerConfig) -> dict[str, Any]:
    """A configuration as nested plain values, without the fields that are None."""
    plain: dict[str, Any] = _plain(config)
    return plain


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
        return {name: _plain(item) for name, item in fields if item is not None}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _build(kind: type[Any], value: Any, where: str, key: str) -> Any:
    if not isinstance(value, Mapping):
        raise SidError(
            _at(where, key), f"a {type(value).__name__}", "It must be a mapping of names to values."
        )
    hints = typing.get_type_hints(kind)
    unknown = [name for name in value if name not in hints]
    if unknown:
        raise SidError(
            _at(where, key), f"unknown key {unknown[0]!r}", f"Known keys are {', '.join(hints)}."
        )
    fields = {name: _convert(hints[name], item, where, _join(key, name)) for name, item in value.items()}
    try:
        return kind(**fields)
    except SidError as error:
        raise SidError(f"{_at(where, key)}: {error.where}", error.found, error.remedy) from error


def _convert(hint: Any, value: Any, where: str, key: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _convert(next(a for a in arguments if a is not type(None)), value, where, key)
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type[Any], hint), value, where, key)
    if origin is tuple:
        # A single value stands for a list of one, as everybody writes it once.
        items = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_convert(arguments[0], item, where, f"{key}[{i}]") for i, item in enumerate(items))
    if origin is not None:
        if not isinstance(value, Mapping):
            raise SidError(
                _at(where, key), f"a {type(value).__name__}", "It must map table names to constraints."
            )
        return {
            str(name): _convert(arguments[1], item, where, _join(key, str(name)))
            for name, item in value.items()
        }
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is not bool and isinstance(value, bool)):
        raise SidError(
            _at(where, key), f"{value!r} is a {type(value).__name__}", f"It must be a {hint.__name__}."
        )
    return value


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _at(where: str, key: str) -> str:
    return f"{where}: {key}" if key else where
