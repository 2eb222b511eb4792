"""`RequestRows`: which rows of a batch share one history."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torchrec import KeyedJaggedTensor

REQUEST, REQUEST_ROW = "request", "request_row"
"""Names of the two tensors among the rows of a batch."""


class RequestRows(NamedTuple):
    """A batch by request: the candidates of a request are rows, and one of them holds the history of all.

    In the KeyedJaggedTensor that row's bags of ``history`` and ``history_NAME`` hold the events, those of
    the other rows of the request are empty. So the batch has one stride, and every event is looked up
    once.
    """

    request: Tensor
    """``[B]`` int64: the request of each row, 0 .. U - 1."""
    row: Tensor
    """``[U]`` int64, ascending: the row that holds the history of each request."""

    @classmethod
    def of(cls, rows: Mapping[str, Tensor] | None) -> RequestRows | None:
        """Those of a batch; None where every row is a request of its own."""
        if rows is None or REQUEST not in rows:
            return None
        return cls(rows[REQUEST], rows[REQUEST_ROW])

    @classmethod
    def consecutive(cls, counts: Tensor, rows: int) -> RequestRows:
        """Of ``counts`` ``[U]`` rows of each request, one request after the other, ``rows`` in all."""
        users = torch.arange(counts.shape[0], device=counts.device)
        request = torch.repeat_interleave(users, counts, output_size=rows)
        return cls(request, counts.cumsum(0) - counts)

    def lengths(self, features: KeyedJaggedTensor) -> Tensor:
        """``[U]`` int64: events of each request's history."""
        return features["history_action"].lengths()[self.row]

    def events_of_rows(self, features: KeyedJaggedTensor) -> tuple[Tensor, Tensor]:
        """For what compares every row with every event: ``[B]`` events of each row's history, and their
        places among the events of the batch, row after row."""
        held = features["history_action"].lengths()
        lengths, first = held[self.row][self.request], (held.cumsum(0) - held)[self.row][self.request]
        places = torch.repeat_interleave(first - lengths.cumsum(0) + lengths, lengths)
        return lengths, places + torch.arange(places.shape[0], device=places.device)

    def counts(self) -> Tensor:
        """``[U]`` int64: rows of each request."""
        ones = torch.ones_like(self.request)
        return torch.zeros_like(self.row).index_add(0, self.request, ones)

    def order(self) -> Tensor:
        """``[B]`` int64: the rows, request after request."""
        return torch.argsort(self.request, stable=True)


def restore(values: Tensor, order: Tensor) -> Tensor:
    """``[B, ...]`` in an ``order`` of rows -> in the order of the batch."""
    return torch.empty_like(values).index_copy(0, order, values)
