"""Train and evaluate one arm: `python -m apps.train --data FOLDER --output DIR --model.arm full_id`.

Under TorchX for several processes: `torchx run -s local_cwd apps/components.py:train -- --data ...`.
Started again on the same output directory, it resumes from the newest checkpoint.
"""

from __future__ import annotations

import json
import logging
import os
import resource
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record
from torch.utils.tensorboard import SummaryWriter

from apps.cli import parse_config
from torchrec_sid.artifact import write_json
from torchrec_sid.catalog import SidCatalog
from torchrec_sid.data.prepare import PrepareConfig, prepare
from torchrec_sid.data.prepared import PreparedLog
from torchrec_sid.data.reader import BatchReader
from torchrec_sid.data.schema import LogFolder
from torchrec_sid.doctor import find_versions
from torchrec_sid.errors import SidError
from torchrec_sid.models.arms import arm_named
from torchrec_sid.models.build import Ranking, RankingConfig, build_ranking
from torchrec_sid.models.dlrm import RankingOutput
from torchrec_sid.parallel.checkpoint import CheckpointManager
from torchrec_sid.parallel.optimizer import TableOptimizer
from torchrec_sid.parallel.plan_file import load_plan, save_plan
from torchrec_sid.parallel.planner_config import PlannerConfig
from torchrec_sid.parallel.planner_file import load_planner_config
from torchrec_sid.parallel.ranks import Ranks
from torchrec_sid.parallel.sharding import ShardedModel, shard_model
from torchrec_sid.training.loop import TrainingLoop, TrainResult
from torchrec_sid.training.progress import TrainingProgress

logger = logging.getLogger("apps.train")


@dataclass(frozen=True)
class TrainConfig:
    """One training run."""

    data: str
    """Folder of the log, in the format of docs/data.md."""
    output: str
    """Run directory: configuration, plan, metrics, checkpoints, TensorBoard."""
    prepared: str | None = None
    """Folder of the prepared log, made there if it is not up to date; default: OUTPUT/prepared."""
    catalog: str | None = None
    """SidCatalog, for arms over SIDs."""
    source: str | None = None
    """Embedding source of the arms over content; default: the log's own default."""
    model: RankingConfig = field(default_factory=RankingConfig)
    """Backbone and arm."""
    tables: TableOptimizer = field(default_factory=lambda: TableOptimizer("adagrad", lr=0.05))
    """Optimizer of the embedding tables."""
    dense_lr: float = 2e-3
    """Learning rate of Adam on everything else."""
    batch_size: int = 512
    """Rows per step over all processes."""
    epochs: int = 1
    """Passes over the training events."""
    max_steps: int | None = None
    """Stop after this many steps."""
    evaluate_on: str = "test"
    """Split of the final metrics: valid or test."""
    seed: int = 0
    """Of the weights."""
    workers: int = 0
    """Processes per rank that read batches ahead."""
    plan: str | None = None
    """Sharding plan (JSON) to follow; default: make one."""
    planner: str | None = None
    """Planner configuration (YAML or TOML) to make one with."""
    checkpoint_every: int = 0
    """Steps between checkpoints; 0: only at the end."""
    asynchronous_checkpoints: bool = False
    """Write checkpoints in the background."""


@record
def main() -> None:
    """Entry point of each process."""
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    config = parse_config(TrainConfig, __doc__)
    device = _start_processes()
    try:
        report = train(config, device)
        if dist.get_rank() == 0:
            logger.info("%s", json.dumps(report["slices"]["all"]))
    finally:
        dist.destroy_process_group()


def train(config: TrainConfig, device: torch.device) -> dict[str, Any]:
    """Train and evaluate within an initialised process group; a collective call.

    Returns:
        What ``metrics.json`` holds, the same on every rank.

    Raises:
        SidError: anything wrong with the configuration or its inputs, before training starts.
    """
    ranks = Ranks.open()
    output = Path(config.output)
    log = _open_log(config, ranks)
    batch_size = _rank_batch(config.batch_size, ranks.size)
    catalog = _open_catalog(config)
    torch.manual_seed(config.seed)
    ranking = build_ranking(
        config.model,
        log,
        spec=catalog.spec if catalog else None,
        content=_content(config),
        device=device,
    )
    parameters = sum(p.numel() for p in ranking.module.parameters())
    sharded = shard_model(
        ranking.module,
        load_plan(config.plan) if config.plan else _planner(config),
        device=device,
        table_optimizer=config.tables,
        seed=config.seed,
    )
    rows = sum(table.rows for table in sharded.tables.values())
    if ranks.rank == 0:
        _describe_run(config, sharded, output)
    sids = None if catalog is None else catalog.lookup(log.item_ids)

    def read(split: str, epoch: int, start_batch: int) -> BatchReader:
        return BatchReader(
            log,
            split,
            ranking.batch_config(batch_size, config.model.history_length),
            rank=ranks.rank,
            world_size=ranks.size,
            epoch=epoch,
            seed=config.seed,
            start_batch=start_batch,
            item_sids=sids,
            workers=config.workers,
        )

    identity = {"log": log.fingerprint, "seed": str(config.seed)}
    if catalog is not None:
        identity["catalog"] = catalog.fingerprint
    optimizer = sharded.make_optimizer(lambda p: torch.optim.Adam(p, lr=config.dense_lr))
    with CheckpointManager(
        output / "checkpoints", asynchronous=config.asynchronous_checkpoints, identity=identity
    ) as checkpoints:
        loop = TrainingLoop(
            sharded.model,
            optimizer,
            device,
            checkpoints=checkpoints,
            checkpoint_every=config.checkpoint_every,
            metadata={"config": asdict(config), "world_size": ranks.size},
        )
        result = _run(config, loop, read, output, ranks)
    slices = loop.evaluate(read(config.evaluate_on, 0, 0), batch_size, ranks.size)
    report = {
        **_costs(ranking, result, ranks, parameters, rows),
        "slices": {name: asdict(metrics) for name, metrics in slices.items()},
        "evaluated_on": config.evaluate_on,
        "identity": identity,
    }
    if ranks.rank == 0:
        write_json(output / "metrics.json", report)
    return report


