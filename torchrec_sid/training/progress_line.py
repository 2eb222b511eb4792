"""One progress line: a bar on a terminal, a line every few seconds in a log."""

from __future__ import annotations

import logging
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

logger = logging.getLogger(__name__)


class TrainingProgress:
    """Shows steps, examples per second and loss. Only rank 0 should make an enabled one.

    Args:
        total: steps of the run.
        done: steps done before, by the run that this one resumes.
        title: what is running.
        every_seconds: time between two log lines where there is no terminal.
        enabled: show anything at all.
    """

    def __init__(
        self,
        total: int,
        *,
        done: int = 0,
        title: str = "train",
        every_seconds: float = 5.0,
        enabled: bool = True,
    ) -> None:
        self.total = total
        self.title = title
        self.every_seconds = every_seconds
        self.enabled = enabled
        self._started = time.perf_counter()
        self._shown = self._started
        self._bar: Progress | None = None
        console = Console(stderr=True)
        if enabled and console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._bar.add_task(title, total=total, completed=done, note="")

    def __enter__(self) -> TrainingProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    @property
    def due(self) -> bool:
        """Whether it is time to show something; reading the loss before would be wasted waiting."""
        if not self.enabled:
            return False
        wait = 0.2 if self._bar is not None else self.every_seconds
        return time.perf_counter() - self._shown >= wait

    def show(self, step: int, examples_per_second: float, loss: float) -> None:
        """Show the state after ``step`` steps."""
        self._shown = time.perf_counter()
        note = f"loss {loss:.4f}  {examples_per_second:,.0f} examples/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, note=note)
        else:
            logger.info("%s %d/%d  %s", self.title, step, self.total, note)
