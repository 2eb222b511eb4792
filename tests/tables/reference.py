"""Slow, obvious references in Python integers and dictionaries: no tensor operation, nothing shared."""

from __future__ import annotations

from itertools import product

MASK = (1 << 64) - 1


def splitmix(state: int) -> int:
    z = (state + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def hashed(key: int, salt: int, rows: int) -> int:
    """The two multiplying rounds of splitmix64, the high word scaled to the range."""
    z = (key + salt) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return (z >> 32) * rows >> 32


def pack(codes: tuple[int, ...], cardinalities: tuple[int, ...]) -> int:
    value = 0
    for code, k in zip(codes, cardinalities, strict=True):
        value = value << (k - 1).bit_length() | code
    return value


class TableOfRanges:
    """One table addressed by ranges of levels, as a dictionary from combination to row.

    Rows are given out range by range, in the order of the codes, while half of the table (or all
    ranges) holds them; the ranges after that are hashed into what remains. The last row is the unknown
    item's.
    """

    def __init__(self, ranges, cardinalities, num_embeddings, seed=0, first=0):
        sizes = []
        for start, stop in ranges:
            size = 1
            for k in cardinalities[start:stop]:
                size *= k
            sizes.append(size)
        fits = num_embeddings is None or sum(sizes) + 1 <= num_embeddings
        self.rows = sum(sizes) + 1 if fits else num_embeddings
        self.ranges, self.cardinalities, self.seed, self.first = ranges, cardinalities, seed, first
        self.row_of = {}
        for j, (start, stop) in enumerate(ranges):
            if not fits and 2 * sum(sizes[: j + 1]) > self.rows:
                break
            for codes in product(*[range(k) for k in cardinalities[start:stop]]):
                self.row_of[j, codes] = len(self.row_of)

    def of(self, codes: tuple[int, ...] | None) -> list[int]:
        """Rows of one item, None for the unknown one."""
        if codes is None:
            return [self.rows - 1] * len(self.ranges)
        rows = []
        for j, (start, stop) in enumerate(self.ranges):
            part = tuple(codes[start:stop])
            if (j, part) in self.row_of:
                rows.append(self.row_of[j, part])
            else:
                base = len(self.row_of)
                salt = splitmix(splitmix(self.seed) + self.first + j)
                key = pack(part, self.cardinalities[start:stop])
                rows.append(base + hashed(key, salt, self.rows - 1 - base))
        return rows


def ranges_of(scheme, levels: int) -> list[tuple[int, int]]:
    """Ranges of levels of a scheme, by its published definition."""
    kind = type(scheme).__name__
    if kind == "HashedPrefix":
        return [(0, i) for i in range(1, scheme.depth + 1)]
    depth = scheme.depth or levels
    if kind == "PerLevel":
        return [(i, i + 1) for i in range(depth)]
    ranges, start = [], 0
    while True:
        ranges.append((start, min(start + scheme.n, depth)))
        if start + scheme.n >= depth:
            return ranges
        start += scheme.stride or scheme.n


def tables_of(scheme, cardinalities: tuple[int, ...]) -> list[TableOfRanges]:
    """The tables of a scheme of level ranges."""
    ranges = ranges_of(scheme, len(cardinalities))
    num, seed = getattr(scheme, "num_embeddings", None), getattr(scheme, "seed", 0)
    if not scheme.separate:
        return [TableOfRanges(ranges, cardinalities, num, seed)]
    return [TableOfRanges([r], cardinalities, num, seed, i) for i, r in enumerate(ranges)]
