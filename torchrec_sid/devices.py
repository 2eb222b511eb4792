"""Where frozen state may live."""

from __future__ import annotations

import torch


def buffer_device(device: torch.device | str | None) -> torch.device:
    """The device for the buffers of a module built on ``device``: the same, but the CPU instead of meta.

    Frozen state has no initialiser: a buffer on meta would become zeros when the model is materialised.
    """
    place = torch.device("cpu") if device is None else torch.device(device)
    return torch.device("cpu") if place.type == "meta" else place
