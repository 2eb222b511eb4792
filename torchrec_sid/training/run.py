"""A run, stage by stage: open the log, open what its items are, build, shard, and a loop that is ready."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchrec.optim.keyed import CombinedOptimizer

from torchrec_sid.artifact import save_artifact
from torchrec_sid.data.batch import BatchConfig
from torchrec_sid.data.prepare import log_fingerprint, prepare
from torchrec_sid.data.prepared import PreparedLog
from torchrec_sid.data.reader import BatchReader
from torchrec_sid.data.schema import LogFolder, find_specification
from torchrec_sid.data.statistics import mean_history
from torchrec_sid.errors import SidError
from torchrec_sid.metrics import SliceMetrics
from torchrec_sid.models.build import Ranking, build_ranking
from torchrec_sid.models.channels import arm_named
from torchrec_sid.models.dlrm import RankingOutput
from torchrec_sid.models.stores import ItemSource, ItemStore
from torchrec_sid.parallel.checkpoint import CheckpointManager
from torchrec_sid.parallel.checkpoint_files import CheckpointInfo
from torchrec_sid.parallel.constraints import model_pooling_factors, table_features
from torchrec_sid.parallel.embedding_tables import find_tables
from torchrec_sid.parallel.plan_file import load_plan, plan_to_json
from torchrec_sid.parallel.planner_config import PlannerConfig
from torchrec_sid.parallel.planner_file import load_planner_config
from torchrec_sid.parallel.ranks import Ranks
from torchrec_sid.parallel.sharding import ShardedModel, shard_model
from torchrec_sid.seeding import derived_generator
from torchrec_sid.training.early_stopping import EarlyStopping
from torchrec_sid.training.log_features import group_names, log_sizes
from torchrec_sid.training.loop import Position, TrainingLoop
from torchrec_sid.training.run_record import run_identity
from torchrec_sid.training.schedule import RateSchedule, clip_gradients, make_dense_optimizer
from torchrec_sid.training.train_config import TrainConfig

PREDICTIONS = "predictions"
"""Kind of the artefact that holds what a rank predicts: ``logits`` float32 (``[rows, T]`` for T > 1 tasks),
``labels``, ``weights``, ``segments`` and ``users``, ``[rows]`` each, in the order of the split."""
PREDICTIONS_VERSION = 2
"""1 held ``predictions``, probabilities alone."""


# Stage 1: the log.


def open_log(config: TrainConfig, ranks: Ranks, begun: CheckpointInfo | None = None) -> PreparedLog:
    """Prepare the log where it is not up to date, on rank 0, and open it.

    Args:
        config: of the run.
        ranks: its processes.
        begun: the newest checkpoint in its directory: a run with another log is refused before anything is
            prepared in the place of what that one reads.
    """
    out = Path(config.prepared or Path(config.output) / "prepared")

    def make() -> str:
        specification = find_specification(config.data, config.specification)
        if begun is not None:
            mark = log_fingerprint(config.data, out, config.prepare, specification=specification)
            if (trained := begun.identity.get("log", mark)) != mark:
                raise SidError(
                    str(begun.path),
                    f"was trained with log {trained[:12]}, this run has log {mark[:12]}",
                    "Pass the log of that run, or start a new run in another directory.",
                )
        return prepare(config.data, out, config.prepare, specification=specification).fingerprint

    ranks.first(make, where=config.data)
    return replace(PreparedLog.open(out), closed=config.closed_splits)


# Stage 2: what its items are.


def open_stores(config: TrainConfig, log: PreparedLog) -> tuple[ItemStore, ...]:
    """Open what the arm of a run reads of the log's items, with the controls of the configuration.

    Raises:
        SidError: an option that the arm needs is missing, or artefacts do not belong together.
    """
    arm = arm_named(config.model.arm)
    source = ItemSource(
        arm.name,
        arm.requires,
        torch.from_numpy(np.array(log.item_ids)),
        config.options,
        lambda: _content(config, log),
        torch.from_numpy(np.array(log.item_train_events) > 0),
    )
    stores: Iterable[ItemStore] = (kind.open(source) for kind in arm.stores)
    if config.shuffle_sids:
        drawn = derived_generator(config.seed, "shuffled SIDs")
        order = torch.randperm(log.items, generator=drawn)
        stores = [_with_values(store, {n: v[order] for n, v in store.values.items()}) for store in stores]
    if config.hide_new:
        new = torch.from_numpy(np.array(log.item_train_events) == 0)
        stores = [_hide(store, new) for store in stores]
    return tuple(stores)


def _content(config: TrainConfig, log: PreparedLog) -> Tensor:
    item_id = None if log.specification is None else log.specification.columns.item_id
    folder = LogFolder.open(config.data, item_id=item_id, embeddings=config.embeddings)
    names = config.source.split("+") if config.source else [None]
    return torch.from_numpy(np.concatenate([folder.embedding_matrix(name) for name in names], 1))


def _hide(store: ItemStore, new: Tensor) -> ItemStore:
    hidden = {}
    for name, unknown in store.unknown().items():
        hidden[name] = store.values[name].clone()
        hidden[name][new] = unknown
    return _with_values(store, {**store.values, **hidden})


def _with_values(store: ItemStore, values: dict[str, Tensor]) -> ItemStore:
    return replace(store, values=values)


# Stage 3: the model.


def build_run(
    config: TrainConfig,
    log: PreparedLog,
    stores: Iterable[ItemStore],
    device: torch.device | None = None,
) -> Ranking:
    """The unsharded model of a run, its dense weights drawn from the run's seed."""
    torch.manual_seed(config.seed)
    return build_ranking(
        config.model,
        log_sizes(log, config.model.dim),
        stores,
        positive_weight=config.positive_weight,
        autocast=torch.bfloat16 if config.precision == "bfloat16" else None,
        groups=config.slices,
        device=device,
    )


