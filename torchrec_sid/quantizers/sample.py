"""Exact moments and a bounded, reproducible sample of a stream, in one pass."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torchrec_sid.seeding import derived_generator
from torchrec_sid.streams import EmbeddingStream


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
