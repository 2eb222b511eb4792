"""Fit where the traffic is: a sample of items in proportion to their impressions."""

from __future__ import annotations

import torch
from torch import Tensor

from torchrec_sid.errors import SidError
from torchrec_sid.seeding import derived_generator
from torchrec_sid.streams import check_batch


def sample_impressed(
    embeddings: Tensor,
    impressions: Tensor,
    *,
    rows: int = 131_072,
    power: float = 1.0,
    seed: int = 0,
) -> Tensor:
    """Rows for a quantizer's ``fit``, drawn with replacement in proportion to ``impressions ** power``.

    SIDs learned on impressed items ("Better Generalization with Semantic IDs", arXiv 2306.08121) spend
    their codes where the traffic is: items seen often get prefixes of their own, rare ones share. Items
    never impressed are not drawn; encode them afterwards like new items.

    Args:
        embeddings: ``[N, d]`` floating point.
        impressions: ``[N]`` counts or weights of the training period, not negative, not all zero.
        rows: how many to draw.
        power: 1 follows the traffic, 0 treats every impressed item alike.
        seed: of the draw.

    Returns:
        ``[rows, d]`` float32.

    Raises:
        SidError: weights that do not fit the embeddings, are negative, not finite or all zero, or no rows.

    Example:
        >>> x, seen = torch.randn(100, 8), torch.arange(100)
        >>> sample_impressed(x, seen, rows=1000).shape
        torch.Size([1000, 8])
    """
    x = check_batch(embeddings, embeddings.shape[-1], "embeddings")
    weights = impressions.detach().double()
    if weights.shape != (len(x),) or not bool(torch.isfinite(weights).all()) or bool((weights < 0).any()):
        raise SidError(
            "impressions", f"shape {tuple(weights.shape)} or values", f"Pass {len(x)} counts, 0 or more."
        )
    if rows < 1 or not bool(weights.any()):
        raise SidError("impressions", f"{rows} rows of no impression", "Pass the training period's counts.")
    seen = weights > 0
    chances = torch.where(seen, weights**power, 0.0)
    generator = derived_generator(seed, "sample_impressed")
    return x[torch.multinomial(chances, rows, replacement=True, generator=generator)]
