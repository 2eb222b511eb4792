"""Raw ids to packed SIDs on the device: the catalog as buffers."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from torchrec_sid.devices import FrozenState, buffer_device
from torchrec_sid.errors import SidError
from torchrec_sid.spec import SidSpec

UNKNOWN = -1
"""The packed SID of an item that the catalog does not hold: every SID table has one row for it."""


class Catalog(Protocol):
    """What is used of a :class:`torchrec_sid.catalog.SidCatalog`."""

    spec: SidSpec

    @property
    def fingerprint(self) -> str:
        """What a model records that was trained with it."""

    def item_ids(self) -> Tensor:
        """Ids ``[N]`` int64, sorted."""

    def lookup(self, item_ids: Tensor, unknown: int | None = None) -> Tensor:
        """Packed SIDs ``[n]`` int64."""


class CatalogMap(FrozenState):
    """Ids ``[n]`` -> packed SIDs ``[n]`` int64; unknown ids -> -1, counted in ``unknown_count``.

    Where the ids fill at least a quarter of their range the map is one gather, elsewhere a binary search.
    The buffers are not part of the state_dict: the catalog is an artefact of its own, and its fingerprint
    says which one a model was trained with.

    Args:
        catalog: an open SidCatalog.
        device: where the buffers live; never meta, whose buffers would become zeros under DMP.
    """

    ids: Tensor
    packed: Tensor
    unknown_count: Tensor

    def __init__(self, catalog: Catalog, device: torch.device | str | None = None) -> None:
        super().__init__()
        place = buffer_device(device)
        with place:  # whatever the context, a catalog holds data
            self._read(catalog, place)

    def _read(self, catalog: Catalog, device: torch.device) -> None:
        ids = torch.as_tensor(catalog.item_ids(), dtype=torch.int64)
        packed = torch.as_tensor(catalog.lookup(ids), dtype=torch.int64)
        self.spec = catalog.spec
        self.fingerprint: str = catalog.fingerprint
        self._first: int = int(ids[0]) if len(ids) else 0
        span = int(ids[-1]) - self._first + 1 if len(ids) else 1
        self._direct: bool = span <= 4 * max(1, len(ids))
        # The last entry is UNKNOWN: whatever the catalog does not hold reads it.
        if self._direct:
            table = torch.full((span + 1,), UNKNOWN, dtype=torch.int64)
            table[ids - self._first] = packed
            ids, packed = ids.new_zeros(0), table
        else:
            packed = torch.cat([packed, packed.new_full((1,), UNKNOWN)])
        self._span: int = span
        self.register_buffer("ids", ids.to(device), persistent=False)
        self.register_buffer("packed", packed.to(device), persistent=False)
        self.register_buffer(
            "unknown_count", torch.zeros((), dtype=torch.int64, device=device), persistent=False
        )

    def replace(self, catalog: Catalog) -> None:
        """Hold another catalog from now on, where the buffers are; unknown ids are counted anew.

        Raises:
            SidError: its SIDs have another shape.
        """
        if catalog.spec != self.spec:
            raise SidError(
                "catalog",
                f"SIDs of {catalog.spec.cardinalities} in the place of {self.spec.cardinalities}",
                "Build a model for them.",
            )
        with self.packed.device:
            self._read(catalog, self.packed.device)

    def forward(self, raw: Tensor) -> Tensor:
        """Raw ids ``[n]`` int64 -> packed SIDs ``[n]`` int64, without host synchronisation."""
        if raw.is_meta:  # shapes alone: there is nothing to look up
            return torch.empty_like(raw)
        packed = self.packed.index_select(0, self.place(raw))
        self.unknown_count += (packed < 0).sum()
        return packed

    def place(self, raw: Tensor) -> Tensor:
        """Raw ids ``[n]`` int64 -> where each one's SID is in ``packed``, ``[n]`` int64."""
        last = self.packed.numel() - 1
        if self._direct:
            place = raw - self._first
            outside = (place < 0).logical_or_(place >= self._span)
            return place.masked_fill_(outside, last)
        place = torch.searchsorted(self.ids, raw)
        found = self.ids.index_select(0, place.clamp(max=last - 1)) == raw
        return place.masked_fill_(~found, last)
