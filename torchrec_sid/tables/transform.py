"""Transforms: one KeyedJaggedTensor of SIDs and ids to KeyedJaggedTensors of table rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.sparse.tensor_dict import maybe_td_to_kjt

from torchrec_sid.spec import SidSpec
from torchrec_sid.tables.catalog_map import CatalogMap
from torchrec_sid.tables.checks import check_kjt, check_packed
from torchrec_sid.tables.indexers import Indexer, ItemRows
from torchrec_sid.tables.leaf import LeafModule


class Route(NamedTuple):
    """The rows that one feature reads from one table."""

    source: str
    """Feature that is read."""
    key: str
    """Key that is written; no two routes have the same."""
    indexer: Indexer
    """What finds the rows."""


class EventGroup(NamedTuple):
    """Tables of which every event of the same features reads a bag of rows."""

    sources: tuple[str, ...]
    """Features, in the order in which their events follow one another."""
    tables: dict[str, tuple[str, ...]]
    """Key of a table -> routes of the features into it."""


class SidTransform(LeafModule):
    """What all transforms do: check a batch, look raw ids up, find rows. Buffers only.

    TorchRec's pipelines run such a module a batch ahead and cache what it returns by its name: call each
    instance once per forward.

    Args:
        routes: what to find, in order.
        specs: feature -> shape of its SIDs; features that are not here pass as raw ids.
        catalogs: feature -> map from the raw ids it carries to SIDs; others carry packed SIDs.
        is_weighted: the KJT must have weights, one per value.
    """

    def __init__(
        self,
        routes: Sequence[Route],
        specs: Mapping[str, SidSpec],
        catalogs: Mapping[str, CatalogMap],
        is_weighted: bool = False,
    ) -> None:
        super().__init__()
        self._sources = list(dict.fromkeys(route.source for route in routes))
        self._source_of = [self._sources.index(route.source) for route in routes]
        self._keys = [route.key for route in routes]
        self._per_item = [route.indexer.per_item for route in routes]
        self._weighted = is_weighted
        self._specs = {name: specs[name] for name in self._sources if name in specs}
        self.indexers = nn.ModuleList(route.indexer for route in routes)
        self.lookups = nn.ModuleList(catalogs.get(name, _Same()) for name in self._sources)

    @property
    def sid_features(self) -> list[str]:
        """Features whose SIDs it embeds."""
        return list(self._specs)

    @property
    def catalog_fingerprints(self) -> dict[str, str]:
        """Feature -> fingerprint of the catalog that its raw ids are looked up in."""
        maps = zip(self._sources, self.lookups, strict=True)
        return {name: lookup.fingerprint for name, lookup in maps if isinstance(lookup, CatalogMap)}

    def find(self, features: KeyedJaggedTensor) -> list[ItemRows]:
        """The rows of every route.

        Raises:
            SidError: anything that would be looked up wrongly, naming feature, value and remedy.
        """
        if self._sources:
            check_kjt(features, self._sources, weighted=self._weighted)
        keys = features.keys()
        offsets = features.offset_per_key()
        values = features.values().to(torch.int64)
        raw: list[Tensor] = []
        packed: list[Tensor] = []
        unknown: list[Tensor | None] = []
        for name, lookup in zip(self._sources, self.lookups, strict=True):
            place = keys.index(name)
            raw.append(values[offsets[place] : offsets[place + 1]])
            packed.append(lookup(raw[-1]))
            spec = self._specs.get(name)
            unknown.append(None if spec is None else check_packed(name, packed[-1], spec))
        return [
            indexer(packed[i], raw[i], unknown[i])
            for i, indexer in zip(self._source_of, self.indexers, strict=True)
        ]

    def assemble(
        self, features: KeyedJaggedTensor, rows: Sequence[ItemRows], chosen: Sequence[int]
    ) -> KeyedJaggedTensor:
        """The rows of some routes, bag by bag: an item of P rows makes its bag P times as long.

        Args:
            features: the batch.
            rows: of all routes.
            chosen: numbers of the routes that become keys.
        """
        keys = features.keys()
        offsets, starts = features.offset_per_key(), features.lengths_offset_per_key()
        values: list[Tensor] = []
        lengths: list[Tensor] = []
        weights: list[Tensor] = []
        places = [keys.index(self._sources[self._source_of[j]]) for j in chosen]
        for j, place in zip(chosen, places, strict=True):
            found, per_item = rows[j], self._per_item[j]
            values.append(found.rows)
            bags = features.lengths()[starts[place] : starts[place + 1]]
            counted = found.counts is not None
            lengths.append(_lengths_of_counts(bags, found.counts) if counted else bags * per_item)
            if self._weighted:
                own = features.weights()[offsets[place] : offsets[place + 1]]
                if found.counts is not None:
                    own = own.repeat_interleave(found.counts, output_size=found.rows.numel())
                weights.append(own if per_item < 2 else own.repeat_interleave(per_item))
        strides: list[list[int]] | None = None
        if features.variable_stride_per_key():
            old = features.stride_per_key_per_rank()
            strides = [old[place] for place in places]
        new_keys = [self._keys[j] for j in chosen]
        # Known here; TorchRec would add the lengths up and wait for the device.
        sizes = [found.numel() for found in values]
        return KeyedJaggedTensor(
            keys=new_keys,
            values=_cat(values),
            weights=_cat(weights) if self._weighted else None,
            lengths=_cat(lengths),
            stride=None if strides is not None else features.stride(),
            stride_per_key_per_rank=strides,
            length_per_key=sizes,
            offset_per_key=[0, *accumulate(sizes)],
            inverse_indices=_inverse_indices(features, new_keys, places),
        )


class BagTransform(SidTransform):
    """For bags of items: every route becomes a key."""

    def forward(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        """SIDs and ids -> rows, bag by bag; see :meth:`SidTransform.find` and :meth:`assemble`."""
        features = maybe_td_to_kjt(features)
        if not self._keys:
            return features
        return self.assemble(features, self.find(features), range(len(self._keys)))


class EventTransform(SidTransform):
    """For one vector per event: routes of one row an event, and groups whose events are bags of rows.

    Args:
        routes: what to find, in order.
        specs: as in :class:`SidTransform`.
        catalogs: as in :class:`SidTransform`.
        groups: events that are bags; their routes are not keys of the first result.
    """

    def __init__(
        self,
        routes: Sequence[Route],
        specs: Mapping[str, SidSpec],
        catalogs: Mapping[str, CatalogMap],
        groups: Sequence[EventGroup],
    ) -> None:
        super().__init__(routes, specs, catalogs)
        self._groups = [
            {table: [self._keys.index(key) for key in keys] for table, keys in group.tables.items()}
            for group in groups
        ]
        pooled = {j for group in self._groups for numbers in group.values() for j in numbers}
        self._single = [j for j in range(len(self._keys)) if j not in pooled]

    def forward(self, features: KeyedJaggedTensor) -> tuple[KeyedJaggedTensor, ...]:
        """SIDs and ids -> rows per event, with the lengths of the batch; then one KJT per group.

        The KJT of a group has one bag per event and one key per table, all events of its features one after
        the other: its stride is their number, which differs from rank to rank.
        """
        features = maybe_td_to_kjt(features)
        rows = self.find(features)
        result = [self.assemble(features, rows, self._single)] if self._single else []
        if not self._keys:
            result = [features]
        return (*result, *(self._pool(rows, group) for group in self._groups))

    def _pool(self, rows: Sequence[ItemRows], group: Mapping[str, Sequence[int]]) -> KeyedJaggedTensor:
        values: list[Tensor] = []
        lengths: list[Tensor] = []
        sizes: list[int] = []
        for numbers in group.values():
            size = 0
            for j in numbers:
                values.append(rows[j].rows)
                size += values[-1].numel()
                counts = rows[j].counts
                if counts is None:
                    per_item = self._per_item[j]
                    counts = values[-1].new_full((values[-1].numel() // per_item,), per_item)
                lengths.append(counts)
            sizes.append(size)
        first = len(next(iter(group.values())))
        events = sum(found.numel() for found in lengths[:first])
        if not torch.compiler.is_compiling() and events == 0:
            # A KJT without a bag cannot be taken apart: one empty bag, which `CombineEvents` leaves out.
            events, lengths = 1, [values[0].new_zeros(len(group))]
        return KeyedJaggedTensor(
            keys=list(group),
            values=_cat(values),
            lengths=_cat(lengths),
            stride=events,
            length_per_key=sizes,
            offset_per_key=[0, *accumulate(sizes)],
        )


class _Same(nn.Module):
    """The place of a catalog where the feature already carries what the tables take."""

    def forward(self, raw: Tensor) -> Tensor:
        return raw


def _inverse_indices(
    features: KeyedJaggedTensor, keys: list[str], places: Sequence[int]
) -> tuple[list[str], Tensor] | None:
    """Per output key, the row of inverse indices of the feature it was made from."""
    inverse = features.inverse_indices_or_none()
    if inverse is None:
        return None
    names, table = inverse
    order = [names.index(features.keys()[place]) for place in places]
    return keys, table.index_select(0, torch.tensor(order, device=table.device))


def _lengths_of_counts(lengths: Tensor, counts: Tensor | None) -> Tensor:
    """Rows of each bag ``[B]``, from its items ``[B]`` and the rows of each item ``[n]``."""
    assert counts is not None
    before = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    ends = lengths.cumsum(0)
    return (before.index_select(0, ends) - before.index_select(0, ends - lengths)).to(lengths.dtype)


def _cat(pieces: list[Tensor]) -> Tensor:
    return pieces[0].contiguous() if len(pieces) == 1 else torch.cat(pieces)
