"""`EarlyStopping`: stop where the validation stops getting better."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torchrec_sid.errors import SidError


@dataclass
class EarlyStopping:
    """Watches one number over evaluations; lower is better.

    Raises:
        SidError: a negative patience.

    Example:
        >>> stopping = EarlyStopping(patience=2)
        >>> [stopping.observe(step, ne) for step, ne in enumerate((0.9, 0.8, 0.85, 0.81))]
        [True, True, False, False]
        >>> stopping.stop, stopping.step
        (True, 1)
    """

    patience: int
    """Evaluations without a better value after which training stops; 0: it never stops."""
    best: float = math.inf
    """The best value so far."""
    step: int = 0
    """Training steps done when it was seen."""
    worse: int = 0
    """Evaluations since."""

    def __post_init__(self) -> None:
        if self.patience < 0:
            raise SidError("patience", str(self.patience), "Give 0 or more evaluations.")

    @property
    def stop(self) -> bool:
        """Whether it is time to stop."""
        return bool(self.patience) and self.worse >= self.patience

    def observe(self, step: int, value: float | None) -> bool:
        """Note an evaluation after ``step`` training steps; whether it is the best so far.

        Raises:
            SidError: there is no value: the validation has a single label.
        """
        if value is None or not math.isfinite(value):
            raise SidError(
                "validation", f"NE {value} after {step} steps", "Choose a split that has both labels."
            )
        if value < self.best:
            self.best, self.step, self.worse = value, step, 0
            return True
        self.worse += 1
        return False

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, JSON-serialisable."""
        best = self.best if math.isfinite(self.best) else None
        return {"best": best, "step": self.step, "worse": self.worse}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state`."""
        best = state["best"]
        self.best = math.inf if best is None else float(best)
        self.step, self.worse = int(state["step"]), int(state["worse"])
