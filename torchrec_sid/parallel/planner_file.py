"""`PlannerConfig` from a YAML or TOML file, checked key by key, and back.

batch_size: 4096
topology: {node: h100_80gb, world_size: 64}
tables:
  history_*: {sharding_types: [row_wise], compute_kernels: [fused]}
  item_piece: {compute_kernels: [fused_uvm_caching], cache_load_factor: 0.2}
reservation: {kind: percentage, share: 0.2}
"""

from __future__ import annotations

from pathlib import Path

import yaml

from torchrec_sid.artifact import write_atomically
from torchrec_sid.options import load_options, plain
from torchrec_sid.parallel.planner_config import PlannerConfig


def load_planner_config(path: str | Path) -> PlannerConfig:
    """Read a planner configuration; all fields are optional.

    Args:
        path: a ``.yaml``, ``.yml``, ``.json`` or ``.toml`` file with the fields of
            :class:`~torchrec_sid.parallel.planner_config.PlannerConfig`.

    Raises:
        SidError: see :func:`torchrec_sid.options.load_options`.
    """
    return load_options(PlannerConfig, path)


def save_planner_config(path: str | Path, config: PlannerConfig) -> None:
    """Write a configuration as YAML, atomically; :func:`load_planner_config` reads it back equal."""
    text = yaml.safe_dump(plain(config), sort_keys=False)
    write_atomically(path, lambda temporary: temporary.write_text(text))
