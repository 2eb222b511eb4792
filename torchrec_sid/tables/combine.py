"""From what the stock collections return to what the replaced collection returned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor
from torchrec.sparse.tensor_dict import maybe_td_to_kjt

from torchrec_sid.tables.layout import CollectionOutput
from torchrec_sid.tables.leaf import LeafModule
from torchrec_sid.tables.scheme_registry import SidVectors
from torchrec_sid.tables.transform import EventGroup


class _Combine(LeafModule):
    """Outputs, and what computes vectors of theirs without a table."""

    def __init__(self, outputs: Sequence[CollectionOutput], vectors: Mapping[str, SidVectors]) -> None:
        super().__init__()
        self._names = [out.name for out in outputs]
        self._keys = [out.key_groups for out in outputs]
        parts = [part for out in outputs for part in out.parts if part.vectors]
        self._vector_keys = [part.key for part in parts]
        self.vector_names = [part.vectors for part in parts]
        """Names of :attr:`sides`, one for each feature that reads them."""
        self.sides = nn.ModuleList(vectors[name] for name in self.vector_names)

    @property
    def vectors_by_name(self) -> dict[str, nn.Module]:
        """What computes vectors without a table, by name."""
        return dict(zip(self.vector_names, self.sides, strict=True))


class CombineBags(_Combine):
    """KeyedTensor of physical tables -> KeyedTensor of features: sums within, then sum or concat.

    Means are taken here, over items and not over rows. TorchRec's own mean would divide by the rows of a
    bag, and under grid sharding it does not divide at all.

    Args:
        outputs: what to make.
        vectors: name -> what computes vectors without a table.
        is_weighted: bags have weights.
    """

    def __init__(
        self, outputs: Sequence[CollectionOutput], vectors: Mapping[str, SidVectors], is_weighted: bool
    ) -> None:
        super().__init__(outputs, vectors)
        self._weighted = is_weighted
        self._dims = [out.dim for out in outputs]
        self._mean_over = [out.feature if out.mean else "" for out in outputs]

    def forward(
        self, pooled: KeyedTensor | None, rows: KeyedJaggedTensor, features: KeyedJaggedTensor
    ) -> KeyedTensor:
        """Physical ``[B, sum of dims]`` -> output ``[B, sum of dims]``.

        Args:
            pooled: result of the stock collection; None where there is no table.
            rows: what was looked up; carries the packed SIDs of vectors without a table.
            features: the batch, for means.
        """
        features = maybe_td_to_kjt(features)
        by_key: dict[str, Tensor] = {} if pooled is None else dict(pooled.to_dict())
        for key, vectors in zip(self._vector_keys, self.sides, strict=True):
            bags = rows[key]
            summed = vectors(bags.values(), bags.lengths(), bags.weights_or_none())
            by_key[key] = _spread(summed, rows, key)
        values: list[Tensor] = []
        for keys, feature in zip(self._keys, self._mean_over, strict=True):
            vector = _side_by_side(keys, by_key)
            if feature:
                vector = vector / self._counts(features, feature).to(vector.dtype)
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
        counts = _spread(counts, features, name)
        return counts.masked_fill(counts == 0, 1).unsqueeze(1)


class CombineEvents(_Combine):
    """Rows and bags of physical tables -> one embedding per event, as an EmbeddingCollection returns it.

    Args:
        outputs: what to make.
        vectors: name -> what computes vectors without a table.
        groups: tables whose events are bags, in the order of their collections.
        need_indices: pass the looked-up rows on as weights.
    """

    def __init__(
        self,
        outputs: Sequence[CollectionOutput],
        vectors: Mapping[str, SidVectors],
        groups: Sequence[EventGroup],
        need_indices: bool,
    ) -> None:
        super().__init__(outputs, vectors)
        self._features = [out.feature for out in outputs]
        self._groups = list(groups)
        self._need_indices = need_indices
        pooled = {key for group in groups for keys in group.tables.values() for key in keys}
        parts = [part for out in outputs for part in out.parts]
        self._table_parts = [p for p in parts if not p.vectors and p.key not in pooled]

    def forward(
        self,
        looked_up: dict[str, JaggedTensor] | None,
        pooled: Sequence[KeyedTensor],
        rows: Sequence[KeyedJaggedTensor],
        features: KeyedJaggedTensor,
    ) -> dict[str, JaggedTensor]:
        """``[rows, D]`` and ``[events, D]`` per physical key -> ``[events, D]`` per output.

        Args:
            looked_up: result of the stock EmbeddingCollection; None where there is none.
            pooled: results of the stock EmbeddingBagCollections, one per group.
            rows: what was looked up; the first carries the packed SIDs of vectors without a table.
            features: the batch, whose lengths the result has.
        """
        features = maybe_td_to_kjt(features)
        by_key: dict[str, Tensor] = {}
        for key, vectors in zip(self._vector_keys, self.sides, strict=True):
            by_key[key] = vectors(rows[0][key].values(), None, None)
        for part in self._table_parts:
            assert looked_up is not None
            rows_of = looked_up[part.key].values()
            if part.per_item > 1:
                rows_of = rows_of.view(-1, part.per_item, rows_of.shape[1]).sum(dim=1)
            by_key[part.key] = rows_of
        keys, sizes = features.keys(), features.length_per_key()
        for group, vectors_of in zip(self._groups, pooled, strict=True):
            events = [sizes[keys.index(name)] for name in group.sources]
            for table, names in group.tables.items():
                whole = vectors_of.values() if len(group.tables) == 1 else vectors_of[table]
                if not torch.compiler.is_compiling() and whole.shape[0] != sum(events):
                    whole = whole[:0]  # the empty bag that stands for none
                parts = [whole] if len(names) == 1 else whole.split(events)
                by_key.update(zip(names, parts, strict=True))
        result: dict[str, JaggedTensor] = {}
        for name, feature, groups in zip(self._names, self._features, self._keys, strict=True):
            indices = looked_up[groups[0][0]].weights() if looked_up and self._need_indices else None
            bags = features[feature]
            result[name] = JaggedTensor(
                values=_side_by_side(groups, by_key), lengths=bags.lengths(), weights=indices
            )
        return result


def _side_by_side(groups: list[list[str]], by_key: dict[str, Tensor]) -> Tensor:
    vectors: list[Tensor] = []
    for keys in groups:
        total = by_key[keys[0]]
        for j in range(1, len(keys)):
            total = total + by_key[keys[j]]
        vectors.append(total)
    return vectors[0] if len(vectors) == 1 else torch.cat(vectors, dim=1)


def _spread(bags: Tensor, features: KeyedJaggedTensor, key: str) -> Tensor:
    """One row per example, where the batch holds only the distinct bags of a feature."""
    inverse = features.inverse_indices_or_none()
    if inverse is None:
        return bags
    return bags.index_select(0, inverse[1][inverse[0].index(key)])
