"""Samples of the items: exact moments with a uniform sample in one pass, or rows where the traffic is."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torchrec_sid.errors import SidError
from torchrec_sid.seeding import derived_generator
from torchrec_sid.streams import EmbeddingStream, check_batch


class StreamMoments(NamedTuple):
    """What one pass over a stream leaves."""

    rows: int
    """N."""
    mean: Tensor
    """``[d]`` float64."""
    covariance: Tensor
    """``[d, d]`` float64, divided by N."""
    sample: Tensor
    """``[min(N, sample_rows), d]`` float32, uniform without replacement, in stream order."""


class RowSample:
    """A uniform sample without replacement from a stream of unknown length.

    Every row draws a random key and the rows with the smallest keys stay, so that the sample depends on
    the seed and the rows alone, not on the batch size.

    Args:
        rows: rows to keep.
        seed: seed of the keys.
    """

    def __init__(self, rows: int, seed: int) -> None:
        self.rows = rows
        self._generator = derived_generator(seed, "row_sample")
        self._keys: Tensor | None = None
        self._kept: Tensor | None = None

    def add(self, batch: Tensor) -> None:
        """Offer the next rows ``[n, d]`` of the stream."""
        # float64 keys: float32 has 2**24 values, which tie among 10^7 rows.
        keys = torch.rand(len(batch), generator=self._generator, dtype=torch.float64)
        if self._keys is None or self._kept is None:
            self._keys, self._kept = keys, batch.clone()
        else:
            limit = self._keys.max() if len(self._keys) >= self.rows else torch.inf
            picked = keys < limit
            self._keys = torch.cat([self._keys, keys[picked]])
            self._kept = torch.cat([self._kept, batch[picked.to(batch.device)]])
        if len(self._keys) > self.rows:
            keep = self._keys.topk(self.rows, largest=False).indices.sort().values
            self._keys, self._kept = self._keys[keep], self._kept[keep.to(self._kept.device)]

    def take(self) -> Tensor:
        """The sample, ``[min(N, rows), d]``, in stream order."""
        if self._kept is None:
            return torch.empty(0, 0)
        return self._kept


def stream_moments(
    stream: EmbeddingStream, *, sample_rows: int, seed: int, device: torch.device
) -> StreamMoments:
    """Mean, covariance and a sample of a stream; memory ``O(sample_rows d + d^2)``.

    Batches are shifted by the mean of the first one before their products are summed in float64, so
    that a mean far from zero costs no precision.
    """
    sample = RowSample(sample_rows, seed)
    dim = stream.dim
    rows = 0
    shift: Tensor | None = None
    total = torch.zeros(dim, dtype=torch.float64, device=device)
    products = torch.zeros(dim, dim, dtype=torch.float64, device=device)
    for raw in stream:
        batch = raw.to(device)
        sample.add(batch)
        if shift is None:
            shift = batch.mean(0)
        centred = batch - shift
        rows += len(batch)
        total += centred.sum(0, dtype=torch.float64)
        products += (centred.T @ centred).double()
    assert shift is not None, "a stream is never empty"
    offset = total / rows
    covariance = products / rows - torch.outer(offset, offset)
    return StreamMoments(rows, shift.double() + offset, covariance, sample.take())


def impressed_rows(
    impressions: Tensor, *, rows: int = 131_072, power: float = 1.0, seed: int = 0
) -> Tensor:
    """Row numbers ``[rows]`` int64 for a fit, drawn with replacement as ``impressions ** power``.

    SIDs learned on impressed items ("Better Generalization with Semantic IDs", arXiv 2306.08121) spend
    their codes where the traffic is: items seen often get prefixes of their own, rare ones share. Items
    never impressed are not drawn; encode them afterwards like new items.

    Args:
        impressions: ``[N]`` counts or weights of the training period, not negative, not all zero.
        rows: how many to draw.
        power: 1 follows the traffic, 0 treats every impressed item alike.
        seed: of the draw.

    Raises:
        SidError: weights that are negative, not finite or all zero, or no rows.
    """
    weights = impressions.detach().double()
    seen = weights > 0
    chances = torch.where(seen, weights**power, 0.0)
    whole = bool(torch.isfinite(weights).all()) and bool(torch.isfinite(chances.sum()))
    if weights.dim() != 1 or not whole or bool((weights < 0).any()):
        raise SidError(
            "impressions",
            f"shape {tuple(weights.shape)} or values",
            "Pass one finite count, 0 or more, per item.",
        )
    if rows < 1 or not bool(seen.any()):
        raise SidError("impressions", f"{rows} rows of no impression", "Pass the training period's counts.")
    # What torch.multinomial does, which ends at 2**24 items.
    reach = chances.cumsum(0)
    reach = reach / reach[-1]
    reach[-1] = 1
    draws = torch.rand(rows, dtype=torch.float64, generator=derived_generator(seed, "sample_impressed"))
    return torch.searchsorted(reach, draws)


def sample_impressed(
    embeddings: Tensor,
    impressions: Tensor,
    *,
    rows: int = 131_072,
    power: float = 1.0,
    seed: int = 0,
) -> Tensor:
    """The embeddings ``[rows, d]`` float32 at :func:`impressed_rows`, of embeddings ``[N, d]``.

    Raises:
        SidError: weights that do not fit the embeddings, or what :func:`impressed_rows` refuses.

    Example:
        >>> x, seen = torch.randn(100, 8), torch.arange(100)
        >>> sample_impressed(x, seen, rows=1000).shape
        torch.Size([1000, 8])
    """
    x = check_batch(embeddings, embeddings.shape[-1], "embeddings")
    if impressions.shape != (len(x),):
        raise SidError(
            "impressions", f"shape {tuple(impressions.shape)}", f"Pass {len(x)} counts, 0 or more."
        )
    return x[impressed_rows(impressions, rows=rows, power=power, seed=seed)]
