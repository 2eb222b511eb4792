"""Drift between two catalogs: which items moved, at which level, and what became of the collisions."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from torchrec_sid.catalog.sid_catalog import SidCatalog
from torchrec_sid.errors import SidError
from torchrec_sid.spec import SidSpec


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
        return (
            f"{head}: {self.moved} moved ({levels}); "
            f"stayed with most of their old group, by depth: {together}; {collisions}."
        )


def measure_drift(before: SidCatalog, after: SidCatalog) -> DriftReport:
    """Compare two catalogs, or two generations of one, item by item.

    Args:
        before: the published catalog.
        after: the one that would replace it; of the same cardinalities, at most 63 bits.

    Raises:
        SidError: different cardinalities, or SIDs beyond 63 bits.
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
            _kept_together(spec.prefix(old, depth), spec.prefix(new, depth))
            for depth in range(1, spec.levels + 1)
        ),
        collision_rate_before=_collision_rate(old),
        collision_rate_after=_collision_rate(new),
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
