"""A planted topic tree: embeddings whose right prefixes are known."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class PlantedTree(NamedTuple):
    """What :func:`planted_tree` returns."""

    x: Tensor
    """``[N, d]`` float32, unit vectors."""
    topic: Tensor
    """``[N]`` int64, 64 of them."""
    subtopic: Tensor
    """``[N]`` int64, 16 per topic, numbered over all topics."""


def planted_tree(items: int, *, seed: int = 0, dim: int = 192, rank: int = 32) -> PlantedTree:
    """Items of a tree of 64 topics, 16 subtopics and 8 kinds each, popular by a power law, with noise.

    Tree and noise lie in a subspace of ``rank`` dimensions, as real embeddings nearly do. With 24 bits a
    greedy residual quantizer leaves about 0.215 of the variance; five sixths of that is noise.
    """
    generator = torch.Generator().manual_seed(1000 + seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, rank, generator=generator) / rank**0.5

    def popular(k: int) -> Tensor:
        return torch.multinomial(torch.arange(1.0, k + 1) ** -0.5, items, True, generator=generator)

    tree = draw(64), 0.5 * draw(64, 16), 0.55 * draw(64, 16, 8)
    a, b, c = popular(64), popular(16), popular(8)
    x = tree[0][a] + tree[1][a, b] + tree[2][a, b, c] + 0.5 * draw(items)
    x = torch.nn.functional.normalize(x, dim=1)
    basis = torch.linalg.qr(torch.randn(dim, rank, generator=generator)).Q
    return PlantedTree(x @ basis.T, a, a * 16 + b)
