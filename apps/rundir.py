"""What a run leaves behind: configuration, plan, environment, and a log of every rank."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import platform
import shlex
import subprocess
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import torchrec_sid
from torchrec_sid.artifact import write_atomically, write_json
from torchrec_sid.doctor import find_versions
from torchrec_sid.errors import SidError
from torchrec_sid.parallel.plan_file import save_plan
from torchrec_sid.training.recorder import rank_log
from torchrec_sid.training.run import Run
from torchrec_sid.training.run_record import METRICS, seal_run

_TRAINS = ("harness", "recipes", "rows", "significance", "train")
"""Commands whose text decides what a row of a table is, beside the package."""
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
        handler = _RankLog(path)
    except OSError as error:
        raise SidError(
            str(output), f"cannot be written ({error.strerror})", "Free space, or pass another --output."
        ) from error
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    rank_log.addHandler(handler)
    rank_log.info("process %d on %s", os.getpid(), platform.node())


class _RankLog(logging.FileHandler):
    """A log that a full disk ends in peace: the screen has the same lines, and the cause."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Instead of a traceback for every line."""


def describe_run(run: Run, output: Path) -> None:
    """Write ``run.json``, ``config.json``, ``environment.json`` and the plan; for one rank to do."""
    output.mkdir(parents=True, exist_ok=True)
    seal_run(output, run.config, run.identity)
    write_json(output / "config.json", asdict(run.config))
    write_json(output / "environment.json", environment(run.ranks.size))
    save_plan(output / "plan.json", run.sharded.plan)
    text = f"{run.sharded.plan}\n{run.sharded.report}\n"
    write_atomically(output / "plan.txt", lambda path: path.write_text(text))


def finish_run(run: Run, output: Path, report: dict[str, Any]) -> None:
    """Write ``metrics.json`` and list it in ``run.json``; for one rank to do."""
    write_json(output / METRICS, report)
    seal_run(output, run.config, run.identity, finished=True)


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


@functools.cache
def library_fingerprint() -> str:
    """SHA-256 (hex) of the sources that training and evaluation run: the package, rows and harness."""
    package, apps = Path(torchrec_sid.__file__).parent, Path(__file__).parent
    files = {f"torchrec_sid/{path.relative_to(package)}": path for path in package.rglob("*")}
    # In a wheel the commands lie within the package.
    files = {name: path for name, path in files.items() if not path.is_relative_to(apps)}
    files |= {f"apps/{name}.py": apps / f"{name}.py" for name in _TRAINS}
    digest = hashlib.sha256()
    for name, path in sorted(files.items()):
        if path.suffix in (".py", ".cpp", ".h"):
            digest.update(f"{name}\0".encode() + path.read_bytes())
    return digest.hexdigest()
