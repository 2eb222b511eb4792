"""`TableOptimizer`: the optimizer fused into the backward pass of the tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
import torchrec.optim
from torch import nn
from torch.distributed.optim.apply_optimizer_in_backward import _apply_optimizer_in_backward

from torchrec_sid.errors import SidError

# Of each name: the class that marks the tables, and whether fbgemm has it for the CPU.
_CLASSES: dict[str, tuple[type[Any], bool]] = {
    "sgd": (torch.optim.SGD, True),
    "adagrad": (torch.optim.Adagrad, True),
    "rowwise_adagrad": (torchrec.optim.RowWiseAdagrad, True),
    "adam": (torch.optim.Adam, False),
    "partial_rowwise_adam": (torchrec.optim.PartialRowWiseAdam, False),
}


@dataclass(frozen=True)
class TableOptimizer:
    """The optimizer of all embedding tables.

    Without one, TorchRec trains sharded tables with plain SGD at 0.01, and plans without its memory.

    Args:
        name: ``sgd``, ``adagrad``, ``rowwise_adagrad`` (one state per row), ``adam``,
            ``partial_rowwise_adam``. The last two need a GPU.
        lr: learning rate.
        eps: added to the denominator; all but ``sgd``.
        betas: of the Adam kinds.

    Raises:
        SidError: an unknown name, a learning rate or eps that is not positive, betas outside [0, 1).
    """

    name: str = "rowwise_adagrad"
    lr: float = 0.02
    eps: float = 1e-8
    betas: tuple[float, float] = (0.9, 0.999)

    def __post_init__(self) -> None:
        if self.name not in _CLASSES:
            raise SidError("table_optimizer.name", repr(self.name), f"It is one of {', '.join(_CLASSES)}.")
        for field in ("lr", "eps"):
            if not getattr(self, field) > 0:
                raise SidError(f"table_optimizer.{field}", str(getattr(self, field)), "It must be above 0.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise SidError("table_optimizer.betas", str(self.betas), "Each is 0 to below 1.")

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the optimizer class; a new dict each time: TorchRec's sharders change it."""
        arguments: dict[str, Any] = {"lr": self.lr}
        if self.name != "sgd":
            arguments["eps"] = self.eps
        if "adam" in self.name:
            arguments["betas"] = tuple(self.betas)
        return arguments

    def require_device(self, device: str) -> None:
        """Raise SidError if fbgemm has no such optimizer for the device type."""
        if device == "cpu" and not _CLASSES[self.name][1]:
            able = [name for name, (_, cpu) in _CLASSES.items() if cpu]
            raise SidError(
                "table_optimizer.name", f"{self.name} has no CPU kernel", f"On a CPU use {', '.join(able)}."
            )

    def mark(self, parameters: Iterable[nn.Parameter]) -> None:
        """Attach the optimizer to tables of an unsharded model, before planning and sharding.

        A frozen table gets one that does nothing: without any, TorchRec trains it. A table that has an
        optimizer in its backward pass already keeps that one.
        """
        for parameter in parameters:
            if not parameter.requires_grad:
                marked: Any = parameter
                marked._optimizer_classes, marked._optimizer_kwargs = [torch.optim.SGD], [{"lr": 0.0}]
            elif not hasattr(parameter, "_optimizer_classes"):
                _apply_optimizer_in_backward(_CLASSES[self.name][0], [parameter], self.arguments)

    def factory(self) -> Callable[[Any], torch.optim.Optimizer]:
        """The same optimizer for tables whose kernel has none fused: the data-parallel ones.

        Raises:
            SidError: it exists only fused.
        """
        kind = _CLASSES[self.name][0]
        if self.name == "partial_rowwise_adam":
            raise SidError(
                "table_optimizer.name",
                "partial_rowwise_adam exists only fused, and a table is data_parallel",
                "Shard that table another way, or use adam.",
            )
        return lambda parameters: kind(parameters, **self.arguments)


TableOptimizers = TableOptimizer | Mapping[str, TableOptimizer]
"""One optimizer for all tables, or table name or pattern (``"t_item*"``, ``"*"``) -> optimizer."""


def optimizers_by_table(given: TableOptimizers, tables: Iterable[str]) -> dict[str, TableOptimizer]:
    """The optimizer of every table: that of its own name, else of the first pattern that fits.

    Raises:
        SidError: a name or pattern without a table, or a table without an optimizer.

    Example:
        >>> fast = TableOptimizer("sgd", lr=0.1)
        >>> given = {"t_user": TableOptimizer("adagrad"), "*": fast}
        >>> [table.name for table in optimizers_by_table(given, ["t_item", "t_user"]).values()]
        ['sgd', 'adagrad']
    """
    names = list(tables)
    if isinstance(given, TableOptimizer):
        return dict.fromkeys(names, given)
    for pattern in given:
        if pattern != "*" and not any(fnmatchcase(name, pattern) for name in names):
            raise SidError(
                f"table_optimizer[{pattern!r}]", "matches no table", f"Tables are {sorted(names)}."
            )
    found = {}
    for name in names:
        hit = next((p for p in [name, *given] if p in given and fnmatchcase(name, p)), None)
        if hit is None:
            raise SidError(f"table {name!r}", "has no optimizer", 'Add one under its name or under "*".')
        found[name] = given[hit]
    return found
