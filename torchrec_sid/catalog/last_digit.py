"""A last digit that tells items with equal SIDs apart, without moving any published SID."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torchrec_sid.catalog.sid_catalog import SidCatalog
from torchrec_sid.errors import SidError
from torchrec_sid.spec import SidSpec


class LastDigit(NamedTuple):
    """What :func:`add_last_digit` returns."""

    spec: SidSpec
    """The spec with one more level."""
    codes: Tensor
    """``[N, L + 1]`` int64."""
    overflow: int
    """Items left with the largest digit although it is taken: their SID has more items than digits."""


def add_last_digit(
    spec: SidSpec,
    item_ids: Tensor,
    codes: Tensor,
    *,
    cardinality: int = 256,
    published: SidCatalog | None = None,
) -> LastDigit:
    """Number the items of each SID 0, 1, 2 ... in the order of their ids.

    In a ranking model collisions are wanted: they are how a new item shares what was learned. A last digit
    is for uses that need one SID per item (generation, de-duplicated serving); prefix tables that stop a
    level short see the same SIDs as before.

    Args:
        spec: of ``codes``; with the digit it must fit 63 bits.
        item_ids: ``[N]`` int64, each once.
        codes: ``[N, L]`` int64.
        cardinality: values of the digit.
        published: a catalog made with this digit, to which the items will be appended: numbering goes on
            after its largest digit of each SID.

    Raises:
        SidError: codes outside the spec, more than 63 bits, or a ``published`` of another spec.
    """
    spec.validate(codes)
    extended = SidSpec((*spec.cardinalities, cardinality))
    if not extended.fits_int64:
        raise SidError("last digit", f"{extended.bits} bits in all", "Choose a smaller cardinality.")
    if published is not None and published.spec != extended:
        raise SidError(
            str(published.path),
            f"cardinalities {published.spec.cardinalities}",
            f"Pass a catalog of {extended.cardinalities}.",
        )
    packed = spec.pack(codes, validate=False)
    by_id = item_ids.argsort(stable=True)
    order = by_id[packed[by_id].argsort(stable=True)]
    sids, group, size = packed[order].unique_consecutive(return_inverse=True, return_counts=True)
    first = size.cumsum(0) - size
    rank = torch.arange(len(order)) - first[group]
    if published is not None:
        rank += _next_digit(published, sids)[group]
    digit = torch.empty_like(rank)
    digit[order] = rank.clamp(max=cardinality - 1)
    overflow = int((rank >= cardinality).sum())
    return LastDigit(extended, torch.cat([codes, digit.unsqueeze(1)], dim=1), overflow)


def _next_digit(published: SidCatalog, sids: Tensor) -> Tensor:
    """For each sorted SID ``[G]``: one more than the largest digit it has in the catalog, else 0."""
    out = torch.zeros_like(sids)
    if not len(sids):
        return out
    depth = published.spec.levels - 1
    for rows in published.batches():
        packed = published.spec.pack(rows.codes, validate=False)
        prefix = published.spec.prefix(packed, depth)
        at = torch.searchsorted(sids, prefix).clamp_(max=len(sids) - 1)
        hit = sids[at] == prefix
        out.scatter_reduce_(0, at[hit], rows.codes[hit, -1] + 1, "amax")
    return out