# Stage 4: over processes.


def shard_run(
    config: TrainConfig, log: PreparedLog, ranking: Ranking, ranks: Ranks, device: torch.device
) -> ShardedModel:
    """Plan and shard; the model is changed in place."""
    planner = load_planner_config(config.planner) if config.planner else PlannerConfig()
    history = mean_history(log, config.model.history_length)
    lengths = {name: history for name in table_features(ranking.module) if name.startswith("history")}
    return shard_model(
        ranking.module,
        load_plan(config.plan) if config.plan else planner,
        device=device,
        table_optimizer=config.tables,
        seed=config.seed,
        batch_size=config.batch_size // ranks.size,
        feature_lengths=lengths,
        replicas=config.replicas,
    )


# Stage 5: the loop, and all of it.


class RunSizes(NamedTuple):
    """What a model costs, counted before it is sharded."""

    trained_parameters: int
    """Elements of all parameters, tables included."""
    lookups_per_item: float
    """Mean rows that one item reads from tables."""

    @classmethod
    def of(cls, ranking: Ranking) -> RunSizes:
        """Count an unsharded model."""
        pooled = {name for name, table in find_tables(ranking.module).items() if table.pooled}
        factors = model_pooling_factors(ranking.module)
        parameters = sum(parameter.numel() for parameter in ranking.module.parameters())
        return cls(parameters, sum(sum(factors[name]) for name in pooled))


