"""`apps.train` in whose first attempt rank 1 raises or is killed in a step, as the variable FAIL says."""

import os
import signal
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from apps.train import main

STEP = 17


def fail(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Called before every optimizer steps; Adam steps once in a training step."""
    if not isinstance(optimizer, torch.optim.Adam):
        return
    if (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) != ("1", "0"):
        return
    state = next(iter(optimizer.state.values()), None)
    if state is None or int(state["step"]) != STEP - 1:
        return
    if os.environ["FAIL"] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise ValueError(f"rank 1 raises in step {STEP}")


if __name__ == "__main__":
    register_optimizer_step_pre_hook(fail)
    main()
