"""What a training says while it runs: to TensorBoard, to the log of its rank, to the trackers of TorchX."""

from __future__ import annotations

import logging
import os
import resource
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torchx.tracker.api import ENV_TORCHX_JOB_ID, ENV_TORCHX_TRACKERS, AppRun

from torchrec_sid.metrics import SliceMetrics
from torchrec_sid.models.dlrm import RankingOutput, by_task
from torchrec_sid.training.loop import TrainResult

logger = logging.getLogger(__name__)
rank_log = logging.getLogger("torchrec_sid.rank")
"""Goes to the log of this rank alone, not to the console."""
rank_log.setLevel(logging.INFO)
rank_log.propagate = False
rank_log.addHandler(logging.NullHandler())


class StepRecorder:
    """Called after each step and each evaluation.

    Rank 0 writes to TensorBoard: loss, NE of its rows since the last writing, learning rates and examples
    per second of all ranks; of each evaluation NE, AUC and calibration. Every rank logs its speed.

    Args:
        output: run directory.
        rank: of this process.
        world_size: number of processes.
        rates: name -> parameter groups whose learning rate is written.
        every_steps: between two writings to TensorBoard.
        every_seconds: between two lines of the log.
    """

    def __init__(
        self,
        output: Path,
        rank: int,
        world_size: int = 1,
        *,
        rates: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
        every_steps: int = 20,
        every_seconds: float = 30.0,
    ) -> None:
        self.world_size = world_size
        self.rates = dict(rates or {})
        self.every_steps = every_steps
        self.every_seconds = every_seconds
        self._board = SummaryWriter(str(output / "tensorboard")) if rank == 0 else None
        self._since = self._wrote = time.perf_counter()
        self._examples = 0
        self._window: list[RankingOutput] = []

    def __call__(self, step: int, output: RankingOutput) -> None:
        """After step ``step`` (from 1)."""
        self._examples += len(output.labels)
        if self._board is not None:
            self._window.append(output)
            if step % self.every_steps == 0:
                self._write_window(step)
        if time.perf_counter() - self._since >= self.every_seconds:
            self._log_speed(step)

    def evaluated(self, step: int, split: str, slices: Mapping[str, SliceMetrics]) -> None:
        """After an evaluation of ``split``, ``step`` steps into the training."""
        whole = slices["all"]
        numbers = {f"{split}/{name}": getattr(whole, name) for name in ("ne", "auc", "calibration")}
        self._write(step, {name: value for name, value in numbers.items() if value is not None})
        self._wrote = time.perf_counter()  # what an evaluation takes is not training

    def close(self, result: TrainResult) -> None:
        """Write what is pending, and how the whole training went."""
        rate = result.examples / max(result.seconds, 1e-9)
        rank_log.info(
            "%d steps in %.1f s, %.0f examples/s of this rank, %.1f s waiting for data, %.0f MB at most",
            *(result.steps, result.seconds, rate, result.data_wait, peak_mb()),
        )
        self._board_does(lambda board: board.close())

    def _write_window(self, step: int) -> None:
        now = time.perf_counter()
        examples = sum(len(output.labels) for output in self._window) * self.world_size
        numbers = {
            "train/loss": float(self._window[-1].loss),
            "train/examples_per_second": examples / max(now - self._wrote, 1e-9),
            **{
                f"learning_rate/{name}": float(groups[0]["lr"])
                for name, groups in self.rates.items()
                if groups
            },
        }
        if (entropy := window_ne(self._window)) is not None:
            numbers["train/ne"] = entropy
        self._write(step, numbers)
        self._window, self._wrote = [], now

    def _write(self, step: int, numbers: Mapping[str, float]) -> None:
        def add(board: SummaryWriter) -> None:
            for name, value in numbers.items():
                board.add_scalar(name, value, step)

        self._board_does(add)

    def _log_speed(self, step: int) -> None:
        rate = self._examples / (time.perf_counter() - self._since)
        rank_log.info("step %d, %.0f examples/s of this rank, %.0f MB", step, rate, peak_mb())
        self._since, self._examples = time.perf_counter(), 0

    def _board_does(self, action: Any) -> None:
        if self._board is None:
            return
        try:
            action(self._board)
        except OSError as error:
            # A full disk under a plot is no reason to lose a run: the next checkpoint will say.
            logger.warning("TensorBoard stops (%s)", error)
            self._board = None


def window_ne(outputs: Sequence[RankingOutput]) -> float | None:
    """Normalized entropy of the first task over some outputs; None where they have a single label."""
    logits = torch.cat([by_task(output.logits)[0] for output in outputs]).double()
    labels = torch.cat([by_task(output.labels)[0] for output in outputs]).double()
    weights = torch.cat([output.weights for output in outputs]).double()

    def entropy(logits: Tensor) -> Tensor:
        loss = torch.nn.functional.binary_cross_entropy_with_logits
        return loss(logits, labels, weight=weights, reduction="sum")

    rate = (labels * weights).sum() / weights.sum().clamp(min=1)
    if not 0 < float(rate) < 1:
        return None
    return float(entropy(logits) / entropy(torch.logit(rate).expand_as(labels)))


def track_run(output: Path, numbers: Mapping[str, float | None]) -> None:
    """Tell the trackers that TorchX was configured with about a run: its directory, its metrics.

    Without a job of TorchX that names trackers (``TORCHX_TRACKERS``), nothing happens. A tracker that fails
    is a warning: the run itself is done.
    """
    if not (os.environ.get(ENV_TORCHX_TRACKERS) and os.environ.get(ENV_TORCHX_JOB_ID)):
        return
    try:
        job = AppRun.run_from_env()
        job.add_artifact("run", str(output.absolute()))
        job.add_metadata(**{name: value for name, value in numbers.items() if value is not None})
    except Exception as error:  # trackers are programs of others
        logger.warning("a tracker of TorchX failed (%s: %s)", type(error).__name__, error)


def peak_mb() -> float:
    """Largest memory of this process so far, in MB: of the GPU if there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
