"""Slots and ranges of levels: what a scheme says about the rows that a SID addresses."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

from torchrec_sid.errors import SidError
from torchrec_sid.hashing import splitmix64
from torchrec_sid.spec import SidSpec

MAX_ROWS = 2**31 - 1
"""Most rows that one table can have: what the hash can address exactly."""


class LevelRange(NamedTuple):
    """One row per item: the levels ``start .. stop - 1`` of its SID, as a row of a table."""

    start: int
    """First level, from 0."""
    stop: int
    """One past the last level."""
    base: int
    """First row of the range this column picks from."""
    rows: int
    """Rows in that range."""
    salt: int
    """Salt of the hash; unused where ``exact``."""
    exact: bool
    """Whether every combination has a row of its own."""


class Slot(NamedTuple):
    """One physical table and the columns that address it."""

    suffix: str
    """What tells this table from its siblings of the same feature; empty for an only child."""
    rows: int
    """Rows of the table, the unknown item's included."""
    columns: tuple[LevelRange, ...]
    """Columns, one look-up per item each; none where their number varies from item to item."""
    rows_per_item: float
    """Mean number of rows that one item reads."""

    @property
    def exact_rows(self) -> int:
        """Rows addressed without collision."""
        return sum(column.rows for column in self.columns if column.exact)


def place(
    ranges: list[tuple[int, int]],
    spec: SidSpec,
    num_embeddings: int | None,
    separate: bool,
    seed: int,
    word: str,
) -> tuple[Slot, ...]:
    """Lay ranges of levels out in one shared table, or in one table each."""
    if not separate or len(ranges) == 1:
        return (_fill("", ranges, spec, num_embeddings, seed, 0),)
    return tuple(
        _fill(f"{word}{i + 1}", [levels], spec, num_embeddings, seed, i) for i, levels in enumerate(ranges)
    )


def _fill(
    suffix: str,
    ranges: list[tuple[int, int]],
    spec: SidSpec,
    num_embeddings: int | None,
    seed: int,
    first: int,
) -> Slot:
    sizes = [prod(spec.cardinalities[start:stop]) for start, stop in ranges]
    needed = sum(sizes) + 1
    if num_embeddings is None and needed > MAX_ROWS:
        raise SidError(
            "num_embeddings", f"{needed} rows for every combination", "Give num_embeddings, to hash them."
        )
    if num_embeddings is None or needed <= num_embeddings:
        exact, rows = len(ranges), needed
    else:
        rows = num_embeddings
        exact = sum(1 for i in range(len(sizes)) if 2 * sum(sizes[: i + 1]) <= rows)
    base = sum(sizes[:exact])
    columns = []
    for i, (start, stop) in enumerate(ranges):
        salt = splitmix64(splitmix64(seed) + first + i)
        if i < exact:
            columns.append(LevelRange(start, stop, sum(sizes[:i]), sizes[i], salt, exact=True))
        else:
            columns.append(LevelRange(start, stop, base, rows - 1 - base, salt, exact=False))
    return Slot(suffix, rows, tuple(columns), float(len(columns)))
