"""`apps.train` in which rank 1 raises or is killed in a step, once.

The variable FAIL is `raise` or `kill`, a colon, and a file that says that it has happened.
"""

import os
import signal
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from apps.train import main

STEP = 17


def fail(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Called before every optimizer steps; Adam steps once in a training step."""
    how, _, mark = os.environ["FAIL"].partition(":")
    if not isinstance(optimizer, torch.optim.Adam) or os.environ["RANK"] != "1" or Path(mark).exists():
        return
    state = next(iter(optimizer.state.values()), None)
    if state is None or int(state["step"]) != STEP - 1:
        return
    Path(mark).touch()
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise ValueError(f"rank 1 raises in step {STEP}")


if __name__ == "__main__":
    register_optimizer_step_pre_hook(fail)
    main()
