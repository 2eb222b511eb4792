"""Export a trained run for serving, float, int8 and int4: `torchrec-sid export --run RUN_DIRECTORY`.

OUTPUT/PRECISION gets a program with its weights, a manifest and an example; it is run in a fresh process
that sees nothing else, compared with the model, and timed. See docs/serving.md.
"""

from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from torchrec_sid.artifact import write_json
from torchrec_sid.data.batch import RankingBatch
from torchrec_sid.data.prepared import PreparedLog
from torchrec_sid.data.reader import BatchReader
from torchrec_sid.errors import ArtifactError, SidError
from torchrec_sid.models.build import Ranking
from torchrec_sid.models.dlrm import by_task
from torchrec_sid.serving.exporter import ExportOptions, ExportReport, Program, export_model
from torchrec_sid.serving.quantized import Precision
from torchrec_sid.serving.request import Bags, Request
from torchrec_sid.serving.served_model import ServedItems, ServedModel
from torchrec_sid.training.run import (
    batch_config,
    build_run,
    open_checkpoints,
    open_stores,
    trained_directory,
)
from torchrec_sid.training.run_record import run_identity, trained_config

from .cli import parse_config, plain_errors

_EXAMPLE_ROWS = 64


@dataclass(frozen=True)
class ExportConfig:
    """One export."""

    run: str
    """Run directory of torchrec-sid train; its newest checkpoint is exported."""
    output: str | None = None
    """Folder of the programs; default: RUN/served."""
    precisions: tuple[Precision, ...] = ("float", "int8", "int4")
    """Of the table rows: float, int8, int4."""
    tolerance: float = 1e-5
    """Largest difference of a logit of the program to the model with the same rows."""
    split: str = "test"
    """Where example and comparison come from."""
    rows: int = 8192
    """Rows on which the precisions are compared."""
    batches: tuple[int, ...] = (1, 64, 512)
    """Candidates of the timed requests, all of one user where the model reads histories."""
    rounds: int = 20
    """Timed runs of each."""

    def __post_init__(self) -> None:
        if not self.precisions or self.rows < _EXAMPLE_ROWS or self.rounds < 1:
            raise SidError("ExportConfig", f"{self}", f"Give a precision, {_EXAMPLE_ROWS} rows, a round.")


class TrainedRun(NamedTuple):
    """A trained model, unsharded, and what it reads."""

    model: nn.Module
    ranking: Ranking
    step: int
    identity: dict[str, str]
    log: PreparedLog
    batches: BatchReader
    history_length: int


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    with plain_errors():
        config = parse_config(ExportConfig, __doc__, argv)
    with plain_errors():
        rows = export(config)
    print(f"milliseconds by batch; {torch.get_num_threads()} threads")
    print(table(rows))


def export(config: ExportConfig) -> list[dict[str, Any]]:
    """Export a run at every precision, check the programs in a fresh process, compare and time them.

    Returns:
        One row for the model in eager mode and one per precision, as in ``OUTPUT/report.json``.

    Raises:
        SidError: no run, no checkpoint, data or catalogs other than the training's, or a model that cannot
            be exported within the tolerance.
    """
    trained = open_run(config)
    output = Path(config.output or Path(config.run) / "served")
    requests, labels = _requests(trained, config.rows)
    histories = [name for name in requests[0].features if name.startswith("history")]
    example = requests[0].take(range(min(_EXAMPLE_ROWS, requests[0].rows)))
    if histories:  # users with two candidates each
        example = example.shared(2)
    identity = {"run": config.run, "step": trained.step, **trained.identity}
    ids = torch.from_numpy(np.array(trained.log.item_ids))
    items = ServedItems(ids, trained.ranking.item_values, trained.log.dense_names)
    reports = {
        precision: export_model(
            trained.model,
            example,
            output / precision,
            ExportOptions(precision, config.tolerance),
            max_lengths=dict.fromkeys(histories, trained.history_length),
            together=[histories] if histories else [],
            ranges={name: (0, trained.log.actions - 1) for name in histories if name == "history_action"},
            identity=identity,
            items=items,
            log=trained.log,
        )
        for precision in config.precisions
    }
    checked = _fresh_process([str(report.folder) for report in reports.values()], config)
    plain = _answers(Program(trained.model, tuple(example.features)), requests)
    rows = [_eager_row(trained.model, plain, labels, example, config)]
    asked = [request.shared(1) for request in requests] if histories else requests
    for (precision, report), measured in zip(reports.items(), checked, strict=True):
        served = ServedModel.load(report.folder)
        logits = torch.cat([served(request) for request in asked])
        rows.append(_row(precision, report, measured, logits, plain, labels))
    write_json(output / "report.json", {"identity": identity, "rows": rows})
    return rows


