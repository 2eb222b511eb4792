"""From what the stock collections return to what the replaced collection returned."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from torchrec_sid.tables.layout import Output


class CombineBags(nn.Module):
    """KeyedTensor of physical tables -> KeyedTensor of features: sums within, then sum or concat.

    Means are taken here, over items and not over rows. TorchRec's own mean would divide by the rows of a
    bag, and under grid sharding it does not divide at all.
    """

    def __init__(self, outputs: Sequence[Output], is_weighted: bool) -> None:
        super().__init__()
        self._weighted = is_weighted
        self._names: list[str] = [out.name for out in outputs]
        self._dims: list[int] = [out.dim for out in outputs]
        self._mean_over: list[str] = [out.feature if out.mean else "" for out in outputs]
        self._parts: list[list[list[str]]] = [
            [[part.key for part in group] for group in _groups(out)] for out in outputs
        ]

    def forward(self, pooled: KeyedTensor, features: KeyedJaggedTensor) -> KeyedTensor:
        """``[B, sum of physical dims]`` -> ``[B, sum of output dims]``; means need the batch."""
        by_key = pooled.to_dict()
        values: list[Tensor] = []
        for i, groups in enumerate(self._parts):
            vectors: list[Tensor] = []
            for keys in groups:
                total = by_key[keys[0]]
                for j in range(1, len(keys)):
                    total = total + by_key[keys[j]]
                vectors.append(total)
            vector = vectors[0] if len(vectors) == 1 else torch.cat(vectors, dim=1)
            if self._mean_over[i] != "":
                vector = vector / self._counts(features, self._mean_over[i]).to(vector.dtype)
            values.append(vector)
        return KeyedTensor(keys=self._names, length_per_key=self._dims, values=torch.cat(values, dim=1))

    def _counts(self, features: KeyedJaggedTensor, name: str) -> Tensor:
        """``[B, 1]``: items of each bag, or the sum of their weights; 1 where the bag is empty."""
        bags = features[name]
        counts = bags.lengths()
        if self._weighted:
            counts = torch.segment_reduce(
                bags.weights(), "sum", lengths=counts.to(torch.int64), unsafe=True, initial=0
            )
        inverse = features.inverse_indices_or_none()
        if inverse is not None:
            counts = counts[inverse[1][inverse[0].index(name)]]
        return counts.masked_fill(counts == 0, 1).unsqueeze(1)


class CombineEvents(nn.Module):
    """Rows of physical tables -> one embedding per event, as the replaced EmbeddingCollection returned."""

    def __init__(self, outputs: Sequence[Output], dim: int) -> None:
        super().__init__()
        self._dim: int = dim
        self._names: list[str] = [out.name for out in outputs]
        self._parts: list[list[list[str]]] = [
            [[part.key for part in group] for group in _groups(out)] for out in outputs
        ]
        self._per_item: list[list[list[int]]] = [
            [[part.per_item for part in group] for group in _groups(out)] for out in outputs
        ]

    def forward(self, rows: dict[str, JaggedTensor]) -> dict[str, JaggedTensor]:
        """``[rows, D]`` per physical key -> ``[events, D]`` per output, lengths of the input."""
        result: dict[str, JaggedTensor] = {}
        for i, name in enumerate(self._names):
            vectors: list[Tensor] = []
            for keys, counts in zip(self._parts[i], self._per_item[i]):  # noqa: B905
                total = self._events(rows[keys[0]].values(), counts[0])
                for j in range(1, len(keys)):
                    total = total + self._events(rows[keys[j]].values(), counts[j])
                vectors.append(total)
            first = rows[self._parts[i][0][0]]
            times = self._per_item[i][0][0]
            result[name] = JaggedTensor(
                values=vectors[0] if len(vectors) == 1 else torch.cat(vectors, dim=1),
                lengths=first.lengths() if times == 1 else first.lengths() // times,
            )
        return result

    def _events(self, rows: Tensor, per_item: int) -> Tensor:
        if per_item == 1:
            return rows
        return rows.view(rows.shape[0] // per_item, per_item, self._dim).sum(dim=1)


def _groups(out: Output) -> list[list]:  # type: ignore[type-arg]
    """Parts that are summed; those of different schemes stay apart only where they are concatenated."""
    if not out.concat:
        return [list(out.parts)]
    last = max(part.group for part in out.parts)
    return [[part for part in out.parts if part.group == g] for g in range(last + 1)]
