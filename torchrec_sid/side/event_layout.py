"""`FeatureLayout`: which numbers the columns of a packed event stand for.

An event at rest is a row of bytes: the packed SID, then one byte per event term (action, age bucket).
A column is read in one of two ways:

* **digits**: mixed-radix digits, the first least significant, each standing for its centred value
  ``c - (K - 1) / 2`` (five trits: ``-1, 0, 1`` each);
* **one-hot**: the value itself, one feature per value (a codebook index, an action type).

The features of all columns, digits first, form the vector ``phi`` of an event. Every frozen decoder of
this package is linear in it: ``x = mean + rows^T phi``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod

import torch
from torch import Tensor

from torchrec_sid.errors import SidError
from torchrec_sid.spec import SidSpec


@dataclass(frozen=True)
class EventColumn:
    """One column of an event.

    Args:
        radices: cardinalities of the digits in it, least significant first; empty for one-hot.
        values: how many values it may take, ``0 .. values - 1``.
    """

    radices: tuple[int, ...]
    values: int

    @property
    def is_digits(self) -> bool:
        """Whether it is read as digits rather than one-hot."""
        return bool(self.radices)


def digits_column(radices: tuple[int, ...]) -> EventColumn:
    """A column of mixed-radix digits, e.g. ``(3, 3, 3, 3, 3)``."""
    return EventColumn(tuple(radices), prod(radices))


def one_hot_column(values: int) -> EventColumn:
    """A column that indexes ``values`` rows of a table."""
    return EventColumn((), values)


@dataclass(frozen=True)
class FeatureLayout:
    """The columns of an event and the features they expand to.

    Features are ordered: digit columns in column order, each padded with zeros to the widest
    (:attr:`digit_width`), then one-hot columns in column order, ``values`` features each.

    Example:
        >>> layout = FeatureLayout((digits_column((3, 3)), one_hot_column(4)))
        >>> layout.text, layout.num_features
        ('3x3,#4', 6)
        >>> layout.expand(torch.tensor([[5, 2]], dtype=torch.uint8)).tolist()
        [[1.0, 0.0, 0.0, 0.0, 1.0, 0.0]]
    """

    columns: tuple[EventColumn, ...]

    @cached_property
    def text(self) -> str:
        """The layout as a short string, the form in which it travels in an exported graph."""
        return ",".join(
            "x".join(map(str, c.radices)) if c.is_digits else f"#{c.values}" for c in self.columns
        )

    @staticmethod
    @lru_cache(maxsize=256)
    def parse(text: str) -> FeatureLayout:
        """The inverse of :attr:`text`; the same text gives the same object.

        Raises:
            SidError: a text that no layout has.
        """
        columns = []
        for part in text.split(","):
            one_hot, numbers = part.startswith("#"), part.removeprefix("#").split("x")
            fits = all(number.isascii() and number.isdigit() and len(number) < 10 for number in numbers)
            values = [int(number) for number in numbers] if fits else []
            if one_hot and len(values) == 1 and values[0] >= 1:
                columns.append(one_hot_column(values[0]))
            elif not one_hot and values and min(values) >= 2 and prod(values) <= 256:
                columns.append(digits_column(tuple(values)))
            else:
                raise SidError(
                    "layout",
                    f"{part!r} in {text[:80]!r}",
                    "Pass FeatureLayout.text: digits within a byte (3x3x3x3x3), or one-hot (#256).",
                )
        return FeatureLayout(tuple(columns))

    @cached_property
    def digit_columns(self) -> tuple[int, ...]:
        """Indices of the columns read as digits."""
        return tuple(i for i, c in enumerate(self.columns) if c.is_digits)

    @cached_property
    def one_hot_columns(self) -> tuple[int, ...]:
        """Indices of the columns read one-hot."""
        return tuple(i for i, c in enumerate(self.columns) if not c.is_digits)

    @cached_property
    def digit_width(self) -> int:
        """Features per digit column."""
        return max((len(c.radices) for c in self.columns), default=0)

    @property
    def digit_features(self) -> int:
        """Features of all digit columns together."""
        return len(self.digit_columns) * self.digit_width

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """First feature of each column."""
        starts = [0] * len(self.columns)
        at = 0
        for i in (*self.digit_columns, *self.one_hot_columns):
            starts[i] = at
            at += self.digit_width if self.columns[i].is_digits else self.columns[i].values
        return tuple(starts)

    @cached_property
    def num_features(self) -> int:
        """F, the length of ``phi``."""
        return self.digit_features + sum(self.columns[i].values for i in self.one_hot_columns)

    @property
    def is_bytes(self) -> bool:
        """Whether every column fits a byte; otherwise events are int32 codes."""
        return all(c.values <= 256 for c in self.columns)

    @property
    def event_dtype(self) -> torch.dtype:
        """Type of an event row: uint8, or int32 where a column needs more than a byte."""
        return torch.uint8 if self.is_bytes else torch.int32

    def with_terms(self, *sizes: int) -> FeatureLayout:
        """The layout with one-hot columns of these sizes appended."""
        return FeatureLayout(self.columns + tuple(one_hot_column(size) for size in sizes))

    def digit_table(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """``[D, 256, digit_width]``: features of each byte of each digit column; cached.

        ``D`` is 1 where all digit columns are alike. Bytes outside the alphabet give NaN, so that a
        corrupt event can never become a plausible number.
        """
        return _digit_table(self, dtype, device)

    @cached_property
    def shares_digit_table(self) -> bool:
        """Whether all digit columns have the same radices."""
        return len({self.columns[i].radices for i in self.digit_columns}) <= 1

    def expand(self, events: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Events ``[..., S]`` -> features ``[..., F]``; digits outside the alphabet become NaN.

        Raises:
            IndexError: a one-hot column outside its values.
        """
        parts = [self.expand_digits(events, dtype)]
        for i in self.one_hot_columns:
            parts.append(
                torch.nn.functional.one_hot(events[..., i].long(), self.columns[i].values).to(dtype)
            )
        return torch.cat(parts, dim=-1)

    def expand_digits(self, events: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Events ``[..., S]`` -> the features of the digit columns ``[..., digit_features]``."""
        shape = events.shape[:-1]
        if not self.digit_columns:
            return torch.empty(*shape, 0, dtype=dtype, device=events.device)
        first, count = self.digit_columns[0], len(self.digit_columns)
        if self.digit_columns == tuple(range(first, first + count)):
            data = events[..., first : first + count]
        else:
            data = events[..., list(self.digit_columns)]
        index = data.to(torch.int32)
        if not self.shares_digit_table:
            index = index + torch.arange(0, 256 * count, 256, dtype=torch.int32, device=events.device)
        table = self.digit_table(dtype, events.device).view(-1, self.digit_width)
        return torch.nn.functional.embedding(index, table).view(*shape, self.digit_features)


@lru_cache(maxsize=64)
def _digit_table(layout: FeatureLayout, dtype: torch.dtype, device: torch.device) -> Tensor:
    kinds = [layout.columns[i] for i in layout.digit_columns]
    if layout.shares_digit_table:
        kinds = kinds[:1]
    table = torch.zeros(len(kinds), 256, layout.digit_width, dtype=dtype)
    for row, column in enumerate(kinds):
        rest = torch.arange(256)
        for j, k in enumerate(column.radices):
            table[row, :, j] = (rest % k - (k - 1) / 2).to(dtype)
            rest = rest // k
        table[row, column.values :] = torch.nan
    return table.to(device)


def spec_layout(spec: SidSpec, linear: tuple[bool, ...]) -> FeatureLayout:
    """The layout of a spec's packed bytes.

    Args:
        spec: the SID.
        linear: per level, whether its decoder is linear in the centred digit; a byte whose levels all
            are becomes a digits column, any other a one-hot column over the values of the byte.
    """
    if spec.byte_groups is None:
        return FeatureLayout(tuple(one_hot_column(k) for k in spec.cardinalities))
    columns = []
    for start, stop in spec.byte_groups:
        radices = spec.cardinalities[start:stop]
        columns.append(digits_column(radices) if all(linear[start:stop]) else one_hot_column(prod(radices)))
    return FeatureLayout(tuple(columns))


def event_columns(spec: SidSpec, data: Tensor) -> Tensor:
    """Packed bytes ``[E, nbytes]`` uint8 -> the columns of :func:`spec_layout`, ``[E, S]``.

    The bytes themselves where levels are grouped by byte; otherwise one code per level, uint8 where all
    fit, else int32.
    """
    if spec.byte_groups is not None:
        return data
    if spec.fits_int64:
        packed = torch.zeros(data.shape[0], dtype=torch.int64, device=data.device)
        for byte in range(spec.nbytes):
            packed = (packed << 8) | data[:, byte]
        codes = spec.unpack(packed)
    else:
        codes = spec.unpack_bytes(data)
    return codes.to(torch.uint8 if max(spec.cardinalities) <= 256 else torch.int32)