def _run(config: TrainConfig, loop: TrainingLoop, read: Any, output: Path, ranks: Ranks) -> TrainResult:
    at = loop.resume()
    if at.step and ranks.rank == 0:
        logger.info("resuming after step %d", at.step)
    per_epoch = read("train", 0, 0).batches
    total = min(per_epoch * config.epochs, config.max_steps or per_epoch * config.epochs)
    board = SummaryWriter(str(output / "tensorboard")) if ranks.rank == 0 else None

    def on_step(step: int, out: RankingOutput) -> None:
        if board is not None and step % 20 == 0:
            board.add_scalar("train/loss", float(out.loss), step)

    title = config.model.arm
    with TrainingProgress(total, done=at.step, title=title, enabled=ranks.rank == 0) as progress:
        result = loop.train(
            lambda epoch, start: read("train", epoch, start),
            config.epochs,
            max_steps=config.max_steps,
            progress=progress,
            on_step=on_step,
        )
    if board is not None:
        board.close()
    return result


def _start_processes() -> torch.device:
    """Join the process group that torch.distributed.run describes, or make one of one process."""
    os.environ.setdefault("MASTER_ADDR", "localhost")
    os.environ.setdefault("MASTER_PORT", "0")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if not torch.cuda.is_available():
        dist.init_process_group("gloo", rank=rank, world_size=world)
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", rank=rank, world_size=world)
    return device


def _open_log(config: TrainConfig, ranks: Ranks) -> PreparedLog:
    out = Path(config.prepared or Path(config.output) / "prepared")
    ranks.first(lambda: prepare(config.data, out, PrepareConfig()).fingerprint, where=config.data)
    return PreparedLog.open(out)


def _open_catalog(config: TrainConfig) -> SidCatalog | None:
    if not arm_named(config.model.arm).needs_catalog:
        return None
    if config.catalog is None:
        raise SidError("catalog", f"missing, but arm {config.model.arm!r} reads SIDs", "Pass --catalog.")
    return SidCatalog.open(config.catalog)


def _content(config: TrainConfig) -> Tensor | None:
    if not arm_named(config.model.arm).needs_content:
        return None
    matrix = LogFolder.open(config.data).embedding_matrix(config.source)
    return torch.from_numpy(matrix[:])


def _planner(config: TrainConfig) -> PlannerConfig:
    return load_planner_config(config.planner) if config.planner else PlannerConfig()


def _rank_batch(batch_size: int, world_size: int) -> int:
    if batch_size % world_size:
        raise SidError(
            "batch_size", f"{batch_size} over {world_size} processes", "Choose a multiple of the processes."
        )
    return batch_size // world_size


def _describe_run(config: TrainConfig, sharded: ShardedModel, output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "config.json", asdict(config))
    write_json(output / "environment.json", find_versions())
    save_plan(output / "plan.json", sharded.plan)
    (output / "plan.txt").write_text(f"{sharded.plan}\n{sharded.report}\n")


def _costs(
    ranking: Ranking, result: TrainResult, ranks: Ranks, parameters: int, rows: int
) -> dict[str, Any]:
    peaks = ranks.all(lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, where="memory")
    rate = result.examples * ranks.size / result.seconds if result.steps else 0.0
    return {
        "arm": ranking.arm.name,
        "world_size": ranks.size,
        "steps": result.position.step,
        "examples_per_second": rate,
        "train_seconds": result.seconds,
        "peak_rss_mb": max(peaks) / 1024,
        "bytes_per_event": ranking.arm.bytes_per_event(ranking.inputs),
        "table_rows": rows,
        "trained_parameters": parameters,
    }


if __name__ == "__main__":
    main()
