"""The schemes: which rows of which tables a SID addresses, as frozen configurations.

A scheme turns one item into a fixed number of rows. It describes them as *columns*, each a range of
levels that picks one row of one table; the transform evaluates the columns, TorchRec's collections
look the rows up and sum them.

The row a range of levels ``(c_s .. c_e)`` picks is, where the table has room for every combination, its
mixed-radix rank plus the first row of the range: distinct combinations never share a row. For the
prefixes ``1 .. n`` of a SID of equal cardinalities K this is the enumeration
``sum_{t<=i} K^{i-t} (c_t + 1) - 1`` of prefix n-grams (arXiv 2504.02137). Beyond that it is a seeded hash.

Every table keeps its last row for the unknown item, the packed SID -1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from torchrec_sid.errors import SidError
from torchrec_sid.hashing import splitmix64
from torchrec_sid.spec import SidSpec
from torchrec_sid.tables.catalog_map import CatalogMap
from torchrec_sid.tables.indexers import IdIndexer, Indexer
from torchrec_sid.tables.scheme_registry import Scheme
from torchrec_sid.tables.slots import MAX_ROWS, LevelRange, Slot, place


@dataclass(frozen=True)
class HashedPrefix(Scheme):
    """Prefix n-grams (arXiv 2504.02137): one row for each of the first ``depth`` prefixes of a SID.

    Prefixes are enumerated without collision, coarsest first, as long as they fill at most half of the
    table (or all fit); the deeper ones are hashed into the rows that remain, so that a rare deep prefix
    never disturbs a frequent coarse one.

    Args:
        depth: number of prefixes, 1 to the levels of the SID.
        num_embeddings: most rows of the table, or of each table where ``separate``; fewer are made
            where the enumeration needs fewer. None: a row for every prefix, without collision.
        separate: one table per depth instead of a shared one.
        seed: seed of the hash.

    Raises:
        SidError: a depth, number of rows or seed that makes no sense.

    Example:
        >>> slot, = HashedPrefix(depth=2).slots(SidSpec((4, 4)))
        >>> slot.rows  # 4 + 16 prefixes, and the unknown item
        21
    """

    depth: int
    num_embeddings: int | None = None
    separate: bool = False
    seed: int = 0
    label: ClassVar[str] = "prefix"

    def __post_init__(self) -> None:
        _check_positive("HashedPrefix", depth=self.depth)
        _check_rows("HashedPrefix", self.num_embeddings)

    @classmethod
    def for_rows(cls, spec: SidSpec, rows: int) -> HashedPrefix:
        """Every prefix of the SID, in one table."""
        return cls(spec.levels, rows)

    def slots(self, spec: SidSpec) -> tuple[Slot, ...]:
        """The tables and columns for SIDs of this shape."""
        if self.depth > spec.levels:
            raise SidError(
                "HashedPrefix",
                f"depth {self.depth}",
                f"This SID has {spec.levels} levels: use at most that.",
            )
        ranges = [(0, stop) for stop in range(1, self.depth + 1)]
        return place(ranges, spec, self.num_embeddings, self.separate, self.seed, "depth")


@dataclass(frozen=True)
class PerLevel(Scheme):
    """One row per level, ``c_l``: the unigrams of arXiv 2306.08121. Never hashed.

    Args:
        depth: number of levels used; None: all.
        separate: one table per level; otherwise one table holds the levels one after another.

    Example:
        >>> PerLevel().slots(SidSpec((4, 8)))[0].rows
        13
    """

    depth: int | None = None
    separate: bool = False
    label: ClassVar[str] = "level"

    def __post_init__(self) -> None:
        if self.depth is not None:
            _check_positive("PerLevel", depth=self.depth)

    @classmethod
    def for_rows(cls, spec: SidSpec, rows: int) -> PerLevel:
        """Every level; it never hashes."""
        return cls()

    def slots(self, spec: SidSpec) -> tuple[Slot, ...]:
        """The tables and columns for SIDs of this shape."""
        depth = _depth_of("PerLevel", self.depth, spec)
        return place([(i, i + 1) for i in range(depth)], spec, None, self.separate, 0, "level")


@dataclass(frozen=True)
class NGramGroups(Scheme):
    """One row per group of ``n`` consecutive levels: the n-grams of arXiv 2306.08121.

    With ``stride=None`` the groups do not overlap (the last one may be shorter); ``stride=1`` takes every
    n-gram ("all bigrams" of arXiv 2504.02137), and ``depth=n`` only the first ("trigram", "fourgram").

    Args:
        n: levels per group.
        stride: levels from the start of a group to that of the next; None: n.
        depth: number of levels used; None: all.
        num_embeddings: as in :class:`HashedPrefix`; None: a row for every combination.
        separate: one table per group instead of a shared one.
        seed: seed of the hash.
    """

    n: int
    stride: int | None = None
    depth: int | None = None
    num_embeddings: int | None = None
    separate: bool = False
    seed: int = 0
    label: ClassVar[str] = "ngram"

    def __post_init__(self) -> None:
        _check_positive("NGramGroups", n=self.n)
        if self.stride is not None:
            _check_positive("NGramGroups", stride=self.stride)
            if self.stride > self.n:
                raise SidError("NGramGroups", f"stride={self.stride} above n={self.n}", "It skips levels.")
        if self.depth is not None:
            _check_positive("NGramGroups", depth=self.depth)
        _check_rows("NGramGroups", self.num_embeddings)

    @classmethod
    def for_rows(cls, spec: SidSpec, rows: int) -> NGramGroups:
        """Bigrams that do not overlap."""
        return cls(2, num_embeddings=rows)

    def slots(self, spec: SidSpec) -> tuple[Slot, ...]:
        """The tables and columns for SIDs of this shape."""
        depth = _depth_of("NGramGroups", self.depth, spec)
        ranges = list(self._groups(depth))
        return place(ranges, spec, self.num_embeddings, self.separate, self.seed, "group")

    def _groups(self, depth: int) -> Iterator[tuple[int, int]]:
        for start in range(0, depth, self.stride or self.n):
            yield start, min(start + self.n, depth)
            # A later window would only repeat the tail of this one.
            if start + self.n >= depth:
                return


@dataclass(frozen=True)
class HashedId(Scheme):
    """One row per item by hashing its id: the memory table beside a table that generalises.

    It hashes the value as it came in: the raw id where the collection has a catalog for the feature,
    the whole SID otherwise.

    Args:
        num_embeddings: rows of the table.
        seed: seed of the hash.
    """

    num_embeddings: int
    seed: int = 0
    label: ClassVar[str] = "id"

    def __post_init__(self) -> None:
        _check_rows("HashedId", self.num_embeddings)

    @classmethod
    def for_rows(cls, spec: SidSpec, rows: int) -> HashedId:
        """One table of these rows."""
        return cls(rows)

    def slots(self, spec: SidSpec) -> tuple[Slot, ...]:
        """The one table and its one column."""
        usable = self.num_embeddings - 1
        column = LevelRange(0, spec.levels, 0, usable, splitmix64(self.seed), exact=False)
        return (Slot("", self.num_embeddings, (column,), 1.0),)

    def indexer(
        self, slot: Slot, spec: SidSpec, catalog: CatalogMap | None, device: torch.device
    ) -> Indexer:
        """A hash of the raw id, or of the whole SID without a catalog."""
        return IdIndexer(slot, raw_ids=catalog is not None)


def _depth_of(scheme: str, depth: int | None, spec: SidSpec) -> int:
    if depth is not None and depth > spec.levels:
        raise SidError(scheme, f"depth {depth}", f"This SID has {spec.levels} levels: use at most that.")
    return depth or spec.levels


def _check_positive(scheme: str, **values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise SidError(scheme, f"{name}={value}", f"{name} is at least 1.")


def _check_rows(scheme: str, num_embeddings: int | None) -> None:
    if num_embeddings is not None and not 2 <= num_embeddings <= MAX_ROWS:
        raise SidError(
            scheme,
            f"num_embeddings={num_embeddings}",
            f"A table has 2 to {MAX_ROWS} rows, one of them for the unknown item.",
        )
