"""Run directories that a comparison makes: done, begun, or not its own."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

from torchrec_sid.artifact import write_json
from torchrec_sid.training.train_config import TrainConfig


def claim_run(run: TrainConfig, processes: int, marks: dict[str, str]) -> bool:
    """Whether an earlier call finished this run; one that it began is resumed, any other removed.

    Args:
        run: what is to be trained.
        processes: on how many processes.
        marks: fingerprints of what it reads.
    """
    output = Path(run.output)
    stamp = output / "comparison.json"
    wanted = json.loads(json.dumps({"config": asdict(run), "processes": processes, **marks}))
    if stamp.is_file() and json.loads(stamp.read_text()) == wanted:
        return (output / "metrics.json").is_file()
    if output.exists():
        shutil.rmtree(output)
    write_json(stamp, wanted)
    return False
