"""`LeafModule`: a module that a symbolic trace takes as one call."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class LeafModule(nn.Module):
    """A module that looks at its batch, so that a tracer must not look into it.

    TorchRec's pipelines and its quantized serving trace models with torch.fx, which has a list of names of
    leaves to pass, by whoever traces; this class needs no list.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run, or be noted as one ``call_module`` where the arguments are symbols."""
        for value in torch.utils._pytree.tree_leaves((args, kwargs)):
            if isinstance(value, torch.fx.Proxy):
                tracer: Any = value.tracer
                return tracer.create_proxy("call_module", tracer.path_of_module(self), args, kwargs)
        return super().__call__(*args, **kwargs)
