"""All that knows about processes: sharding plans, sharded models, checkpoints."""

from torchrec_sid.parallel.checkpoint import CheckpointManager
from torchrec_sid.parallel.checkpoint_files import CheckpointInfo
from torchrec_sid.parallel.embedding_tables import find_tables, table_parameters
from torchrec_sid.parallel.initialise import initialise_tables
from torchrec_sid.parallel.optimizer import TableOptimizer
from torchrec_sid.parallel.plan_file import load_plan, save_plan
from torchrec_sid.parallel.plan_summary import PlanSummary, format_summary
from torchrec_sid.parallel.planner_config import (
    PlannerConfig,
    ReservationConfig,
    TableConstraint,
    TopologyConfig,
)
from torchrec_sid.parallel.planner_file import load_planner_config, save_planner_config
from torchrec_sid.parallel.planning import PlannedModel, make_plan, measure_feature_lengths
from torchrec_sid.parallel.sharding import ShardedModel, shard_model
from torchrec_sid.parallel.state import apply_training_state, prepare_to_load, training_state

__all__ = [
    "CheckpointInfo",
    "CheckpointManager",
    "PlanSummary",
    "PlannedModel",
    "PlannerConfig",
    "ReservationConfig",
    "ShardedModel",
    "TableConstraint",
    "TableOptimizer",
    "TopologyConfig",
    "apply_training_state",
    "find_tables",
    "format_summary",
    "initialise_tables",
    "load_plan",
    "load_planner_config",
    "make_plan",
    "measure_feature_lengths",
    "prepare_to_load",
    "save_plan",
    "save_planner_config",
    "shard_model",
    "table_parameters",
    "training_state",
]
