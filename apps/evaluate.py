"""Evaluate a trained run on any split: `torchrec-sid evaluate --run RUN_DIRECTORY --split valid`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing.errors import record

from torchrec_sid.artifact import write_json
from torchrec_sid.errors import SidError
from torchrec_sid.parallel.ranks import Ranks, process_group
from torchrec_sid.training.run import open_run
from torchrec_sid.training.run_record import trained_config

from .cli import parse_config, plain_errors
from .failure import one_message
from .rundir import set_up_logging


@dataclass(frozen=True)
class EvaluateConfig:
    """One evaluation."""

    run: str
    """Run directory of torchrec-sid train."""
    split: str = "test"
    """valid or test."""


@record
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of each process; the number of processes need not be that of the training."""
    set_up_logging()
    with plain_errors():
        config = parse_config(EvaluateConfig, __doc__, argv)
    with process_group() as device, one_message():
        report = evaluate(config, device)
        if Ranks.open().rank == 0:
            print(json.dumps(report, indent=2))


def evaluate(config: EvaluateConfig, device: torch.device) -> dict[str, Any]:
    """Load the newest checkpoint of a run and evaluate it; also written to ``RUN/metrics-SPLIT.json``.

    Raises:
        SidError: no run, no checkpoint, or data or catalog that are not those of the training.
    """
    output = Path(config.run)
    # Its plan is for the processes of the training, so another is made.
    run = open_run(replace(trained_config(output), plan=None, predictions=False), device)
    try:
        position = run.load_trained()
        if not position.step:
            raise SidError(str(output), "no checkpoint", "Train it first with torchrec-sid train.")
        slices = run.evaluate(config.split)
    finally:
        run.close()
    report = {
        "split": config.split,
        "step": position.step,
        "slices": {name: asdict(metrics) for name, metrics in slices.items()},
    }
    path = output / f"metrics-{config.split}.json"
    run.ranks.first(lambda: write_json(path, report), where=str(output))
    return report


if __name__ == "__main__":
    main()
