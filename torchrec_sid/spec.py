"""`SidSpec`: the shape of a Semantic ID, and how one is packed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from torchrec_sid.errors import SidError


@dataclass(frozen=True)
class SidSpec:
    """The cardinalities ``(K_1 .. K_L)`` of a SID, most significant (coarsest) level first.

    Two packed forms follow from the cardinalities alone:

    * **int64** (:meth:`pack`), up to 63 bits: each level takes ``ceil(log2 K_l)`` bits, level 1 in the
      highest, so that a prefix is one shift (:meth:`prefix`). This is what rides in a KeyedJaggedTensor.
    * **bytes** (:meth:`pack_bytes`), any length: the smaller of the int64 form's bits in big-endian
      bytes, and consecutive digits grouped by mixed radix while their product fits a byte
      (five trits a byte: 25 trits are 5 bytes).

    Args:
        cardinalities: number of codes per level, each at least 2.

    Raises:
        SidError: no level, or a cardinality below 2 or above 2**31.

    Example:
        >>> spec = SidSpec((64, 64, 64))
        >>> packed = spec.pack(torch.tensor([[1, 2, 3]]))
        >>> spec.unpack(packed).tolist(), spec.bits, spec.nbytes
        ([[1, 2, 3]], 18, 3)
    """

    cardinalities: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "cardinalities", tuple(int(k) for k in self.cardinalities))
        if not self.cardinalities:
            raise SidError("SidSpec", "no levels", "Give one cardinality per level, e.g. (256, 256).")
        for level, k in enumerate(self.cardinalities):
            if not 2 <= k <= 2**31:
                raise SidError(
                    "SidSpec",
                    f"cardinality {k} at level {level + 1}",
                    "Each level needs 2 to 2**31 codes.",
                )

    @property
    def levels(self) -> int:
        """L, the number of codes in a SID."""
        return len(self.cardinalities)

    @cached_property
    def level_bits(self) -> tuple[int, ...]:
        """Bits of each level in the int64 form."""
        return tuple((k - 1).bit_length() for k in self.cardinalities)

    @property
    def bits(self) -> int:
        """Bits of the int64 form, whether or not it fits."""
        return sum(self.level_bits)

    @property
    def fits_int64(self) -> bool:
        """Whether one SID packs into the 63 value bits of an int64."""
        return self.bits <= 63

    @cached_property
    def shifts(self) -> tuple[int, ...]:
        """Right shift that brings level l to the lowest bits; also the shift of :meth:`prefix`."""
        return tuple(self.bits - sum(self.level_bits[: i + 1]) for i in range(self.levels))

    @cached_property
    def byte_groups(self) -> tuple[tuple[int, int], ...] | None:
        """Half-open ranges of levels that share one byte, or None where big-endian bits are smaller."""
        if max(self.cardinalities) > 256:
            return None
        groups: list[tuple[int, int]] = []
        start = 0
        for stop in range(1, self.levels + 1):
            if stop == self.levels or prod(self.cardinalities[start : stop + 1]) > 256:
                groups.append((start, stop))
                start = stop
        return tuple(groups) if len(groups) <= -(-self.bits // 8) else None

    @property
    def nbytes(self) -> int:
        """Bytes of the packed byte form: what one event costs at rest."""
        return -(-self.bits // 8) if self.byte_groups is None else len(self.byte_groups)

    def validate(self, codes: Tensor, where: str = "codes") -> None:
        """Check shape ``[N, L]``, an integer dtype, and ``0 <= codes[:, l] < K_l``.

        Raises:
            SidError: naming ``where``, the level and the first value at fault.
        """
        if codes.dim() != 2 or codes.shape[1] != self.levels:
            raise SidError(
                where,
                f"shape {tuple(codes.shape)}",
                f"This SidSpec has {self.levels} levels: pass [N, {self.levels}].",
            )
        if codes.dtype.is_floating_point or codes.dtype == torch.bool:
            raise SidError(where, f"dtype {codes.dtype}", "Codes are integers: pass int64.")
        if torch.compiler.is_compiling():  # values are not known in a graph
            return
        if not codes.numel():
            return
        limits = torch.tensor(self.cardinalities, device=codes.device)
        bad = (codes < 0) | (codes >= limits)
        if bool(bad.any()):
            row, level = (int(i) for i in bad.nonzero()[0])
            raise SidError(
                where,
                f"code {int(codes[row, level])} at row {row}, level {level + 1}, "
                f"outside 0..{self.cardinalities[level] - 1}",
                "Encode with the quantizer this spec belongs to.",
            )

    def pack(self, codes: Tensor, *, validate: bool = True) -> Tensor:
        """Codes ``[N, L]`` -> packed SIDs ``[N]`` int64.

        Raises:
            SidError: more than 63 bits (use :meth:`pack_bytes`), or codes outside the alphabet.
        """
        self._require_int64()
        if validate:
            self.validate(codes)
        packed = codes[:, 0].to(torch.int64, copy=True)
        for level in range(1, self.levels):
            packed.bitwise_left_shift_(self.level_bits[level]).bitwise_or_(codes[:, level])
        return packed

    def unpack(self, packed: Tensor) -> Tensor:
        """Packed SIDs ``[N]`` int64 -> codes ``[N, L]`` int64 (not checked against the alphabet)."""
        self._require_int64()
        shifts = torch.tensor(self.shifts, device=packed.device)
        masks = torch.tensor([(1 << b) - 1 for b in self.level_bits], device=packed.device)
        return (packed.unsqueeze(-1) >> shifts) & masks

    def prefix(self, packed: Tensor, depth: int) -> Tensor:
        """The first ``depth`` levels of packed SIDs ``[N]``, as packed int64 of the shorter spec."""
        self._require_int64()
        if not 1 <= depth <= self.levels:
            raise SidError("prefix", f"depth {depth}", f"Choose a depth of 1 to {self.levels}.")
        return packed >> self.shifts[depth - 1]

    def truncated(self, depth: int) -> SidSpec:
        """The spec of the first ``depth`` levels."""
        return SidSpec(self.cardinalities[:depth])

    def pack_bytes(self, codes: Tensor, *, validate: bool = True) -> Tensor:
        """Codes ``[N, L]`` -> ``[N, nbytes]`` uint8."""
        if validate:
            self.validate(codes)
        if self.byte_groups is not None:
            columns = []
            for start, stop in self.byte_groups:
                # The first digit of a group is the least significant: digit i is byte // 3**i % 3.
                value = codes[:, stop - 1].to(torch.int64, copy=True)
                for level in range(stop - 2, start - 1, -1):
                    value.mul_(self.cardinalities[level]).add_(codes[:, level])
                columns.append(value.to(torch.uint8))
            return torch.stack(columns, dim=1)
        bits = torch.cat([_to_bits(codes[:, i], width) for i, width in enumerate(self.level_bits)], dim=1)
        pad = bits.new_zeros(len(bits), self.nbytes * 8 - self.bits)
        weights = 2 ** torch.arange(7, -1, -1, device=bits.device)
        grouped = torch.cat([pad, bits], dim=1).view(len(bits), self.nbytes, 8)
        return (grouped * weights).sum(-1).to(torch.uint8)

    def unpack_bytes(self, data: Tensor) -> Tensor:
        """``[N, nbytes]`` uint8 -> codes ``[N, L]`` int64.

        Raises:
            SidError: the width is not ``nbytes``, or the dtype is not uint8.
        """
        if data.dtype != torch.uint8 or data.dim() != 2 or data.shape[1] != self.nbytes:
            raise SidError(
                "packed bytes",
                f"{data.dtype} of shape {tuple(data.shape)}",
                f"This SidSpec packs into [N, {self.nbytes}] uint8.",
            )
        if self.byte_groups is not None:
            columns = []
            for byte, (start, stop) in enumerate(self.byte_groups):
                rest = data[:, byte].to(torch.int64)
                for level in range(start, stop):
                    k = self.cardinalities[level]
                    columns.append(rest % k if level < stop - 1 else rest)
                    rest = rest // k
            return torch.stack(columns, dim=1)
        shifts = torch.arange(7, -1, -1, device=data.device)
        bits = ((data.unsqueeze(-1).to(torch.int64) >> shifts) & 1).flatten(1)
        bits = bits[:, self.nbytes * 8 - self.bits :]
        levels = bits.split(self.level_bits, dim=1)
        return torch.stack([_from_bits(level) for level in levels], dim=1)

    def _require_int64(self) -> None:
        if not self.fits_int64:
            raise SidError(
                "SidSpec", f"{self.bits} bits do not fit an int64", "Use pack_bytes / unpack_bytes."
            )


def _to_bits(values: Tensor, width: int) -> Tensor:
    shifts = torch.arange(width - 1, -1, -1, device=values.device)
    return (values.to(torch.int64).unsqueeze(-1) >> shifts) & 1


def _from_bits(bits: Tensor) -> Tensor:
    shifts = torch.arange(bits.shape[1] - 1, -1, -1, device=bits.device)
    return (bits << shifts).sum(-1)
