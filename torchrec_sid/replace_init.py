"""Which ``init_fn`` of a table of ids can draw a table of SIDs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

InitFn = Callable[[Tensor], Tensor | None]


def init_to_keep(config: Any) -> tuple[InitFn | None, str | None]:
    """The ``init_fn`` that a user gave a table, if it can draw other rows, and else why not.

    TorchRec's default depends on the number of rows, so that the new table has its own. A function that
    copies a matrix, or computes row i from i, knows which id a row stood for: those rows are gone.

    Args:
        config: of a table of ids.

    Returns:
        The function or None, and a sentence for the report where it is dropped.
    """
    init = config.init_fn
    default = isinstance(init, partial) and init.func is nn.init.uniform_
    if init is None or (default and set(init.keywords) <= {"a", "b"}):
        given = config.weight_init_min is not None or config.weight_init_max is not None
        bounds = {"a": config.get_weight_init_min(), "b": config.get_weight_init_max()}
        # A partial of uniform_ with other bounds than TorchRec would give is the user's.
        own = init is not None and not given and init.keywords != bounds
        return (init if own else None), None
    reason = _knows_its_rows(init, config.embedding_dim)
    if reason is None:
        return init, None
    return None, f"{config.name}: init_fn is dropped, because {reason}: its rows are those of ids."


@torch.no_grad()
def _knows_its_rows(init: InitFn, dim: int) -> str | None:
    """Why a function cannot draw any number of rows, whichever they are; None where it can."""
    drawn = []
    with torch.random.fork_rng(devices=[]):
        for seed, rows in ((0, 7), (1, 7), (2, 11)):
            torch.default_generator.manual_seed(seed)
            weight = nn.Parameter(torch.zeros(rows, dim))
            try:
                init(weight)
            except Exception as error:  # whatever the user's function does with a table of another size
                return f"it fails for another number of rows ({type(error).__name__})"
            if weight.shape != (rows, dim):
                return "it sets the shape of the table"
            drawn.append(weight.detach())
    if torch.equal(drawn[0], drawn[1]) and not bool((drawn[0] == drawn[0][:1]).all()):
        return "it gives the same rows whatever the seed"
    return None
