"""What a run leaves behind: configuration, plan, environment, and a log of every rank."""

from __future__ import annotations

import logging
import os
import platform
import resource
import shlex
import subprocess
import sys
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from torchrec_sid.artifact import write_atomically, write_json
from torchrec_sid.doctor import find_versions
from torchrec_sid.errors import SidError
from torchrec_sid.models.dlrm import RankingOutput
from torchrec_sid.parallel.plan_file import save_plan
from torchrec_sid.training.loop import TrainResult
from torchrec_sid.training.run import Run

logger = logging.getLogger(__name__)
rank_log = logging.getLogger("torchrec_sid.rank")
"""Goes to the log of this rank alone, not to the console."""
rank_log.setLevel(logging.INFO)
rank_log.propagate = False
rank_log.addHandler(logging.NullHandler())
_VARIABLES = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "GLOO_SOCKET_IFNAME", "NCCL_DEBUG")
"""Environment variables that change how a run behaves; others may hold secrets."""


def set_up_logging() -> None:
    """What the processes of a run print: this package's progress, and warnings that can be acted on."""
    # TorchRec has set up the root logger by now.
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s", force=True)
    for name in ("apps", "torchrec_sid"):
        logging.getLogger(name).setLevel(logging.INFO)
    # TorchRec calls torch functions that warn on every step; its users can do nothing about it.
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
    if not torch.cuda.is_available():
        # It misses a CUDA stream.
        logging.getLogger("torchrec.distributed.train_pipeline.postproc").setLevel(logging.ERROR)


def open_rank_log(output: str | Path, rank: int) -> None:
    """Append what this process logs to ``OUTPUT/logs/rank-R.log``, with the time.

    Raises:
        SidError: the directory cannot be written.
    """
    path = Path(output) / "logs" / f"rank-{rank}.log"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(path)
    except OSError as error:
        raise SidError(
            str(output), f"cannot be written ({error.strerror})", "Free space, or pass another --output."
        ) from error
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    rank_log.addHandler(handler)
    rank_log.info("process %d on %s", os.getpid(), platform.node())


def describe_run(run: Run, output: Path) -> None:
    """Write ``config.json``, ``environment.json``, ``plan.json`` and ``plan.txt``; for one rank to do."""
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "config.json", asdict(run.config))
    write_json(output / "environment.json", environment(run.ranks.size))
    save_plan(output / "plan.json", run.sharded.plan)
    text = f"{run.sharded.plan}\n{run.sharded.report}\n"
    write_atomically(output / "plan.txt", lambda path: path.write_text(text))


def environment(world_size: int) -> dict[str, Any]:
    """Versions, the command, and what the machine is."""
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "world_size": world_size,
        "host": platform.node(),
        "cpus": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "git": git_commit(),
        "versions": find_versions(),
    }


def git_commit() -> str | None:
    """The commit of this package's checkout, with ``-dirty`` if files changed; None where there is none."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"],  # noqa: S607
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parent,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


class StepRecorder:
    """Called after each step: the loss to TensorBoard (rank 0), the speed of this rank to its log.

    Args:
        output: run directory.
        rank: of this process.
        every_steps: between two losses.
        every_seconds: between two lines of the log.
    """

    def __init__(
        self, output: Path, rank: int, *, every_steps: int = 20, every_seconds: float = 30.0
    ) -> None:
        self.every_steps = every_steps
        self.every_seconds = every_seconds
        self._board = SummaryWriter(str(output / "tensorboard")) if rank == 0 else None
        self._since = time.perf_counter()
        self._examples = 0

    def __call__(self, step: int, output: RankingOutput) -> None:
        """After step ``step`` (from 1)."""
        self._examples += len(output.labels)
        if self._board is not None and step % self.every_steps == 0:
            self._board_does(lambda board: board.add_scalar("train/loss", float(output.loss), step))
        if time.perf_counter() - self._since >= self.every_seconds:
            self._log_speed(step)

    def close(self, result: TrainResult) -> None:
        """Write what is pending, and how the whole training went."""
        rate = result.examples / max(result.seconds, 1e-9)
        rank_log.info(
            "%d steps in %.1f s, %.0f examples/s of this rank, %.1f s waiting for data, %.0f MB at most",
            *(result.steps, result.seconds, rate, result.data_wait, peak_mb()),
        )
        self._board_does(lambda board: board.close())

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


def peak_mb() -> float:
    """Largest memory of this process so far, in MB: of the GPU if there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