@dataclass(frozen=True)
class Run:
    """A sharded model, its data and its checkpoints. Every rank opens one."""

    config: TrainConfig
    ranks: Ranks
    log: PreparedLog
    ranking: Ranking
    sharded: ShardedModel
    loop: TrainingLoop
    schedule: RateSchedule
    """Of the learning rates."""
    identity: dict[str, str]
    """Fingerprints of what the weights depend on."""
    sizes: RunSizes
    rates: dict[str, list[dict[str, Any]]]
    """Parameter groups whose learning rates are worth watching, by name."""

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return _steps(self.config, self.log)

    @property
    def table_rows(self) -> int:
        """Rows of all embedding tables."""
        return sum(table.rows for table in self.sharded.tables.values())

    @property
    def batch_size(self) -> int:
        """Rows per step of this process."""
        return self.config.batch_size // self.ranks.size

    def read(self, split: str, epoch: int = 0, start_batch: int = 0) -> BatchReader:
        """This rank's batches of a split."""
        reads = batch_config(
            self.ranking,
            self.batch_size,
            self.config.model.history_length,
            self.config.id_dropout if split == "train" else 0.0,
        )
        shares = self.config.by_request
        if shares is None:
            shares = self.log.has_requests and not reads.dropped
        return BatchReader(
            self.log,
            split,
            replace(reads, by_request=shares),
            rank=self.ranks.rank,
            world_size=self.ranks.size,
            epoch=epoch,
            seed=self.config.seed,
            start_batch=start_batch,
            item_values=self.ranking.item_values,
            workers=self.config.workers,
        )

    def measure(
        self, split: str, on_batch: Callable[[RankingOutput], None] | None = None
    ) -> dict[str, SliceMetrics]:
        """Metrics by slice of a split, the same on every rank."""
        groups = {key: group_names(self.log, key) for key in self.config.slices}
        return self.loop.evaluate(
            self.read(split), self.batch_size, on_batch, self.ranking.task_names, groups
        )

    def load_trained(self) -> Position:
        """Take the state that a training ended with: the best where validation chose, else the newest."""
        return self.loop.restore_best() or self.loop.resume()

    def evaluate(self, split: str) -> dict[str, SliceMetrics]:
        """Metrics by slice of a split, the same on every rank; writes this rank's predictions if asked."""
        parts: list[RankingOutput] = []
        slices = self.measure(split, parts.append if self.config.predictions else None)
        if self.config.predictions:
            counted = torch.cat([part.weights for part in parts]).cpu() > 0

            def whole(name: str) -> Tensor:
                return torch.cat([getattr(part, name) for part in parts]).cpu()[counted]

            save_artifact(
                Path(self.config.output) / f"predictions-rank-{self.ranks.rank}.safetensors",
                kind=PREDICTIONS,
                version=PREDICTIONS_VERSION,
                config={"split": split},
                tensors={
                    **{name: whole(name) for name in ("logits", "labels", "weights")},
                    "segments": whole("segment"),
                    "users": self.read(split).users()[counted],
                },
            )
        return slices

    def close(self) -> None:
        """Wait for checkpoints in flight."""
        for checkpoints in (self.loop.checkpoints, self.loop.best):
            if checkpoints is not None:
                checkpoints.close()


def open_run(config: TrainConfig, device: torch.device, *, claim: bool = False) -> Run:
    """All stages: from a configuration to a loop that is ready to run; a collective call.

    Args:
        config: of the run.
        device: of this process.
        claim: take the run directory for this process until :meth:`Run.close`, as a training does.

    Raises:
        SidError: anything wrong with the configuration or its inputs, or another process that trains in
            the run directory, by name.
    """
    ranks = Ranks.open()
    if config.batch_size % ranks.size:
        raise SidError(
            "batch_size", f"{config.batch_size} over {ranks.size} processes", "Choose a multiple of them."
        )
    checkpoints = CheckpointManager(
        Path(config.output) / "checkpoints", asynchronous=config.asynchronous_checkpoints
    )
    try:
        if claim:
            checkpoints.claim()
        return _open_claimed(config, device, ranks, checkpoints)
    except BaseException:
        checkpoints.close()
        raise


