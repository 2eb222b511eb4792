"""Train and evaluate one arm: `python -m apps.train --data FOLDER --output DIR --model.arm full_id`.

Under TorchX for several processes: `torchx run -s local_cwd apps/components.py:train -- --data ...`.
Started again on the same output directory, it resumes from the newest checkpoint.
"""

from __future__ import annotations

import json
import logging
import resource
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

from torchrec_sid.artifact import write_json
from torchrec_sid.models.dlrm import RankingOutput
from torchrec_sid.training.loop import TrainResult
from torchrec_sid.training.profile import StepProfiler
from torchrec_sid.training.progress_line import TrainingProgress

from .cli import parse_config, plain_errors
from .failure import one_message
from .rundir import StepRecorder, describe_run, open_rank_log, set_up_logging
from .session import Session, open_session, start_processes
from .train_config import TrainConfig

logger = logging.getLogger("apps.train")


@record
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of each process."""
    set_up_logging()
    with plain_errors():
        config = parse_config(TrainConfig, __doc__, argv)
    try:
        with one_message():
            device = start_processes()
            open_rank_log(config.output, dist.get_rank())
            report = train(config, device)
            if dist.get_rank() == 0:
                logger.info("%s", json.dumps(report["slices"]["all"]))
            dist.barrier()  # leave together
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def train(config: TrainConfig, device: torch.device) -> dict[str, Any]:
    """Train and evaluate within an initialised process group; a collective call.

    Returns:
        What ``metrics.json`` holds, the same on every rank.

    Raises:
        SidError: anything wrong with the configuration or its inputs, before training starts.
    """
    session = open_session(config, device)
    output = Path(config.output)
    try:
        session.ranks.first(lambda: describe_run(session, output), where=config.output)
        result = _run(session, output)
        slices = session.evaluate(config.evaluate_on)
    finally:
        session.close()
    report = {
        **_costs(session, result),
        "slices": {name: asdict(metrics) for name, metrics in slices.items()},
        "evaluated_on": config.evaluate_on,
        "identity": session.identity,
    }
    session.ranks.first(lambda: write_json(output / "metrics.json", report), where=config.output)
    return report


def _run(session: Session, output: Path) -> TrainResult:
    config, first = session.config, session.ranks.rank == 0
    at = session.loop.resume()
    if at.step and first:
        logger.info("resuming after step %d", at.step)
    recorder = StepRecorder(output, session.ranks.rank)
    profiler = (
        StepProfiler(output / "profile", config.profile, session.ranks.rank) if config.profile else None
    )

    def on_step(step: int, out: RankingOutput) -> None:
        if profiler is not None:
            profiler.step()
        recorder(step, out)

    with TrainingProgress(session.steps, done=at.step, title=config.model.arm, enabled=first) as progress:
        result = session.loop.train(
            lambda epoch, start: session.read("train", epoch, start),
            config.epochs,
            max_steps=config.max_steps,
            progress=progress,
            on_step=on_step,
            schedule=session.schedule.set,
        )
    if profiler is not None:
        profiler.close()
    recorder.close(result)
    return result


def _costs(session: Session, result: TrainResult) -> dict[str, Any]:
    ranks, ranking = session.ranks, session.ranking
    each = ranks.all(
        lambda: {
            "examples_per_second": result.examples / result.seconds if result.steps else 0.0,
            "data_wait_seconds": result.data_wait,
            "peak_gpu_mb": torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else 0.0,
            "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        },
        where="costs",
    )
    return {
        "arm": ranking.arm.name,
        "world_size": ranks.size,
        "steps": result.position.step,
        "examples_per_second": sum(rank["examples_per_second"] for rank in each),
        "train_seconds": result.seconds,
        "peak_rss_mb": max(rank["peak_rss_mb"] for rank in each),
        "ranks": each,
        "bytes_per_event": ranking.arm.bytes_per_event(ranking.inputs),
        "table_rows": session.table_rows,
        "lookups_per_item": session.lookups_per_item,
        "trained_parameters": session.trained_parameters,
    }


if __name__ == "__main__":
    main()
