"""A training session: everything between a `TrainConfig` and a loop that is ready to run."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from torchrec_sid.artifact import save_artifact
from torchrec_sid.data.batch import BatchConfig
from torchrec_sid.data.prepare import PrepareConfig, prepare
from torchrec_sid.data.prepared import PreparedLog
from torchrec_sid.data.reader import BatchReader
from torchrec_sid.errors import SidError
from torchrec_sid.metrics import SliceMetrics
from torchrec_sid.models.build import Ranking, RankingConfig
from torchrec_sid.models.dlrm import RankingOutput
from torchrec_sid.parallel.checkpoint import CheckpointManager
from torchrec_sid.parallel.constraints import model_pooling_factors
from torchrec_sid.parallel.embedding_tables import find_tables
from torchrec_sid.parallel.plan_file import load_plan, plan_to_json
from torchrec_sid.parallel.planner_config import PlannerConfig
from torchrec_sid.parallel.planner_file import load_planner_config
from torchrec_sid.parallel.ranks import Ranks
from torchrec_sid.parallel.sharding import ShardedModel, shard_model
from torchrec_sid.training.loop import TrainingLoop
from torchrec_sid.training.schedule import LinearDecay

from .allocator import keep_freed_memory
from .item_sids import build_run, open_item_sids
from .train_config import TrainConfig

PREDICTIONS = "predictions"
"""Kind of the artefact that holds ``predictions`` ``[rows]`` float32, in the order of the split."""


@dataclass(frozen=True)
class Session:
    """A sharded model, its data and its checkpoints. Every rank opens one."""

    config: TrainConfig
    ranks: Ranks
    log: PreparedLog
    ranking: Ranking
    sharded: ShardedModel
    loop: TrainingLoop
    schedule: LinearDecay
    """Of the dense learning rate."""
    identity: dict[str, str]
    """Fingerprints of what the weights depend on."""
    trained_parameters: int
    """Elements of all parameters, tables included."""
    lookups_per_item: float
    """Mean rows that one item reads from tables."""
    item_sids: Tensor | None
    """``[N]`` int64 packed SID of each item, for channels with tables over SIDs."""
    sid_bytes: Tensor | None
    """``[N, nbytes]`` uint8 packed SID of each item, for the channel side."""

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
        return BatchReader(
            self.log,
            split,
            self.ranking.batch_config(self.batch_size, self.config.model.history_length),
            rank=self.ranks.rank,
            world_size=self.ranks.size,
            epoch=epoch,
            seed=self.config.seed,
            start_batch=start_batch,
            item_sids=self.item_sids,
            sid_bytes=self.sid_bytes,
            workers=self.config.workers,
        )

    def evaluate(self, split: str) -> dict[str, SliceMetrics]:
        """Metrics by slice of a split, the same on every rank; writes this rank's predictions if asked."""
        parts: list[Tensor] = []

        def keep(output: RankingOutput) -> None:
            parts.append(torch.sigmoid(output.logits[output.weights > 0]).cpu())

        on_batch = keep if self.config.predictions else None
        slices = self.loop.evaluate(
            self.read(split), self.batch_size, self.ranks.size, on_batch, self.ranking.task_names
        )
        if self.config.predictions:
            save_artifact(
                Path(self.config.output) / f"predictions-rank-{self.ranks.rank}.safetensors",
                kind=PREDICTIONS,
                version=1,
                config={"split": split},
                tensors={"predictions": torch.cat(parts)},
            )
        return slices

    def close(self) -> None:
        """Wait for checkpoints in flight."""
        if self.loop.checkpoints is not None:
            self.loop.checkpoints.close()


def start_processes() -> torch.device:
    """Join the process group that torch.distributed.run describes, or make one of this process alone."""
    os.environ.setdefault("MASTER_ADDR", "localhost")
    os.environ.setdefault("MASTER_PORT", "0")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if not torch.cuda.is_available():
        keep_freed_memory()
        dist.init_process_group("gloo", rank=rank, world_size=world)
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", rank=rank, world_size=world)
    return device


def open_session(config: TrainConfig, device: torch.device) -> Session:
    """Open data and catalog, build and shard the model; a collective call.

    Raises:
        SidError: anything wrong with the configuration or its inputs.
    """
    ranks = Ranks.open()
    if config.batch_size % ranks.size:
        raise SidError(
            "batch_size", f"{config.batch_size} over {ranks.size} processes", "Choose a multiple of them."
        )
    log = _open_log(config, ranks)
    sids = open_item_sids(config, log)
    torch.manual_seed(config.seed)
    ranking = build_run(config, log, sids, device)
    parameters = sum(p.numel() for p in ranking.module.parameters())
    candidates = {name for name, table in find_tables(ranking.module).items() if table.pooled}
    factors = model_pooling_factors(ranking.module)
    lookups = sum(sum(factors[name]) for name in candidates)
    planner = load_planner_config(config.planner) if config.planner else PlannerConfig()
    lengths = dict.fromkeys(("history", "history_sid"), mean_history(config.model, log))
    sharded = shard_model(
        ranking.module,
        load_plan(config.plan) if config.plan else planner,
        device=device,
        table_optimizer=config.tables,
        seed=config.seed,
        batch_size=config.batch_size // ranks.size,
        feature_lengths=lengths,
        replicas=config.replicas,
    )
    identity = {"log": log.fingerprint, "seed": str(config.seed), **sids.fingerprints}
    if sids.pieces is not None:
        identity["pieces"] = sids.pieces.fingerprint
    if config.shuffle_sids:
        identity["SIDs"] = "shuffled"
    dense: list[torch.optim.Optimizer] = []

    def make_dense(parameters: Any) -> torch.optim.Optimizer:
        dense.append(torch.optim.Adam(parameters, lr=config.dense_lr))
        return dense[-1]

    loop = TrainingLoop(
        sharded.model,
        sharded.make_optimizer(make_dense),
        device,
        checkpoints=CheckpointManager(
            Path(config.output) / "checkpoints",
            asynchronous=config.asynchronous_checkpoints,
            identity=identity,
            accepts=sids.accepts,
        ),
        checkpoint_every=config.checkpoint_every,
        metadata={
            "config": asdict(config),
            "world_size": ranks.size,
            "plan": plan_to_json(sharded.plan),
        },
        pipelined=config.pipelined,
    )
    schedule = LinearDecay(dense[0], _steps(config, log))
    return Session(
        config,
        ranks,
        log,
        ranking,
        sharded,
        loop,
        schedule,
        identity,
        parameters,
        lookups,
        sids.item_sids,
        sids.item_bytes,
    )


def _steps(config: TrainConfig, log: PreparedLog) -> int:
    steps = config.epochs * (log.rows("train") // config.batch_size)
    return min(steps, config.max_steps or steps)


def _open_log(config: TrainConfig, ranks: Ranks) -> PreparedLog:
    out = Path(config.prepared or Path(config.output) / "prepared")
    ranks.first(lambda: prepare(config.data, out, PrepareConfig()).fingerprint, where=config.data)
    return PreparedLog.open(out)


def mean_history(config: RankingConfig, log: PreparedLog) -> float:
    """Mean events per example in the first training rows, for the planner."""
    rows = min(4096, log.rows("train"))
    if not config.history_length:
        return 0.0
    batch = BatchConfig(rows, config.history_length, ("history_action",))
    return float(next(iter(BatchReader(log, "train", batch))).history_lengths.double().mean())