def _open_claimed(
    config: TrainConfig, device: torch.device, ranks: Ranks, checkpoints: CheckpointManager
) -> Run:
    log = open_log(config, ranks, checkpoints.latest())
    stores = open_stores(config, log)
    ranking = build_run(config, log, stores, device)
    sizes = RunSizes.of(ranking)
    sharded = shard_run(config, log, ranking, ranks, device)
    identity = run_identity(config, log, stores)
    checkpoints.require(identity, accepted_identities(stores))
    optimizer, schedule, rates = make_optimizers(config, sharded, _steps(config, log))
    output = Path(config.output)
    validated = config.evaluate_every is not None
    loop = TrainingLoop(
        sharded.model,
        optimizer,
        device,
        ranks=ranks,
        checkpoints=checkpoints,
        checkpoint_every=config.checkpoint_every,
        stopping=EarlyStopping(config.patience) if validated else None,
        best=open_checkpoints(output / "best", identity, stores) if validated else None,
        metadata={"config": asdict(config), "world_size": ranks.size, "plan": plan_to_json(sharded.plan)},
        pipelined=config.pipelined,
    )
    return Run(config, ranks, log, ranking, sharded, loop, schedule, identity, sizes, rates)


class Optimizers(NamedTuple):
    """What trains a model."""

    all: CombinedOptimizer
    """Over all parameters."""
    schedule: RateSchedule
    """Of learning rates."""
    rates: dict[str, list[dict[str, Any]]]
    """Parameter groups by what they train: dense, tables."""


def make_optimizers(config: TrainConfig, sharded: ShardedModel, steps: int) -> Optimizers:
    """The optimizer of all parameters, and the schedule of its learning rates over ``steps``."""
    dense: list[torch.optim.Optimizer] = []

    def make_dense(parameters: Any) -> torch.optim.Optimizer:
        name, options = config.dense_optimizer, config.dense_options
        dense.append(make_dense_optimizer(name, parameters, config.dense_lr, options))
        if config.clip_norm is not None:
            clip_gradients(dense[-1], config.clip_norm)
        return dense[-1]

    optimizer = sharded.make_optimizer(make_dense)
    groups = optimizer.param_groups if config.schedule_tables else dense[0].param_groups
    schedule = RateSchedule(groups, steps, config.schedule, config.schedule_options, config.warmup_steps)
    rates = {"dense": dense[0].param_groups, "tables": list(sharded.model.fused_optimizer.param_groups)}
    return Optimizers(optimizer, schedule, rates)


def open_checkpoints(
    directory: Path, identity: dict[str, str], stores: Iterable[ItemStore], asynchronous: bool = False
) -> CheckpointManager:
    """Checkpoints of a run; catalogs may have been appended to since."""
    return CheckpointManager(
        directory, asynchronous=asynchronous, identity=identity, accepts=accepted_identities(stores)
    )


def accepted_identities(stores: Iterable[ItemStore]) -> dict[str, Callable[[str], bool]]:
    """By name in a run's identity, which other value its checkpoints may have all the same."""

    def unstated(saved: str) -> bool:
        return not saved  # as in runs of earlier releases

    accepts: dict[str, Callable[[str], bool]] = {"content": unstated, "specification": unstated}
    return accepts | {name: catalog.extends for store in stores for name, catalog in store.catalogs.items()}


def trained_directory(output: Path) -> Path:
    """Where a run keeps the state that its training ended with."""
    best = output / "best"
    return best if best.is_dir() else output / "checkpoints"


def batch_config(
    ranking: Ranking, batch_size: int, history_length: int, id_dropout: float = 0.0
) -> BatchConfig:
    """How to read batches of ``batch_size`` rows per rank for a model.

    Args:
        ranking: what is read.
        batch_size: rows per rank.
        history_length: most recent events kept.
        id_dropout: share of item ids that become unknown, where the arm knows an unknown item.
    """
    dropped = {name: (id_dropout, row) for store in ranking.stores for name, row in store.dropped.items()}
    return BatchConfig(
        batch_size,
        max(1, history_length),
        ranking.fields,
        ranking.labels,
        ranking.tasks,
        dropped if id_dropout else {},
    )


def _steps(config: TrainConfig, log: PreparedLog) -> int:
    steps = config.epochs * (log.rows("train") // config.batch_size)
    return min(steps, config.max_steps or steps)
