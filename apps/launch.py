"""Launch a training run under TorchX and follow it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from torchx.runner import get_runner
from torchx.specs import AppState

from torchrec_sid.errors import SidError
from torchrec_sid.learn import LearnedSids
from torchrec_sid.models.channels import Arm
from torchrec_sid.training.train_config import TrainConfig

from .components import train

_POLL_SECONDS = 0.3
_ERROR = re.compile(r"[\w.]+(Error|Exception): ")


def launch_training(
    config: TrainConfig, processes: int, *, on_line: Callable[[str], None] | None = None
) -> None:
    """Run the command `train` on ``processes`` local processes with the TorchX component, and wait.

    Args:
        config: of the run; also written to ``OUTPUT/run.yaml``.
        processes: on this machine.
        on_line: called with each new line that the processes print.

    Raises:
        SidError: a process failed, with the last error line that it printed and the log's place.
    """
    output = Path(config.output)
    options = write_options(config)
    for last in (False, False, True):
        error = _run(output, options, processes, on_line)
        if error is None:
            return
        # The launcher picks a free port before its processes bind it: another program may be faster.
        if last or "EADDRINUSE" not in error:
            raise SidError(
                f"training of {config.model.arm!r}", error, f"The full log is in {output / 'logs'}."
            )


def write_options(config: TrainConfig) -> Path:
    """Write ``OUTPUT/run.yaml``, with which ``torchrec-sid train --config`` repeats a run."""
    options = Path(config.output) / "run.yaml"
    options.parent.mkdir(parents=True, exist_ok=True)
    options.write_text(yaml.safe_dump(_plain(asdict(config)), sort_keys=False))
    return options


def _run(output: Path, options: Path, processes: int, on_line: Callable[[str], None] | None) -> str | None:
    """Run the component once; None, or why it failed."""
    logs = output / "logs"
    app = train("--config", str(options), nproc_per_node=processes)
    with get_runner() as runner:
        handle = runner.run(app, scheduler="local_cwd", cfg={"log_dir": str(logs)})
        folder = logs / "torchx" / handle.rsplit("/", 1)[-1]
        lines = _Tail(folder)
        while True:
            status = runner.status(handle)
            for line in lines.new():
                if on_line is not None:
                    on_line(line)
            if status is None or status.is_terminal():
                break
            time.sleep(_POLL_SECONDS)
    if status is None or status.state != AppState.SUCCEEDED:
        return lines.last_error()
    return None


class _Tail:
    """Complete lines appended to the error streams of an app since the last look."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.read: dict[Path, int] = {}
        self.lines: list[str] = []

    def new(self) -> list[str]:
        found: list[str] = []
        for path in sorted(self.folder.glob("*/*/stderr.log")):
            with path.open("rb") as file:
                file.seek(self.read.get(path, 0))
                data = file.read()
            complete = data[: data.rfind(b"\n") + 1]
            self.read[path] = self.read.get(path, 0) + len(complete)
            found.extend(complete.decode(errors="replace").splitlines())
        self.lines.extend(found)
        return found

    def last_error(self) -> str:
        """The line that says why: the last one of an exception, or simply the last."""
        errors = [line for line in self.lines if _ERROR.match(line)]
        return (errors or self.lines or ["it printed nothing"])[-1].strip()


def _plain(value: object) -> object:
    """Tuples as lists, which YAML can say."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def sid_options(arm: Arm, tables: LearnedSids | None, side: LearnedSids | None) -> dict[str, Any]:
    """The options of a ``TrainConfig`` that give an arm the SIDs that it reads, and no others."""
    options = {}
    if "catalog" in arm.requires and tables is not None:
        options["catalog"] = str(tables.catalog)
    if "pieces" in arm.requires and tables is not None and tables.pieces is not None:
        options["pieces"] = str(tables.pieces)
    if "side_catalog" in arm.requires and side is not None:
        options |= {"side_catalog": str(side.catalog), "side_quantizer": str(side.quantizer)}
    return options
