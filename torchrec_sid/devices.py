"""Frozen state: where it may live, and how it survives a model that is moved or materialised."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn


def buffer_device(device: torch.device | str | None) -> torch.device:
    """The device for the buffers of a module built on ``device``: the same, but the CPU instead of meta.

    Frozen state has no initialiser: a buffer on meta would become zeros when the model is materialised.
    None is torch's default device, so that a ``with torch.device(...)`` around it counts.
    """
    place = torch.get_default_device() if device is None else torch.device(device)
    return torch.device("cpu") if place.type == "meta" else place


class FrozenState(nn.Module):
    """A module whose buffers are facts, not weights: they move with the model and never change.

    ``to_empty`` and the materialisation of meta parameters give a module new memory without its contents,
    and no state dict brings a catalog back. The buffers of this module are carried over instead. They keep
    their dtype too: ``half()`` would round scores that were chosen to be exact.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        held = dict(self._buffers)
        # An empty stand-in tells where to, without a second copy of a large catalog.
        for name, buffer in held.items():
            self._buffers[name] = None if buffer is None else buffer.new_empty(0)
        try:
            super()._apply(fn, recurse)
        finally:
            for name, buffer in held.items():
                there = self._buffers[name]
                if buffer is not None and there is not None and not there.is_meta:
                    buffer = buffer.to(there.device)
                self._buffers[name] = buffer
        return self
