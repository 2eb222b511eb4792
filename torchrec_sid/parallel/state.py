"""What of a training run goes into a checkpoint, and what must be done before it is read back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer

from torchrec_sid.errors import SidError


def training_state(model: nn.Module, optimizer: KeyedOptimizer) -> dict[str, Any]:
    """``{"model": ..., "optimizer": ...}``: state dicts for :meth:`CheckpointManager.save` and ``load``.

    Args:
        model: a ``DistributedModelParallel``, or the plain module.
        optimizer: the ``CombinedOptimizer`` of table and dense optimizers.
    """
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


def prepare_to_load(optimizer: KeyedOptimizer) -> None:
    """Make the state of the dense optimizers, which torch makes only at the first step.

    A state that does not exist yet is not read, without a word: momentum and Adam's averages would start
    from zero. This runs one step with zero gradients, which weight decay and the step count would feel, so
    call it before the checkpoint is read and not otherwise. The fused table optimizers have theirs already.
    """
    for _, inner in getattr(optimizer, "optimizers", [("", optimizer)]):
        # DistributedModelParallel.fused_optimizer is itself a CombinedOptimizer.
        if not isinstance(inner, CombinedOptimizer):
            inner.init_state()
            inner.zero_grad(set_to_none=True)


def apply_training_state(model: nn.Module, optimizer: KeyedOptimizer, state: dict[str, Any]) -> None:
    """Give a state that was read to model and optimizer; the counterpart of :func:`training_state`."""
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])


def entry_names(state: dict[str, Any]) -> set[str]:
    """Names under which torch.distributed.checkpoint stores a nested state."""
    return set(flatten_state_dict(state)[0])


def check_entries(
    where: str, wanted: set[str], saved: set[str], *, tops: Iterable[str], allow_extra: bool
) -> None:
    """Compare the entries a state wants with those a checkpoint has.

    Args:
        where: the checkpoint, for the error.
        wanted: entry names of the state on all ranks.
        saved: entry names in the checkpoint.
        tops: top-level keys of the state; entries of the checkpoint under other keys do not matter.
        allow_extra: accept entries of the checkpoint that the state lacks.

    Raises:
        SidError: an entry is missing on either side, named.
    """
    if missing := sorted(wanted - saved):
        raise SidError(
            where,
            f"lacks {len(missing)} entries of this model, the first is {missing[0]}",
            "Resume with its configuration and the sharding plan of the checkpoint: --plan takes its "
            "directory.",
        )
    prefixes = tuple(f"{top}." for top in tops)
    extra = sorted(name for name in saved - wanted if name.startswith(prefixes))
    if extra and not allow_extra:
        raise SidError(
            where,
            f"holds {len(extra)} entries that this state lacks, the first is {extra[0]}",
            "Call prepare_to_load(optimizer) first, resume with the configuration that was saved, or pass "
            "partial_state=True.",
        )
