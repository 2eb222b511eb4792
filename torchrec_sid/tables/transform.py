"""`SidTransform`: one KeyedJaggedTensor of SIDs and ids to one KeyedJaggedTensor of table rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_sid.spec import SidSpec
from torchrec_sid.tables.catalog_map import CatalogMap
from torchrec_sid.tables.checks import check_kjt, check_packed
from torchrec_sid.tables.indexers import Indexer


class Route(NamedTuple):
    """One key of the output."""

    source: str
    """Feature that is read."""
    key: str
    """Key that is written."""
    indexer: Indexer
    """``(packed, raw, unknown) -> (rows, rows of each item where that varies)``."""
    counts_key: str = ""
    """Key to write the rows of each item to; empty: nowhere."""


class SidTransform(nn.Module):
    """Rows to look up, from the batch as it comes in. Buffers only, so that a pipeline can run it ahead.

    TorchRec's pipelines cache what such a module returns by its name: call each instance once per forward.

    Args:
        routes: keys of the output, in order.
        specs: feature -> shape of its SIDs; features that are not here pass as raw ids.
        catalogs: feature -> map from the raw ids it carries to SIDs; others carry packed SIDs.
        is_weighted: keep the weights of the KJT, one per value.
    """

    def __init__(
        self,
        routes: Sequence[Route],
        specs: Mapping[str, SidSpec],
        catalogs: Mapping[str, CatalogMap],
        is_weighted: bool = False,
    ) -> None:
        super().__init__()
        self._sources: list[str] = list(dict.fromkeys(route.source for route in routes))
        self._source_of: list[int] = [self._sources.index(route.source) for route in routes]
        self._keys: list[str] = [route.key for route in routes]
        self._per_item: list[int] = [int(route.indexer.per_item) for route in routes]
        self._counts_of: list[int] = [j for j, route in enumerate(routes) if route.counts_key]
        self._keys += [route.counts_key for route in routes if route.counts_key]
        self._is_sid: list[bool] = [name in specs for name in self._sources]
        self._weighted: bool = is_weighted
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

    def forward(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        """SIDs and ids -> rows, bag by bag; an item that addresses P rows makes its bag P times as long.

        Raises:
            SidError: anything that would be looked up wrongly, naming feature, value and remedy.
        """
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            check_kjt(features, self._sources, weighted=self._weighted)
        keys = features.keys()
        offsets = features.offset_per_key()
        places = [keys.index(name) for name in self._sources]
        values = features.values().to(torch.int64)
        raw: list[Tensor] = []
        packed: list[Tensor] = []
        unknown: list[Tensor | None] = []
        for i, lookup in enumerate(self.lookups):
            piece = values[offsets[places[i]] : offsets[places[i] + 1]]
            raw.append(piece)
            sids = lookup(piece)
            packed.append(sids)
            unknown.append(self._check(i, sids))
        rows: list[Tensor] = []
        counts: list[Tensor | None] = []
        for j, indexer in enumerate(self.indexers):
            i = self._source_of[j]
            found, count = indexer(packed[i], raw[i], unknown[i])
            rows.append(found)
            counts.append(count)
        return self._assemble(features, places, rows, counts)

    def _check(self, i: int, sids: Tensor) -> Tensor | None:
        if not self._is_sid[i]:
            return None
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return sids < 0
        name = self._sources[i]
        return check_packed(name, sids, self._specs[name])

    def _assemble(
        self,
        features: KeyedJaggedTensor,
        places: list[int],
        rows: list[Tensor],
        counts: list[Tensor | None],
    ) -> KeyedJaggedTensor:
        offsets = features.offset_per_key()
        starts = features.lengths_offset_per_key()
        new_lengths: list[Tensor] = []
        new_weights: list[Tensor] = []
        sources: list[int] = []
        # Known here; TorchRec would add the lengths up and wait for the device.
        sizes = [found.numel() for found in rows]
        for j, i in enumerate(self._source_of):
            place = places[i]
            lengths = features.lengths()[starts[place] : starts[place + 1]]
            count = counts[j]
            new_lengths.append(
                _lengths_of_counts(lengths, count) if count is not None else lengths * self._per_item[j]
            )
            if self._weighted:
                weights = features.weights()[offsets[place] : offsets[place + 1]]
                if count is not None:
                    weights = weights.repeat_interleave(count, output_size=rows[j].numel())
                elif self._per_item[j] != 1:
                    weights = weights.repeat_interleave(self._per_item[j])
                new_weights.append(weights)
            sources.append(place)
        for j in self._counts_of:
            place = places[self._source_of[j]]
            count = counts[j]
            assert count is not None
            rows.append(count)
            sizes.append(count.numel())
            new_lengths.append(features.lengths()[starts[place] : starts[place + 1]])
            if self._weighted:
                new_weights.append(features.weights()[offsets[place] : offsets[place + 1]])
            sources.append(place)
        strides: list[list[int]] | None = None
        inverse: tuple[list[str], Tensor] | None = None
        if features.variable_stride_per_key():
            old = features.stride_per_key_per_rank()
            strides = [old[place] for place in sources]
            inverse = self._inverse_indices(features, sources)
        return KeyedJaggedTensor(
            keys=self._keys,
            values=_cat(rows),
            weights=_cat(new_weights) if self._weighted else None,
            lengths=_cat(new_lengths),
            stride=None if strides is not None else features.stride(),
            stride_per_key_per_rank=strides,
            length_per_key=sizes,
            offset_per_key=_running_sum(sizes),
            inverse_indices=inverse,
        )

    def _inverse_indices(
        self, features: KeyedJaggedTensor, sources: list[int]
    ) -> tuple[list[str], Tensor] | None:
        """Per output key, the row of inverse indices of the feature it was made from."""
        inverse = features.inverse_indices_or_none()
        if inverse is None:
            return None
        names, table = inverse
        keys = features.keys()
        order = [names.index(keys[place]) for place in sources]
        return self._keys, table.index_select(0, torch.tensor(order, device=table.device))


class _Same(nn.Module):
    """The place of a catalog where the feature already carries what the tables take."""

    def forward(self, raw: Tensor) -> Tensor:
        return raw


def _lengths_of_counts(lengths: Tensor, counts: Tensor) -> Tensor:
    """Rows of each bag ``[B]``, from its items ``[B]`` and the rows of each item ``[n]``."""
    before = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    ends = lengths.cumsum(0)
    return (before.index_select(0, ends) - before.index_select(0, ends - lengths)).to(lengths.dtype)


def _running_sum(sizes: list[int]) -> list[int]:
    total = [0]
    for size in sizes:
        total.append(total[-1] + size)
    return total


def _cat(pieces: list[Tensor]) -> Tensor:
    return pieces[0].contiguous() if len(pieces) == 1 else torch.cat(pieces)
