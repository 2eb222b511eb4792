"""A served model in a fresh process: does it answer as it did, and how fast?

    torchrec-sid served --folders '[FOLDER, FOLDER]' [--batches '[1, 64, 512]'] [--json FILE]

Several folders take turns in the timings, so that the machine's moods meet all alike.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from torchrec_sid.artifact import write_json
from torchrec_sid.serving.request import Request
from torchrec_sid.serving.served_model import ServedModel

from .cli import parse_config, plain_errors


@dataclass(frozen=True)
class ServedConfig:
    """What to check."""

    folders: tuple[str, ...]
    """Folders written by ``export_model``."""
    batches: tuple[int, ...] = (1, 64, 512)
    """Rows of the timed requests."""
    rounds: int = 20
    """Timed runs of each."""
    json: str | None = None
    """File for the rows."""


def check_models(folders: Sequence[str], batches: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """One row per folder: precision, bytes, difference to the exporting process, milliseconds by batch.

    Args:
        folders: written by ``export_model``.
        batches: rows of the timed requests, cut and repeated from the example.
        rounds: timed runs of each.

    Raises:
        SidError: a folder that cannot be read, or answers other than those it was exported with.
    """
    models: list[tuple[ServedModel, Request]] = []
    rows: list[dict[str, Any]] = []
    for folder in folders:
        began = time.perf_counter()
        model = ServedModel.load(folder)
        seconds = time.perf_counter() - began
        difference = model.check_example()
        models.append((model, model.example().request))
        rows.append(
            {
                "folder": folder,
                "precision": model.manifest.precision,
                "bytes": model.program_bytes,
                "difference": difference,
                "load_seconds": seconds,
                "ms": {},
            }
        )
    for batch in batches:
        requests = [request.of_size(batch) for _, request in models]
        taken: list[list[float]] = [[] for _ in models]
        for turn in range(rounds + 1):
            for i, (model, _) in enumerate(models):
                began = time.perf_counter()
                model(requests[i])
                if turn:  # the first warms up
                    taken[i].append(1000 * (time.perf_counter() - began))
        for row, times in zip(rows, taken, strict=True):
            row["ms"][str(batch)] = statistics.median(times)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text."""
    batches = list(rows[0]["ms"])
    lines = [
        f"{'precision':<10}{'MB':>9}{'load s':>8}{'off by':>10}" + "".join(f"{b:>10}" for b in batches)
    ]
    for row in rows:
        times = "".join(f"{row['ms'][batch]:10.2f}" for batch in batches)
        head = f"{row['precision']:<10}{row['bytes'] / 1e6:9.2f}{row['load_seconds']:8.2f}"
        lines.append(f"{head}{row['difference']:10.1e}{times}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    with plain_errors():
        config = parse_config(ServedConfig, __doc__, argv)
    with plain_errors():
        rows = check_models(config.folders, config.batches, config.rounds)
    print(f"milliseconds by batch; {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.2f}")
    print(table(rows))
    if config.json:
        write_json(Path(config.json), {"rows": rows})


if __name__ == "__main__":
    main()
