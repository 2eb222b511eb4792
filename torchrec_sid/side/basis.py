"""`FrozenBasis`: an additive decoder of SIDs, frozen, as plain tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from torchrec_sid.errors import SidError
from torchrec_sid.quantizers.base import Quantizer
from torchrec_sid.side.event_layout import FeatureLayout, spec_layout
from torchrec_sid.spec import SidSpec


@dataclass(frozen=True)
class FrozenBasis:
    """A decoder ``x = mean + sum_l T_l[c_l]``: discrete PCA, RQ, PQ, FSQ, or stages of several kinds.

    Args:
        spec: the SIDs it decodes.
        tables: per level ``[1, d]`` (a direction, multiplied by the centred digit ``c - (K - 1) / 2``)
            or ``[K_l, d]`` (a codebook), float32.
        mean: ``[d]``, or None for zero.

    Raises:
        SidError: a tensor that requires grad, or a shape that does not fit the spec.

    Example:
        >>> spec = SidSpec((3,) * 10)
        >>> basis = FrozenBasis.from_digits(spec, torch.randn(10, 64))
        >>> basis.decode(torch.ones(2, 10, dtype=torch.int64)).abs().max().item()  # centre digits
        0.0
    """

    spec: SidSpec
    tables: tuple[Tensor, ...]
    mean: Tensor | None = None

    def __post_init__(self) -> None:
        if len(self.tables) != self.spec.levels:
            raise SidError(
                "FrozenBasis",
                f"{len(self.tables)} tables for {self.spec.levels} levels",
                "Give one per level.",
            )
        dims = {t.shape[-1] for t in self.tables} | (
            {self.mean.shape[-1]} if self.mean is not None else set()
        )
        if len(dims) != 1:
            raise SidError("FrozenBasis", f"dims {sorted(dims)}", "All levels decode into one space.")
        for level, table in enumerate(self.tables):
            k = self.spec.cardinalities[level]
            if table.dim() != 2 or table.shape[0] not in (1, k):
                raise SidError(
                    "FrozenBasis",
                    f"table of shape {tuple(table.shape)} at level {level + 1} with {k} codes",
                    f"Pass [1, d] for a digit or [{k}, d] for a codebook.",
                )
        for tensor in (*self.tables, *(() if self.mean is None else (self.mean,))):
            if tensor.requires_grad:
                raise SidError(
                    "FrozenBasis",
                    "a basis that requires grad",
                    "Code space is fixed: pass basis.detach() of a quantizer whose training is over.",
                )
            if not bool(torch.isfinite(tensor).all()):
                raise SidError("FrozenBasis", "NaN or inf in the basis", "Fit the quantizer again.")

    @classmethod
    def from_digits(cls, spec: SidSpec, basis: Tensor, mean: Tensor | None = None) -> FrozenBasis:
        """A linear decoder of centred digits, e.g. discrete PCA's.

        Args:
            spec: cardinalities of the ``C`` digits.
            basis: ``[C, d]``, the direction of each digit times its scale.
            mean: ``[d]`` or None.
        """
        if basis.dim() != 2 or basis.shape[0] != spec.levels:
            raise SidError(
                "FrozenBasis",
                f"basis of shape {tuple(basis.shape)} for {spec.levels} digits",
                f"Pass [{spec.levels}, d].",
            )
        return cls(spec, tuple(basis.float().split(1)), None if mean is None else mean.float())

    @classmethod
    def from_codebooks(cls, codebooks: Sequence[Tensor], mean: Tensor | None = None) -> FrozenBasis:
        """A sum of codebook rows, e.g. residual quantization's.

        Args:
            codebooks: per level ``[K_l, d]``.
            mean: ``[d]`` or None.
        """
        spec = SidSpec(tuple(len(book) for book in codebooks))
        return cls(spec, tuple(b.float() for b in codebooks), None if mean is None else mean.float())

    @classmethod
    def from_quantizer(cls, quantizer: Quantizer) -> FrozenBasis:
        """The additive decoder of a quantizer: that of its latent where networks decode one.

        Args:
            quantizer: fitted.

        Raises:
            SidError: not fitted, or its decoder is not a sum over levels.
        """
        decoder = quantizer.additive_decoder()
        return cls(quantizer.spec, decoder.tables, decoder.mean)

    @property
    def dim(self) -> int:
        """d, the dimension of the decoded space."""
        return self.tables[0].shape[-1]

    @cached_property
    def layout(self) -> FeatureLayout:
        """How packed events of this spec expand to features."""
        linear = tuple(len(table) == 1 for table in self.tables)
        return spec_layout(self.spec, linear)

    def rows(self) -> Tensor:
        """``[F, d]`` float32: what each feature of :attr:`layout` adds to the decoded vector."""
        layout = self.layout
        rows = torch.zeros(layout.num_features, self.dim)
        groups = self.spec.byte_groups or tuple((i, i + 1) for i in range(self.spec.levels))
        for column, start, (first, stop) in zip(layout.columns, layout.starts, groups, strict=True):
            if column.is_digits:
                rows[start : start + stop - first] = torch.cat([t.cpu() for t in self.tables[first:stop]])
                continue
            rest = torch.arange(column.values)
            for level in range(first, stop):
                k = self.spec.cardinalities[level]
                rows[start : start + column.values] += self.values(level)[rest % k]
                rest = rest // k
        return rows

    def decode(self, codes: Tensor) -> Tensor:
        """Codes ``[N, L]`` -> ``[N, d]`` float32, on the CPU."""
        total = (
            torch.zeros(len(codes), self.dim)
            if self.mean is None
            else self.mean.cpu().expand(len(codes), -1)
        )
        for level in range(self.spec.levels):
            total = total + self.values(level)[codes[:, level]]
        return total

    def values(self, level: int) -> Tensor:
        """``[K_l, d]``: what each code of a level adds to the decoded vector."""
        table, k = self.tables[level].cpu(), self.spec.cardinalities[level]
        if len(table) == k:
            return table
        return (torch.arange(k).float() - (k - 1) / 2)[:, None] * table


def as_bytes(spec: SidSpec, sids: Tensor, where: str = "sids") -> Tensor:
    """Bring SIDs of any form to packed bytes ``[N, nbytes]`` uint8.

    Args:
        spec: their shape.
        sids: ``[N, nbytes]`` uint8 (returned as is), ``[N]`` int64 packed, or ``[N, L]`` int64 codes.
        where: what to call them in an error.

    Raises:
        SidError: another shape or dtype, or codes outside the alphabet.
    """
    if sids.dtype == torch.uint8 and sids.dim() == 2 and sids.shape[1] == spec.nbytes:
        return sids
    if sids.dtype == torch.int64 and sids.dim() == 1 and spec.fits_int64:
        return spec.pack_bytes(spec.unpack(sids))
    if sids.dtype == torch.int64 and sids.dim() == 2 and sids.shape[1] == spec.levels:
        return spec.pack_bytes(sids)
    raise SidError(
        where,
        f"{sids.dtype} of shape {tuple(sids.shape)}",
        f"Pass packed bytes [N, {spec.nbytes}] uint8"
        + (", packed SIDs [N] int64" if spec.fits_int64 else "")
        + f", or codes [N, {spec.levels}] int64.",
    )