def open_run(config: ExportConfig) -> TrainedRun:
    """Build the model of a run on the CPU, unsharded, and read its newest checkpoint.

    Raises:
        SidError: see :func:`export`.
    """
    train = trained_config(Path(config.run))
    log = PreparedLog.open(Path(train.prepared or Path(train.output) / "prepared"), verify=True)
    stores = open_stores(train, log)
    ranking = build_run(train, log, stores)
    identity = run_identity(train, log, stores)
    directory = trained_directory(Path(config.run))
    with open_checkpoints(directory, identity, stores) as manager:
        info = manager.latest()
        if info is None:
            raise ArtifactError(str(directory), "no checkpoint", "Train it first with torchrec-sid train.")
        state = {"model": ranking.module.state_dict()}
        manager.load(info, state)
        ranking.module.load_state_dict(state["model"])
    reader = BatchReader(
        log,
        config.split,
        batch_config(ranking, 512, train.model.history_length),
        item_values=ranking.item_values,
    )
    model = ranking.module.model.eval()
    return TrainedRun(model, ranking, info.step, identity, log, reader, train.model.history_length)


def to_request(batch: RankingBatch) -> Request:
    """A batch of training data as a request, without padding."""
    features = {
        name: Bags(batch.features[name].values(), batch.features[name].lengths())
        for name in batch.features.keys()  # noqa: SIM118
    }
    rows_of = {name: "history_action" for name in batch.rows if name.startswith("history_")}
    whole = Request(batch.dense, features, batch.rows, rows_of)
    return whole.take(batch.weights.nonzero().flatten().tolist())


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text."""
    batches = list(rows[0]["ms"])
    heads = ("model", "MB", "load s", "off by", "from float", "NE")
    lines = ["{:<14}{:>9}{:>8}{:>10}{:>12}{:>10}".format(*heads) + "".join(f"{b:>9}" for b in batches)]
    for row in rows:
        cells = [
            f"{row['system']:<14}{row['bytes'] / 1e6:9.2f}",
            "       -" if row["load_seconds"] is None else f"{row['load_seconds']:8.2f}",
            f"{row['difference_to_eager']:10.1e}{row['difference_to_float']:12.1e}",
            "         -" if row["ne"] is None else f"{row['ne']:10.5f}",
        ]
        lines.append("".join(cells) + "".join(f"{row['ms'][batch]:9.2f}" for batch in batches))
    return "\n".join(lines)


def _requests(trained: TrainedRun, rows: int) -> tuple[list[Request], Tensor]:
    requests, labels, taken = [], [], 0
    for batch in trained.batches:
        requests.append(to_request(batch))
        labels.append(by_task(batch.labels)[0][batch.weights > 0])
        taken += requests[-1].rows
        if taken >= rows:
            break
    return requests, torch.cat(labels)


def _fresh_process(folders: list[str], config: ExportConfig) -> list[dict[str, Any]]:
    """Run `torchrec-sid served`, which knows nothing but the folders."""
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "served.json"
        command = [
            sys.executable,
            "-m",
            f"{__package__}.served",
            f"--folders={[str(Path(f).absolute()) for f in folders]}",
        ]
        command += [f"--batches={list(config.batches)}", f"--rounds={config.rounds}", f"--json={file}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SidError(
                "torchrec-sid served", done.stderr.strip()[-500:], "The programs do not run elsewhere."
            )
        rows: list[dict[str, Any]] = json.loads(file.read_text())["rows"]
    return rows


def _answers(program: Program, requests: Sequence[Request]) -> Tensor:
    with torch.no_grad():
        return torch.cat([program(*request.arguments()) for request in requests])


def _eager_row(
    model: nn.Module, logits: Tensor, labels: Tensor, example: Request, config: ExportConfig
) -> dict[str, Any]:
    """The model as it was trained, called from Python; ``logits`` are its answers row by row."""
    program = Program(model, tuple(example.features), example.by_user)
    times = {}
    for batch in config.batches:
        request = example.of_size(batch)
        taken = []
        for turn in range(config.rounds + 1):
            began = time.perf_counter()
            _answers(program, [request])
            if turn:
                taken.append(1000 * (time.perf_counter() - began))
        times[str(batch)] = median(taken)
    size = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    return {
        "system": "eager float",
        "bytes": size,
        "load_seconds": None,
        "difference_to_eager": 0.0,
        "difference_to_float": 0.0,
        "ne": normalized_entropy(logits, labels),
        "ms": times,
    }


def _row(
    precision: str,
    report: ExportReport,
    measured: dict[str, Any],
    logits: Tensor,
    plain: Tensor,
    labels: Tensor,
) -> dict[str, Any]:
    return {
        "system": f"program {precision}",
        "bytes": report.bytes,
        "load_seconds": measured["load_seconds"],
        "difference_to_eager": max(report.difference, measured["difference"]),
        "difference_to_float": float((logits - plain).abs().max()),
        "ne": normalized_entropy(logits, labels),
        "ms": measured["ms"],
    }


def normalized_entropy(logits: Tensor, labels: Tensor) -> float | None:
    """Cross-entropy over the entropy of the base rate; None where there is a single label."""
    rate = float(labels.double().mean())
    if rate in (0.0, 1.0):
        return None
    entropy = -rate * math.log(rate) - (1 - rate) * math.log(1 - rate)
    logits = by_task(logits)[0].double()
    loss = nn.functional.binary_cross_entropy_with_logits(logits, labels.double())
    return float(loss) / entropy


if __name__ == "__main__":
    main()
