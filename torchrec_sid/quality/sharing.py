"""What items that share a prefix have in common: exact sums over a stream of codes and embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from torchrec_sid.errors import SidError
from torchrec_sid.quality.keyed_sums import CountTable, VectorTable, prefix_keys
from torchrec_sid.quality.quality_report import PrefixQuality
from torchrec_sid.spec import SidSpec

_MAX_DEPTHS = 8


def default_depths(levels: int) -> tuple[int, ...]:
    """Every depth up to 8 levels; beyond, eight depths in about equal ratios from 1 to ``levels``."""
    if levels <= _MAX_DEPTHS:
        return tuple(range(1, levels + 1))
    steps = (levels ** (i / (_MAX_DEPTHS - 1)) for i in range(_MAX_DEPTHS))
    return tuple(sorted({round(step) for step in steps}))


class _Depth:
    """The groups of one depth."""

    def __init__(self, dim: int, max_groups: int, labels: Sequence[str]) -> None:
        self.groups = CountTable()
        self.vectors = VectorTable(dim, max_groups)
        self.labelled: dict[str, dict[tuple[int, int], int]] = {name: {} for name in labels}

    def cosine(self) -> float | None:
        # Over the pairs of a group of unit vectors: sum_{i != j} u_i.u_j = |sum_i u_i|^2 - n.
        count = self.vectors.counts.double()
        pairs = float((count * (count - 1)).sum())
        if pairs == 0:
            return None
        squares = self.vectors.sums.double().square().sum(1)
        return float((squares - count).sum()) / pairs

    def purity(self, name: str) -> float:
        commonest: dict[int, int] = {}
        for (group, _), n in self.labelled[name].items():
            commonest[group] = max(commonest.get(group, 0), n)
        return sum(commonest.values()) / max(sum(self.labelled[name].values()), 1)


class SharingMeter:
    """Usage per level and the sharing curve, batch by batch.

    Counts are exact. So are cosines, by the sum of each group's unit vectors, while a depth has at most
    ``max_groups`` groups; beyond, a uniform sample of whole groups is kept.

    Args:
        spec: of the codes.
        dim: d, width of the embeddings.
        depths: prefix lengths to measure; the full length is always among them. See :func:`default_depths`.
        labels: names of the labels that :meth:`add` gets, for purity.
        max_groups: groups per depth whose vectors are held: ``4 * dim * max_groups`` bytes per depth.

    Example:
        >>> meter = SharingMeter(SidSpec((2, 2)), dim=2)
        >>> meter.add(torch.tensor([[0, 0], [0, 1]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        >>> meter.prefixes()[0].cosine, meter.perplexity(2), meter.collision_rate()
        (0.0, 2.0, 0.0)
    """

    def __init__(
        self,
        spec: SidSpec,
        dim: int,
        *,
        depths: Sequence[int] | None = None,
        labels: Sequence[str] = (),
        max_groups: int = 32_768,
    ) -> None:
        self.spec = spec
        self.items = 0
        """Items seen."""
        wanted = set(depths if depths is not None else default_depths(spec.levels)) | {spec.levels}
        if min(wanted) < 1 or max(wanted) > spec.levels:
            raise SidError("depths", str(sorted(wanted)), f"Choose depths from 1 to {spec.levels}.")
        self._labels = tuple(labels)
        self._depths = {depth: _Depth(dim, max_groups, self._labels) for depth in sorted(wanted)}
        self._usage = [torch.zeros(k, dtype=torch.int64) for k in spec.cardinalities]
        self._sum = torch.zeros(dim, dtype=torch.float64)
        self._units = 0

    def add(self, codes: Tensor, x: Tensor, labels: Mapping[str, Tensor] | None = None) -> None:
        """Count a batch.

        Args:
            codes: ``[n, L]`` int64.
            x: ``[n, d]`` float embeddings of the same items.
            labels: by name ``[n]`` int64, for each label of the constructor.
        """
        codes, units = codes.cpu(), normalize(x.cpu().float(), dim=1)
        self.items += len(codes)
        self._sum += units.sum(0, dtype=torch.float64)
        self._units += int((units != 0).any(1).sum())
        for level, usage in enumerate(self._usage):
            usage += torch.bincount(codes[:, level], minlength=len(usage))
        for depth, state in self._depths.items():
            keys = prefix_keys(self.spec, codes, depth)
            state.groups.add(keys)
            state.vectors.add(keys, units)
            for name in self._labels:
                _count_pairs(state.labelled[name], keys, (labels or {})[name])

    def used(self, level: int) -> int:
        """Codes of a level (1-based) that some item has."""
        return int((self._usage[level - 1] > 0).sum())

    def perplexity(self, level: int) -> float:
        """exp of the entropy of a level's (1-based) codes; 0 before the first item."""
        p = self._usage[level - 1].double()
        p = p[p > 0] / max(self.items, 1)
        return float((-(p * p.log()).sum()).exp()) if len(p) else 0.0

    def unique(self) -> int:
        """Different full SIDs."""
        return len(self._depths[self.spec.levels].groups.keys)

    def collision_rate(self) -> float:
        """Share of items whose full SID belongs to another item too."""
        counts = self._depths[self.spec.levels].groups.counts
        return float(counts[counts > 1].sum()) / max(self.items, 1)

    def random_cosine(self) -> float:
        """Mean cosine of two different items; 0 where there are fewer than two."""
        n = self._units
        return (float(self._sum.square().sum()) - n) / (n * (n - 1)) if n > 1 else 0.0

    def prefixes(self) -> tuple[PrefixQuality, ...]:
        """The sharing curve, from the shallowest depth to full SIDs."""
        out = []
        for depth, state in self._depths.items():
            counts = state.groups.counts.double()
            out.append(
                PrefixQuality(
                    depth=depth,
                    groups=len(counts),
                    items_per_prefix=self.items / max(len(counts), 1),
                    mates=float(counts.square().sum()) / max(self.items, 1) - 1,
                    cosine=state.cosine(),
                    cosine_exact=state.vectors.share == 1,
                    purity={name: state.purity(name) for name in self._labels},
                )
            )
        return tuple(out)


def _count_pairs(counts: dict[tuple[int, int], int], keys: Tensor, labels: Tensor) -> None:
    pairs, n = torch.stack([keys, labels.cpu().long()], dim=1).unique(dim=0, return_counts=True)
    for (key, label), times in zip(pairs.tolist(), n.tolist(), strict=True):
        counts[key, label] = counts.get((key, label), 0) + times
