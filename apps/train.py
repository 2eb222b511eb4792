"""Train and evaluate one arm: `torchrec-sid train --data FOLDER --output DIR --model.arm full_id`.

Under TorchX for several processes: `torchx run -s local_cwd train -- --data ...`.
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
from torch.distributed.elastic.multiprocessing.errors import record

from torchrec_sid.models.dlrm import RankingOutput
from torchrec_sid.parallel.ranks import Ranks, process_group
from torchrec_sid.training.loop import Position, TrainResult
from torchrec_sid.training.profile import StepProfiler
from torchrec_sid.training.progress_line import TrainingProgress
from torchrec_sid.training.recorder import StepRecorder, track_run
from torchrec_sid.training.run import Run, open_run
from torchrec_sid.training.train_config import TrainConfig

from .cli import parse_config, plain_errors
from .failure import one_message
from .rundir import describe_run, finish_run, open_rank_log, set_up_logging

logger = logging.getLogger("apps.train")


@record
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of each process."""
    set_up_logging()
    with plain_errors():
        config = parse_config(TrainConfig, __doc__, argv)
    with process_group() as device, one_message():
        ranks = Ranks.open()
        open_rank_log(config.output, ranks.rank)
        report = train(config, device)
        if ranks.rank == 0:
            logger.info("%s", json.dumps(report["slices"]["all"]))


def train(config: TrainConfig, device: torch.device) -> dict[str, Any]:
    """Train and evaluate within an initialised process group; a collective call.

    Returns:
        What ``metrics.json`` holds, the same on every rank.

    Raises:
        SidError: anything wrong with the configuration or its inputs, before training starts.
    """
    run = open_run(config, device, claim=True)
    output = Path(config.output)
    try:
        # A run that is not continued by this one is refused before anything of it is overwritten.
        at = run.loop.resume()
        run.ranks.first(lambda: describe_run(run, output), where=config.output)
        result = _run(run, output, at)
        slices = run.evaluate(config.evaluate_on)
        report = {
            **_costs(run, result),
            "slices": {name: asdict(metrics) for name, metrics in slices.items()},
            "evaluated_on": config.evaluate_on,
            "identity": run.identity,
        }
        run.ranks.first(lambda: finish_run(run, output, report), where=config.output)
    finally:
        run.close()
    if run.ranks.rank == 0:
        whole = slices["all"]
        track_run(output, {"ne": whole.ne, "auc": whole.auc, "calibration": whole.calibration})
    return report


def _run(run: Run, output: Path, at: Position) -> TrainResult:
    config, first = run.config, run.ranks.rank == 0
    if at.step and first:
        logger.info("resuming after step %d", at.step)
    recorder = StepRecorder(output, run.ranks.rank, run.ranks.size, rates=run.rates)
    profiler = StepProfiler(output / "profile", config.profile, run.ranks.rank) if config.profile else None

    def on_step(step: int, out: RankingOutput) -> None:
        if profiler is not None:
            profiler.step()
        recorder(step, out)

    def validate(step: int) -> float | None:
        slices = run.measure("valid")
        recorder.evaluated(step, "valid", slices)
        if first:
            logger.info("step %d: validation NE %.5f", step, slices["all"].ne or float("nan"))
        return slices["all"].ne

    every = config.evaluate_every
    with TrainingProgress(run.steps, done=at.step, title=config.model.arm, enabled=first) as progress:
        result = run.loop.train(
            lambda epoch, start: run.read("train", epoch, start),
            config.epochs,
            max_steps=config.max_steps,
            progress=progress,
            on_step=on_step,
            schedule=run.schedule.set,
            validate=None if every is None else validate,
            validate_every=every if isinstance(every, int) else 0,
        )
    if profiler is not None:
        profiler.close()
    recorder.close(result)
    return result


def _costs(run: Run, result: TrainResult) -> dict[str, Any]:
    ranks, ranking = run.ranks, run.ranking
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
        "bytes_per_event": ranking.bytes_per_event,
        "bytes_per_item": ranking.bytes_per_item,
        "table_rows": run.table_rows,
        "lookups_per_item": run.sizes.lookups_per_item,
        "trained_parameters": run.sizes.trained_parameters,
    }


if __name__ == "__main__":
    main()
