"""Code usage while a fit runs: the live readout, and the stop when it collapses."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from torchrec_sid.errors import SidError
from torchrec_sid.quantizers.collectives import Collectives

logger = logging.getLogger(__name__)
_LEAST_PERPLEXITY = 1.2


class CollapseError(SidError):
    """A gradient fit stopped: its codes or its loss became useless. The message says the remedy."""


class UsageReading(NamedTuple):
    """Usage of each level since the last reading."""

    used: tuple[float, ...]
    """Fraction of the codes that occurred."""
    perplexity: tuple[float, ...]
    """exp of the entropy of the codes, 1 .. K."""


class UsageMonitor:
    """Counts codes and compares their perplexity with that of the start.

    Args:
        cardinalities: K_l per level.
        start: perplexity per level of the codes before the first step.
        collapse_below: fraction of ``start`` under which a level has collapsed; 0 never stops. Levels
            of digits (fewer than 16 codes) are judged by the mean of all of them.
    """

    def __init__(self, cardinalities: Sequence[int], start: Sequence[float], collapse_below: float) -> None:
        self._cardinalities = tuple(cardinalities)
        self._start = tuple(start)
        self._collapse_below = collapse_below
        self._counts: list[Tensor] | None = None

    @property
    def window_rows(self) -> int:
        """Assignments that a reading should rest on: eight per code of the widest level."""
        return 8 * max(self._cardinalities)

    def add(self, codes: Tensor) -> None:
        """Count the codes ``[N, L]`` of a step on this rank."""
        fresh = count_codes(codes, self._cardinalities)
        self._counts = (
            fresh if self._counts is None else [a + b for a, b in zip(self._counts, fresh, strict=True)]
        )

    def read(self, ranks: Collectives, step: int) -> UsageReading:
        """Usage over all ranks since the last call, which starts a new window.

        Raises:
            CollapseError: a level's perplexity fell below the limit.
        """
        assert self._counts is not None, "read() before add()"
        ranks.sum_(self._counts)
        reading = usage_of(self._counts)
        self._counts = None
        self._check(reading, step)
        return reading

    def _check(self, reading: UsageReading, step: int) -> None:
        digits = [i for i, k in enumerate(self._cardinalities) if k < 16]
        wide = [([i], f"level {i + 1}") for i, k in enumerate(self._cardinalities) if k >= 16]
        for levels, name in [*wide, *([(digits, "the digits")] if digits else [])]:
            now = sum(reading.perplexity[i] for i in levels) / len(levels)
            before = sum(self._start[i] for i in levels) / len(levels)
            # A perplexity of 1 is no information at all: judge what is above it, where there was some.
            if before > _LEAST_PERPLEXITY and now - 1 < self._collapse_below * (before - 1):
                raise CollapseError(
                    f"{name} after step {step}",
                    f"usage collapsed: perplexity {now:.1f}, at the start it was {before:.1f}",
                    "Lower learning_rate or codebook_rate, use straight_through gradients or EMA "
                    "codebooks, or leave dead-code reset on (reset_below > 0).",
                )


def count_codes(codes: Tensor, cardinalities: Sequence[int]) -> list[Tensor]:
    """Occurrences per level, ``[K_l]`` int64 each, of codes ``[N, L]``."""
    return [torch.bincount(codes[:, i], minlength=k) for i, k in enumerate(cardinalities)]


def usage_of(counts: Sequence[Tensor]) -> UsageReading:
    """Used fraction and perplexity from occurrences per level."""
    used, perplexity = [], []
    for count in counts:
        share = count.double() / count.sum().clamp(min=1)
        used.append(float((count > 0).double().mean()))
        perplexity.append(float(torch.special.entr(share).sum().exp()))
    return UsageReading(tuple(used), tuple(perplexity))


class Readout(Protocol):
    """Receives the state of a running fit."""

    def __call__(self, step: int, loss: float, reading: UsageReading | None) -> None:
        """After a step; ``reading`` where a usage window ended."""


@contextmanager
def live_readout(title: str, steps: int, *, start: int, show: bool) -> Iterator[Readout]:
    """A bar on stderr with loss, used share and perplexity per level; readings go to the log as well."""
    from rich.console import Console  # only needed for the bar
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    note = TextColumn("loss {task.fields[loss]} {task.fields[usage]}")
    with Progress(*columns, note, console=Console(stderr=True), disable=not show) as bar:
        task = bar.add_task(title, total=steps, completed=start, loss="-", usage="")

        def report(step: int, loss: float, reading: UsageReading | None) -> None:
            bar.update(task, completed=step, loss=f"{loss:.4f}")
            if reading is not None:
                text = describe(reading)
                bar.update(task, usage=text)
                logger.info("%s: step %d of %d, loss %.4f, %s", title, step, steps, loss, text)

        yield report


def describe(reading: UsageReading, levels: int = 6) -> str:
    """The first levels of a reading in words, e.g. ``used 100% 98%, perplexity 201 187``."""
    used = " ".join(f"{u:.0%}" for u in reading.used[:levels])
    perplexity = " ".join(f"{p:.0f}" if p >= 10 else f"{p:.1f}" for p in reading.perplexity[:levels])
    more = " .." if len(reading.used) > levels else ""
    return f"used {used}{more}, perplexity {perplexity}{more}"
