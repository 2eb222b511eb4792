"""Mini-batches for gradient fits: shuffled, endless, and resumable at any batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from torchrec_sid.seeding import derived_generator

Rows = tuple[Tensor, ...]
"""Aligned tensors, the same number of rows each."""


class ShufflePosition(NamedTuple):
    """Where a run over the data stands; all that a checkpoint needs."""

    pass_index: int
    """Complete passes before this one."""
    batch: int
    """Batches taken from this pass."""


class ShuffledBatches:
    """Endless shuffled batches from a stream that is read anew in each pass.

    A buffer of rows is filled, permuted and cut into batches; the permutation depends on the seed, the
    pass and the place alone, so that a run continued at a :class:`ShufflePosition` sees what it
    would have seen. The last batch of a pass may be smaller.

    Args:
        start: starts a pass over aligned tensors.
        batch_size: rows per batch.
        buffer_rows: rows shuffled together; bounds the memory.
        seed: seed of the permutations.
    """

    def __init__(
        self, start: Callable[[], Iterable[Rows]], *, batch_size: int, buffer_rows: int, seed: int
    ) -> None:
        self._start = start
        self._batch_size = batch_size
        self._buffer_rows = max(buffer_rows, batch_size)
        self._seed = seed
        self.position = ShufflePosition(0, 0)

    def __iter__(self) -> Iterator[Rows]:
        while True:
            skip = self.position.batch
            for index, batch in enumerate(self._one_pass(self.position.pass_index)):
                if index >= skip:
                    self.position = ShufflePosition(self.position.pass_index, index + 1)
                    yield batch
            self.position = ShufflePosition(self.position.pass_index + 1, 0)

    def _one_pass(self, pass_index: int) -> Iterator[Rows]:
        for place, (rows, last) in enumerate(self._buffers()):
            generator = derived_generator(self._seed, f"shuffle pass {pass_index} buffer {place}")
            order = torch.randperm(len(rows[0]), generator=generator).to(rows[0].device)
            full = len(order) if last else len(order) - len(order) % self._batch_size
            for begin in range(0, full, self._batch_size):
                picked = order[begin : begin + self._batch_size]
                yield tuple(t[picked] for t in rows)

    def _buffers(self) -> Iterator[tuple[Rows, bool]]:
        """Buffers of a multiple of the batch size, and whether it is the last one, which may be ragged."""
        held: list[Rows] = []
        count = 0
        for rows in self._start():
            held.append(rows)
            count += len(rows[0])
            while count > self._buffer_rows:
                joined = _join(held)
                size = self._buffer_rows - self._buffer_rows % self._batch_size
                yield tuple(t[:size] for t in joined), False
                held = [tuple(t[size:] for t in joined)]
                count -= size
        if count:
            yield _join(held), True


def _join(pieces: list[Rows]) -> Rows:
    return (
        pieces[0] if len(pieces) == 1 else tuple(torch.cat(column) for column in zip(*pieces, strict=True))
    )
