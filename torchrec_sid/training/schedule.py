"""Learning rates and optimizers by their names in torch."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from torchrec_sid.errors import SidError

LINEAR = "linear"
"""A rate that falls linearly over the run, which one pass over a log needs to settle."""
_LENGTHS = ("T_max", "total_steps", "total_iters")
"""Arguments of torch's schedules that are the length of the run, unless they are given."""


class RateSchedule:
    """Sets learning rates to a share of their first values.

    The rate is a function of the step alone, so that a resumed run continues as it would have.

    Args:
        groups: parameter groups of optimizers, whose ``lr`` is set.
        steps: length of the run.
        name: :data:`LINEAR`, ``constant``, or a schedule of ``torch.optim.lr_scheduler`` such as
            ``CosineAnnealingLR``.
        options: of the schedule; rates in them are shares of the first value. ``linear`` has ``final``, the
            share that is left at the end, .05 by default.
        warmup: steps over which rates first rise linearly.

    Raises:
        SidError: an unknown schedule, or options that it does not take.

    Example:
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        >>> schedule = RateSchedule(optimizer.param_groups, steps=10, warmup=4)
        >>> schedule.set(1)
        >>> round(optimizer.param_groups[0]["lr"], 3)  # .1 * 9 / 10 * 2 / 4
        0.045
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        steps: int,
        name: str = LINEAR,
        options: Mapping[str, float] | None = None,
        warmup: int = 0,
    ) -> None:
        if warmup < 0:
            raise SidError("warmup_steps", str(warmup), "Give 0 or more steps.")
        self.groups = list(groups)
        self.steps = max(1, steps)
        self.name, self.options, self.warmup = name, dict(options or {}), warmup
        self._first = [float(group["lr"]) for group in self.groups]
        self._torch: LRScheduler | None = None
        if name == LINEAR:
            unknown = set(self.options) - {"final"}
        else:
            unknown = set(self.options) if name == "constant" else set()
            self._restart()
        if unknown:
            raise SidError("schedule_options", f"{sorted(unknown)}", f"{name!r} does not take them.")

    def set(self, step: int) -> None:
        """Set the rates for the step that follows ``step`` done ones."""
        share = self.share(step)
        for group, first in zip(self.groups, self._first, strict=True):
            group["lr"] = first * share

    def share(self, step: int) -> float:
        """What is left of the first rates after ``step`` steps."""
        warm = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        if self.name == LINEAR:
            return warm * max(self.options.get("final", 0.05), 1 - step / self.steps)
        if self._torch is None:
            return warm
        at = min(step, self.steps - 1)  # OneCycleLR would rise again
        if at < self._torch.last_epoch:
            self._restart()
        while self._torch.last_epoch < at:
            self._torch.step()
        return warm * float(self._torch.get_last_lr()[0])

    def _restart(self) -> None:
        """torch's schedule of a rate of 1, at its first step."""
        if self.name == "constant":
            return
        kind = getattr(torch.optim.lr_scheduler, self.name, None)
        if not (inspect.isclass(kind) and issubclass(kind, LRScheduler)):
            known = f"Choose {LINEAR}, constant, or a class of torch.optim.lr_scheduler."
            raise SidError("schedule", repr(self.name), known)
        taken = inspect.signature(kind).parameters
        lengths = {name: self.steps for name in _LENGTHS if name in taken}
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.9)
        arguments: dict[str, Any] = lengths | {name: _whole(value) for name, value in self.options.items()}
        try:
            self._torch = kind(optimizer, **arguments)
            optimizer.step()  # or the schedule warns that it is stepped first
        except (TypeError, ValueError) as error:
            raise SidError(
                "schedule_options",
                f"{self.options} ({error})",
                f"See torch.optim.lr_scheduler.{self.name}.",
            ) from error


def make_dense_optimizer(
    name: str, parameters: Iterable[torch.nn.Parameter], lr: float, options: Mapping[str, Any] | None = None
) -> torch.optim.Optimizer:
    """An optimizer of ``torch.optim`` by its name.

    Args:
        name: such as ``Adam``, ``AdamW``, ``SGD``.
        parameters: what it trains.
        lr: its learning rate.
        options: further arguments, such as ``{"weight_decay": 0.01}``.

    Raises:
        SidError: an unknown name, or options that it does not take.
    """
    kind = getattr(torch.optim, name, None)
    if name == "Optimizer" or not (inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer)):
        raise SidError("dense_optimizer", repr(name), "Choose a class of torch.optim, such as AdamW.")
    try:
        return kind(parameters, lr=lr, **dict(options or {}))  # type: ignore[call-arg]
    except (TypeError, ValueError) as error:
        raise SidError("dense_options", f"{options} ({error})", f"See torch.optim.{name}.") from error


def clip_gradients(optimizer: torch.optim.Optimizer, largest: float) -> None:
    """Scale gradients before each step of an optimizer so that their norm is at most ``largest``."""
    if not largest > 0:
        raise SidError("clip_norm", str(largest), "Give a positive norm.")

    def clip(*_: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, largest)

    optimizer.register_step_pre_hook(clip)


def _whole(value: float) -> float | int:
    """Counts as integers: options come as floats."""
    return int(value) if isinstance(value, float) and value.is_integer() and value > 1 else value
