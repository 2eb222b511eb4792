"""`SideFeatures`: the parameter-free vector of a SID."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import Tensor, nn

from torchrec_sid.devices import FrozenState, buffer_device
from torchrec_sid.errors import SidError
from torchrec_sid.side.basis import FrozenBasis, as_bytes
from torchrec_sid.spec import SidSpec

Kind = Literal["digits", "one_hot", "basis"]


@dataclass(frozen=True)
class SideFeaturesConfig:
    """Which features, and how they are scaled.

    ``digits``: one centred number per level, ``phi = s_l (c_l - (K_l - 1) / 2)``, odd alphabets only.
    ``one_hot``: ``K`` indicators per level, or ``K - 1`` with the centre code left out
    (``[q = 1; q = -1]`` for trits). ``basis``: the decoded vector, mean left out.
    """

    kind: Kind = "digits"
    keep_centre: bool = False
    """One-hot: give the centre code of an odd alphabet its own indicator."""
    centred: bool = True
    """Subtract the mean feature, so that an average item is the origin. Uncentred one-hot features
    carry a large constant direction that hurts what is learned on top."""

    def __post_init__(self) -> None:
        if self.kind not in ("digits", "one_hot", "basis"):
            raise SidError("SideFeaturesConfig.kind", repr(self.kind), "Choose digits, one_hot or basis.")


class SideFeatures(FrozenState):
    """SIDs -> features ``[N, dim]`` float32, by frozen constants: buffers only, no look-up table to learn.

    Scaled so that ``E |phi|^2 = dim``, and centred, under the code distribution: uniform unless
    :meth:`calibrate` is given codes.

    Args:
        spec: the SIDs.
        config: which features.
        basis: the decoder; needed for ``basis``, and gives ``digits`` their scales ``s_l`` (the length of
            the direction of each digit). Without it every ``s_l`` is 1.
        device: of the buffers; the meta device is not honoured, since frozen state has no initialiser.

    Raises:
        SidError: ``digits`` of an even alphabet, ``basis`` without a basis, a basis of another spec.

    Example:
        >>> side = SideFeatures(SidSpec((3,) * 25))
        >>> side(torch.randint(3, (8, 25))).shape
        torch.Size([8, 25])
    """

    table: Tensor
    center: Tensor
    scale: Tensor
    _starts: Tensor
    _limits: Tensor

    def __init__(
        self,
        spec: SidSpec,
        config: SideFeaturesConfig | None = None,
        *,
        basis: FrozenBasis | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.config = config or SideFeaturesConfig()
        if basis is not None and basis.spec != spec:
            raise SidError(
                "SideFeatures", "a basis of another spec", "Pass the spec the basis was made for."
            )
        tables = self._level_tables(basis)
        self.dim = tables[0].shape[1]
        device = buffer_device(device)
        groups = spec.byte_groups
        if groups is None:
            rows = tables
        else:
            rows = [_byte_table(tables[a:b], spec.cardinalities[a:b]) for a, b in groups]
        starts = torch.tensor([0] + [len(r) for r in rows[:-1]]).cumsum(0).to(torch.int32)
        # Rows of one SID sum to its features, centred and scaled: one pass over the output.
        self.register_buffer("table", torch.cat(rows).to(device))
        self.register_buffer("_starts", starts.to(device), persistent=False)
        self.register_buffer("_limits", _limits(spec).to(device), persistent=False)
        # The uniform distribution: levels are independent, so means and variances add.
        mean = torch.stack([t.mean(0) for t in tables]).sum(0)
        second = sum(float(t.var(0, unbiased=False).sum()) for t in tables)
        if not self.config.centred:
            second += float(mean.square().sum())
            mean = torch.zeros_like(mean)
        self.register_buffer("center", torch.zeros(self.dim, device=device))
        self.register_buffer("scale", torch.ones((), device=device))
        self._set(mean, (self.dim / max(second, 1e-30)) ** 0.5)

    @torch.no_grad()
    def calibrate(self, sids: Tensor) -> SideFeatures:
        """Set centre and scale from SIDs that occur (the catalog, or impressions), instead of uniform.

        Args:
            sids: in any form :meth:`forward` takes.
        """
        if not len(sids):
            raise SidError("SideFeatures.calibrate", "no SIDs", "Pass the SIDs of a catalog.")
        raw = self(sids).double() / self.scale.double() + self.center.double()
        mean = raw.mean(0) if self.config.centred else torch.zeros_like(raw[0])
        second = (raw - mean).square().sum(1).mean()
        if float(second) <= 0:
            raise SidError(
                "SideFeatures.calibrate", "SIDs that are all equal", "Pass the SIDs of a catalog."
            )
        self._set(mean, float((self.dim / second).sqrt()))
        return self

    def _set(self, center: Tensor, scale: float) -> None:
        """Move and stretch the table from its present centre and scale to new ones."""
        columns = len(self._limits)
        raw = self.table.double() / self.scale.double() + self.center.double() / columns
        self.center.copy_(center)
        self.scale.fill_(scale)
        self.table.copy_((raw - self.center.double() / columns) * self.scale.double())

    def forward(self, sids: Tensor) -> Tensor:
        """SIDs -> ``[N, dim]`` float32. A jagged history is its flat values: one row per event.

        Args:
            sids: ``[N, nbytes]`` uint8, ``[N]`` int64 packed, or ``[N, L]`` int64 codes; a dense history
                ``[B, T, nbytes]`` uint8 (or any more axes) gives ``[B, T, dim]``.

        Raises:
            SidError: another shape, or codes outside the alphabet (not checked inside a compiled graph:
                there they give NaN, or an index error where a code needs more than a byte).
        """
        if sids.dtype == torch.uint8 and sids.dim() > 2:
            return self(sids.flatten(0, -2)).unflatten(0, sids.shape[:-1])
        symbols = self._symbols(sids)
        self._check(symbols)
        return nn.functional.embedding_bag(symbols, self.table, mode="sum")

    def pool(
        self,
        sids: Tensor,
        lengths: Tensor,
        weights: Tensor | None = None,
        mode: Literal["sum", "mean"] = "mean",
    ) -> Tensor:
        """Jagged SIDs -> one row per bag ``[B, dim]``; empty bags give zeros.

        Args:
            sids: ``[E, ...]`` as in :meth:`forward`, bag after bag.
            lengths: ``[B]`` integers that sum to E.
            weights: ``[E]`` float, or None for 1.
            mode: sum, or mean (by the number of SIDs, not by weight).

        Raises:
            SidError: lengths that do not sum to the number of SIDs.
        """
        phi = self(sids)
        if not torch.compiler.is_compiling() and int(lengths.sum()) != len(phi):
            raise SidError(
                "lengths", f"sum {int(lengths.sum())} for {len(phi)} SIDs", "Pass one length per bag."
            )
        if weights is not None:
            phi = phi * weights.unsqueeze(1)
        count = lengths.shape[0]
        bags = torch.repeat_interleave(
            torch.arange(count, device=phi.device), lengths, output_size=phi.shape[0]
        )
        total = phi.new_zeros(count, self.dim).index_add(0, bags, phi)
        return total if mode == "sum" else total / lengths.clamp_min(1).unsqueeze(1)

    def group_sum(self, sids: Tensor, groups: Tensor, count: int) -> Tensor:
        """Sum the features of each group of SIDs -> ``[count, dim]``, without a row per SID.

        Args:
            sids: ``[E, ...]`` as in :meth:`forward`.
            groups: ``[E]`` integers within ``0 .. count - 1``, in any order.
            count: number of groups; an empty one gives zeros.

        Raises:
            SidError: as :meth:`forward`.
        """
        in_bytes = self.spec.byte_groups is not None
        if not in_bytes:
            self._check(self._symbols(sids))
        groups = groups.to(torch.int32)
        symbols = self._symbols(sids[torch.argsort(groups, stable=True)])
        sizes = torch.zeros(count, dtype=torch.int32, device=groups.device)
        sizes.index_add_(0, groups, torch.full_like(groups, symbols.shape[1]))
        offsets = (sizes.cumsum(0) - sizes).to(torch.int32)
        sums = nn.functional.embedding_bag(symbols.flatten(), self.table, offsets, mode="sum")
        # A byte outside the alphabet gives NaN, and there are fewer sums to look at than SIDs.
        if in_bytes and not torch.compiler.is_compiling() and bool(sums.isnan().any()):
            self._check(self._symbols(sids))
        return sums

    def _symbols(self, sids: Tensor) -> Tensor:
        """``[N, S]`` int32: row of the table for each byte, or for each code where a level needs more."""
        data = as_bytes(self.spec, sids)
        if self.spec.byte_groups is None:
            data = self.spec.unpack_bytes(data).to(torch.int32)
        return data + self._starts

    def _check(self, symbols: Tensor) -> None:
        if torch.compiler.is_compiling():
            return
        bad = symbols >= self._starts + self._limits
        if bool(bad.any()):
            row, column = (int(i) for i in bad.nonzero()[0])
            value = int(symbols[row, column] - self._starts[column])
            raise SidError(
                "sids",
                f"value {value} in column {column} of SID {row}, "
                f"outside 0..{int(self._limits[column]) - 1}",
                "Encode with the quantizer this spec belongs to.",
            )

    def _level_tables(self, basis: FrozenBasis | None) -> list[Tensor]:
        """Per level ``[K_l, dim]``: what its code adds to the raw features."""
        kind, ks = self.config.kind, self.spec.cardinalities
        if kind == "basis":
            if basis is None:
                raise SidError(
                    "SideFeatures", "kind 'basis' without a basis", "Pass basis=FrozenBasis(...)."
                )
            return [basis.values(level) for level in range(self.spec.levels)]
        blocks = []
        for level, k in enumerate(ks):
            if kind == "digits":
                if k % 2 == 0:
                    raise SidError(
                        "SideFeatures",
                        f"digits of {k} codes at level {level + 1}",
                        "Even alphabets have no centre code: choose kind='one_hot' or 'basis'.",
                    )
                block = (torch.arange(k).float() - (k - 1) / 2)[:, None]
                if basis is not None and len(basis.tables[level]) == 1:
                    block = block * basis.tables[level].norm().cpu()
            else:
                block = torch.eye(k)
                if k % 2 == 1 and not self.config.keep_centre:
                    block = torch.cat([block[:, (k + 1) // 2 :], block[:, : k // 2]], dim=1)
            blocks.append(block)
        width, at, tables = sum(b.shape[1] for b in blocks), 0, []
        for block in blocks:
            table = torch.zeros(len(block), width)
            table[:, at : at + block.shape[1]] = block
            at += block.shape[1]
            tables.append(table)
        return tables


def _byte_table(tables: Sequence[Tensor], radices: Sequence[int]) -> Tensor:
    """Sum the tables of the levels that share a byte: ``[256, dim]``, NaN outside the alphabet."""
    rest = torch.arange(256)
    total = torch.zeros(256, tables[0].shape[1])
    for table, k in zip(tables, radices, strict=True):
        total += table[rest % k]
        rest = rest // k
    total[prod(radices) :] = torch.nan
    return total


def _limits(spec: SidSpec) -> Tensor:
    if spec.byte_groups is None:
        return torch.tensor(spec.cardinalities)
    return torch.tensor([prod(spec.cardinalities[a:b]) for a, b in spec.byte_groups])
