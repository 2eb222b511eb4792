"""Drift between two catalogs: which items moved, at which level, and what became of the collisions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchrec_sid.catalog.sid_catalog import SidCatalog
from torchrec_sid.errors import SidError
from torchrec_sid.quantizers.alignment import ChangedShares, changed_shares
from torchrec_sid.spec import SidSpec


class ItemValues(NamedTuple):
    """One number for each of some items, e.g. their impressions or their category."""

    item_ids: Tensor
    """``[M]`` int64, each once."""
    values: Tensor
    """``[M]``."""

    def of(self, item_ids: Tensor, default: float) -> Tensor:
        """The values of ids ``[n]``; ``default`` for those that are not here."""
        if not len(self.item_ids):
            return self.values.new_full((len(item_ids),), default)
        ids, order = self.item_ids.sort()
        place = torch.searchsorted(ids, item_ids).clamp(max=len(ids) - 1)
        found = self.values[order][place]
        return torch.where(ids[place] == item_ids, found, torch.full_like(found, default))


@dataclass(frozen=True)
class DriftReport:
    """What :func:`measure_drift` returns. Counts are items, unless they say otherwise."""

    before: str
    """Fingerprint of the first catalog."""
    after: str
    """Fingerprint of the second."""
    items_before: int
    items_after: int
    common: int
    """Items in both."""
    added: int
    removed: int
    moved: int
    """Common items whose SID changed."""
    moved_at_level: tuple[int, ...]
    """Moved items by the first level at which the SIDs differ; the coarsest first. Sums to ``moved``."""
    kept_together: tuple[float, ...]
    """By depth: share of common items whose new prefix is the commonest one among the items that shared
    their old prefix. 1 means that groups were renamed at most, never split: rows of a prefix table can be
    carried over by a map from old prefixes to new ones."""
    collision_rate_before: float
    """Share of common items whose SID belongs to another common item too."""
    collision_rate_after: float
    changed: ChangedShares
    """Share of the common items, and of their traffic, whose codes changed."""
    purity_before: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """By label and depth: share of common items that carry the commonest label of their group, before."""
    purity_after: dict[str, tuple[float, ...]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def describe(self) -> str:
        """The report in words."""
        gone = f", {self.removed} gone" if self.removed else ""
        head = f"{self.common} items in both, {self.added} new{gone}"
        collisions = (
            f"collision rate {self.collision_rate_before:.1%} before, {self.collision_rate_after:.1%} after"
        )
        if not self.moved:
            return f"{head}: no SID moved; {collisions}."
        levels = ", ".join(f"{n} at level {i}" for i, n in enumerate(self.moved_at_level, 1) if n)
        together = ", ".join(f"{share:.1%}" for share in self.kept_together)
        codes, traffic = (
            ", ".join(f"{share:.1%}" for share in shares)
            for shares in (self.changed.items, self.changed.traffic)
        )
        pure = "".join(
            f"; purity of {label} {before[0]:.3f} -> {self.purity_after[label][0]:.3f} at depth 1, "
            f"{before[-1]:.3f} -> {self.purity_after[label][-1]:.3f} at depth {len(before)}"
            for label, before in self.purity_before.items()
        )
        return (
            f"{head}: {self.moved} moved ({levels}); "
            f"changed by depth: {codes} of items, {traffic} of traffic; "
            f"stayed with most of their old group, by depth: {together}; {collisions}{pure}."
        )


def measure_drift(
    before: SidCatalog,
    after: SidCatalog,
    *,
    traffic: ItemValues | None = None,
    labels: Mapping[str, ItemValues] | None = None,
) -> DriftReport:
    """Compare two catalogs, or two generations of one, item by item.

    Args:
        before: the published catalog.
        after: the one that would replace it; of the same cardinalities, at most 63 bits.
        traffic: weights of items, 0 or more; those that it lacks weigh nothing. All weigh alike by default.
        labels: by name, an integer per item, e.g. its category, for the purity of groups.

    Raises:
        SidError: different cardinalities, SIDs beyond 63 bits, or negative traffic.
    """
    spec = before.spec
    if spec != after.spec:
        raise SidError(
            "measure_drift",
            f"cardinalities {spec.cardinalities} against {after.spec.cardinalities}",
            "Compare catalogs of one SidSpec.",
        )
    ids = before.item_ids()
    ids = ids[after.contains(ids)]
    old, new = before.lookup(ids), after.lookup(ids)
    differ = old != new
    weights = None if traffic is None else traffic.of(ids, 0.0)
    depths = range(1, spec.levels + 1)

    def purity(sids: Tensor) -> dict[str, tuple[float, ...]]:
        named = {name: values.of(ids, -1).to(torch.int64) for name, values in (labels or {}).items()}
        return {
            name: tuple(_kept_together(spec.prefix(sids, depth), own) for depth in depths)
            for name, own in named.items()
        }

    return DriftReport(
        before=before.fingerprint,
        after=after.fingerprint,
        items_before=len(before),
        items_after=len(after),
        common=len(ids),
        added=len(after) - len(ids),
        removed=len(before) - len(ids),
        moved=int(differ.sum()),
        moved_at_level=_first_difference(spec, old[differ], new[differ]),
        kept_together=tuple(
            _kept_together(spec.prefix(old, depth), spec.prefix(new, depth)) for depth in depths
        ),
        collision_rate_before=_collision_rate(old),
        collision_rate_after=_collision_rate(new),
        changed=changed_shares(spec.unpack(old), spec.unpack(new), weights),
        purity_before=purity(old),
        purity_after=purity(new),
    )


def _first_difference(spec: SidSpec, old: Tensor, new: Tensor) -> tuple[int, ...]:
    counts = []
    left = torch.ones(len(old), dtype=torch.bool)
    for depth in range(1, spec.levels + 1):
        here = left & (spec.prefix(old, depth) != spec.prefix(new, depth))
        counts.append(int(here.sum()))
        left &= ~here
    return tuple(counts)


def _kept_together(old: Tensor, new: Tensor) -> float:
    """Share of items that are where most items of their group ``old`` are in ``new``."""
    if not len(old):
        return 1.0
    _, groups = old.unique(return_inverse=True)
    names, targets = new.unique(return_inverse=True)
    pairs, size = (groups * len(names) + targets).unique(return_counts=True)
    largest = torch.zeros(int(groups.max()) + 1, dtype=torch.int64)
    largest.scatter_reduce_(0, pairs // len(names), size, "amax")
    return float(largest.sum()) / len(old)


def _collision_rate(sids: Tensor) -> float:
    _, size = sids.unique(return_counts=True)
    return float(size[size > 1].sum()) / max(len(sids), 1)
