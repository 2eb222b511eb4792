"""From what the stock collections return to what the replaced collection returned."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedTensor

from torchrec_sid.tables.layout import Output


class CombineBags(nn.Module):
    """KeyedTensor of physical tables -> KeyedTensor of features: sums within, then sum or concat."""

    def __init__(self, outputs: Sequence[Output]) -> None:
        super().__init__()
        self._names: list[str] = [out.name for out in outputs]
        self._dims: list[int] = [out.dim for out in outputs]
        self._parts: list[list[list[str]]] = []
        self._scales: list[list[list[float]]] = []
        for out in outputs:
            groups = _groups(out)
            self._parts.append([[part.key for part in group] for group in groups])
            # TorchRec's mean divides by the rows of a bag; the mean over items needs P times that.
            self._scales.append(
                [[float(part.per_item) if out.mean else 1.0 for part in group] for group in groups]
            )

    def forward(self, pooled: KeyedTensor) -> KeyedTensor:
        """``[B, sum of physical dims]`` -> ``[B, sum of output dims]``."""
        by_key = pooled.to_dict()
        values: list[Tensor] = []
        for groups, scales in zip(self._parts, self._scales):  # noqa: B905  (TorchScript has no strict=)
            for keys, factors in zip(groups, scales):  # noqa: B905
                total = _scaled(by_key[keys[0]], factors[0])
                for i in range(1, len(keys)):
                    total = total + _scaled(by_key[keys[i]], factors[i])
                values.append(total)
        return KeyedTensor(keys=self._names, length_per_key=self._dims, values=torch.cat(values, dim=1))


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


def _scaled(values: Tensor, factor: float) -> Tensor:
    return values if factor == 1.0 else values * factor
