"""A learning rate that falls linearly over the run: what one pass over a log needs to settle."""

from __future__ import annotations

import torch


class LinearDecay:
    """Sets the learning rate of an optimizer from its first value down to a share of it.

    Stateless: the rate is a function of the step alone, so that a resumed run continues as it would have.

    Args:
        optimizer: whose ``lr`` to set.
        steps: length of the run.
        final: share of the first value that is left at the end.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, steps: int, final: float = 0.05) -> None:
        self.optimizer = optimizer
        self.steps = max(1, steps)
        self.final = final
        self._first = [float(group["lr"]) for group in optimizer.param_groups]

    def set(self, step: int) -> None:
        """Set the rate for the step that follows ``step`` done ones."""
        share = max(self.final, 1 - step / self.steps)
        for group, first in zip(self.optimizer.param_groups, self._first, strict=True):
            group["lr"] = first * share
