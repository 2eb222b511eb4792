"""What the diagnostics say: per level, per prefix depth, and a verdict in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from torchrec_sid.artifact.typed import read_typed
from torchrec_sid.spec import SidSpec

VerdictName = Literal["healthy", "collapsed", "nearly unique", "too coarse"]


@dataclass(frozen=True)
class LevelQuality:
    """One level, alone."""

    level: int
    """1 is the coarsest."""
    cardinality: int
    """Codes there are."""
    used: int
    """Codes that at least one item has."""
    perplexity: float
    """exp of the entropy of the codes: how many equally popular codes would be as diverse."""
    fvu: float
    """Fraction of the held-out variance unexplained after this level."""


@dataclass(frozen=True)
class PrefixQuality:
    """The groups of items that share their first ``depth`` codes: one point of the sharing curve."""

    depth: int
    groups: int
    """Prefixes that at least one item has."""
    items_per_prefix: float
    """Items by groups."""
    mates: float
    """Other items that share the prefix of an item, on average over items."""
    cosine: float | None
    """Mean cosine of two items in one group, over all such pairs; None where no two items share one."""
    cosine_exact: bool
    """False where the cosine comes from a uniform sample of the groups."""
    purity: dict[str, float]
    """By label: share of items that carry the commonest label of their group."""


@dataclass(frozen=True)
class Verdict:
    """The report in words."""

    name: VerdictName
    text: str


@dataclass(frozen=True)
class QualityReport:
    """What :func:`~torchrec_sid.quality.measure_quality` returns."""

    held_out: int
    """Embeddings that the errors were measured on."""
    items: int
    """Items that usage, prefixes and collisions were measured on."""
    cardinalities: tuple[int, ...]
    bits: int
    nbytes: int
    """Bytes of one SID at rest."""
    fvu: float
    """Fraction of the held-out variance unexplained by full SIDs."""
    unique: int
    """Different full SIDs."""
    collision_rate: float
    """Share of items whose full SID belongs to another item too."""
    random_cosine: float
    """Mean cosine of two items at random: what ``cosine`` of a prefix is to be held against."""
    levels: tuple[LevelQuality, ...]
    prefixes: tuple[PrefixQuality, ...]
    verdict: Verdict

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QualityReport:
        """Back from :meth:`to_dict`; other values beside them are left out."""
        return read_typed(cls, {f.name: values[f.name] for f in fields(cls) if f.name in values})


def judge(
    spec: SidSpec,
    items: int,
    fvu: float,
    random_cosine: float,
    levels: tuple[LevelQuality, ...],
    prefixes: tuple[PrefixQuality, ...],
) -> Verdict:
    """Name the worst fault of the SIDs, or none.

    * collapsed: a level's perplexity is under 15% of the codes it could use;
    * too coarse: full SIDs leave over 90% of the variance, or pairs that share a full SID cover less than
      30% of the way from a random pair's cosine to 1;
    * nearly unique: fewer than two items per prefix from depth 2 on (depth 1 where there is one level).

    The thresholds are ours.
    """
    shared = ", ".join(f"{p.items_per_prefix:,.1f} at depth {p.depth}" for p in prefixes[:4])
    for level in levels:
        possible = min(level.cardinality, max(items, 1))
        if possible > 2 and level.perplexity < 0.15 * possible:
            return Verdict(
                "collapsed",
                f"Level {level.level} uses {level.used} of {level.cardinality} codes with a perplexity of "
                f"{level.perplexity:.1f}: most items fall into few codes. Look for duplicates and "
                f"outliers among the embeddings; the fit must see items like these.",
            )
    last = prefixes[-1]
    lift = None if last.cosine is None else (last.cosine - random_cosine) / max(1 - random_cosine, 1e-6)
    if fvu > 0.9 or (lift is not None and lift < 0.3):
        return Verdict(
            "too coarse",
            f"Full SIDs leave {fvu:.0%} of the held-out variance"
            + ("" if last.cosine is None else f"; two items of one SID have cosine {last.cosine:.2f}")
            + f", two at random {random_cosine:.2f}. Give more levels or more codes per level.",
        )
    first, second = prefixes[0], next((p for p in prefixes if p.depth >= 2), last)
    if first.items_per_prefix < 2 or (spec.levels > 1 and second.items_per_prefix < 2):
        grouping = "No prefix groups" if first.items_per_prefix < 2 else "Only level 1 groups"
        return Verdict(
            "nearly unique",
            f"{grouping} items (items per prefix: {shared}); longer prefixes are item ids under another "
            f"name, through which items share little. Fewer codes per level let more levels share.",
        )
    return Verdict(
        "healthy",
        f"Every level is in use, full SIDs leave {fvu:.1%} of the held-out variance, and prefixes group "
        f"items (items per prefix: {shared}).",
    )
