"""Align the codes of a refitted quantizer to those it had: the same name for what is nearly the same code.

Two fits of one kind of quantizer give like codes in another order. Tables that were trained with the first
order mean nothing under the second. Here the codes of the second are renamed, level by level, such that
as much traffic as possible keeps its codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchrec_sid.errors import SidError
from torchrec_sid.quantizers.base import Quantizer
from torchrec_sid.quantizers.renaming import CodeGroup, Renaming

# Traffic of an item that has none, as a share of the mean: it speaks where no other does.
_UNSEEN = 1e-6
# What traffic under other parents counts beside traffic under matched ones, and a name that stays.
_ELSEWHERE = 1e-3
_SAME_NAME = 1e-12
# A square of float64 scores: 2 GiB.
_MOST_CODES = 16_384


@dataclass(frozen=True)
class ChangedShares:
    """How much of the items, and of their traffic, has other codes than before."""

    items: tuple[float, ...]
    """By depth: share of items whose first ``depth`` codes changed."""
    traffic: tuple[float, ...]
    """By depth: the same share of their traffic."""
    level_traffic: tuple[float, ...]
    """By level: share of traffic whose code at that level alone changed."""


@dataclass(frozen=True)
class CodeAlignment:
    """What :func:`align_codes` did."""

    renaming: Renaming
    """From the names of the fit to the aligned ones."""
    unaligned: ChangedShares
    """Under the names of the fit."""
    aligned: ChangedShares
    """Under the aligned names."""

    def describe(self) -> str:
        """The first code and the whole SID, in words."""
        before, after = self.unaligned.traffic, self.aligned.traffic
        return (
            f"{1 - after[0]:.1%} of traffic keeps its first code ({1 - before[0]:.1%} unaligned), "
            f"{1 - after[-1]:.1%} its whole SID ({1 - before[-1]:.1%})"
        )


def changed_shares(old: Tensor, new: Tensor, traffic: Tensor | None = None) -> ChangedShares:
    """Compare codes ``[N, L]`` of the same items before and after.

    Args:
        old: before.
        new: after.
        traffic: ``[N]`` weights of the items, 0 or more; all alike by default.
    """
    weights = _weights(traffic, len(old))
    differ = old.cpu() != new.cpu()
    prefix = differ.cumsum(1) > 0
    total = weights.sum().clamp(min=1e-300)
    return ChangedShares(
        tuple(prefix.double().mean(0).tolist()) if len(old) else (0.0,) * old.shape[1],
        tuple(((weights @ prefix.double()) / total).tolist()),
        tuple(((weights @ differ.double()) / total).tolist()),
    )


@torch.no_grad()
def align_codes(
    quantizer: Quantizer, old: Tensor, new: Tensor, traffic: Tensor | None = None
) -> CodeAlignment:
    """Rename the codes of a refitted quantizer, in place, after those that its items had before.

    Level by level, codes are matched under matched parents: a pair of codes scores the traffic of the items
    that have the one before and the other now, and whose earlier codes are the same by then; the best
    matching of all codes is taken (Kuhn 1955). Traffic under other parents decides where that is silent. A
    residual codebook is shared by all parents, and so is its order: one permutation a level is all that can
    change without changing what :meth:`Quantizer.decode` gives, and it keeps new items consistent, which
    the same codebooks encode. Digits of a stage change places and sign by the traffic that agrees.

    Names alone change: ``encode`` gives ``renaming.apply`` of what it gave, and ``decode`` of that the same
    vectors. So the groups of items that share a prefix, and their purity, are those of the fit.

    Args:
        quantizer: fitted; a residual k-means, an RQ-VAE, a fusion, or another that has ``code_groups``.
        old: ``[N, L]`` int64, codes that items had before.
        new: ``[N, L]`` int64, codes of the same items by ``quantizer``.
        traffic: ``[N]`` weights of the items, 0 or more, e.g. their impressions; all alike by default.

    Raises:
        SidError: codes of different shape or outside the alphabet, negative traffic, more than 16,384 codes
            a level, or a quantizer whose codes have fixed meanings.
    """
    quantizer.require_fitted()
    spec, groups = quantizer.spec, quantizer.code_groups
    if not groups:
        raise SidError(
            type(quantizer).__name__, "codes that cannot be renamed", "Give it code_groups and _rename."
        )
    if old.shape != new.shape:
        raise SidError(
            "align_codes", f"{tuple(old.shape)} old, {tuple(new.shape)} new", "Give both [N, L]."
        )
    for codes in (old, new):
        spec.validate(codes)
    if max(spec.cardinalities) > _MOST_CODES:
        raise SidError(
            "align_codes", f"{max(spec.cardinalities)} codes a level", f"{_MOST_CODES} can be matched."
        )
    old, new = old.cpu(), new.cpu()
    weights = _weights(traffic, len(old))
    kept = weights + _UNSEEN * weights.mean().clamp(min=1e-300) if len(old) else weights
    names = Renaming.none(spec)
    levels, orders = list(names.levels), list(names.codes)
    matched = torch.ones(len(old), dtype=torch.bool)
    for group in groups:
        found = _match_digits if group.digits else _match_codebook
        part = found(old, new, kept * torch.where(matched, 1.0, _ELSEWHERE), group, spec.cardinalities)
        levels[group.start : group.stop], orders[group.start : group.stop] = part
        aligned = Renaming(tuple(levels), tuple(orders)).apply(new)
        matched = (aligned[:, : group.stop] == old[:, : group.stop]).all(1)
    renaming = Renaming(tuple(levels), tuple(orders))
    quantizer.rename_codes(renaming)
    aligned = renaming.apply(new)
    return CodeAlignment(renaming, changed_shares(old, new, weights), changed_shares(old, aligned, weights))


def _weights(traffic: Tensor | None, items: int) -> Tensor:
    if traffic is None:
        return torch.ones(items, dtype=torch.float64)
    if traffic.shape != (items,) or bool((traffic < 0).any()):
        raise SidError("traffic", f"shape {tuple(traffic.shape)}", f"Give {items} numbers of 0 or more.")
    return traffic.double().cpu()


def _match_codebook(
    old: Tensor, new: Tensor, weights: Tensor, group: CodeGroup, cardinalities: Sequence[int]
) -> tuple[list[int], list[Tensor]]:
    level, k = group.start, cardinalities[group.start]
    shared = torch.zeros(k * k, dtype=torch.float64)
    shared.index_add_(0, old[:, level] * k + new[:, level], weights)
    score = shared.view(k, k) / weights.sum().clamp(min=1e-300)
    score.diagonal().add_(_SAME_NAME)
    return [level], [_best_matching(score)]


def _match_digits(
    old: Tensor, new: Tensor, weights: Tensor, group: CodeGroup, cardinalities: Sequence[int]
) -> tuple[list[int], list[Tensor]]:
    """Which digit stands where, and whether it is turned round."""
    alphabet, width = cardinalities[group.start], group.stop - group.start
    score = torch.zeros(2, width, width, dtype=torch.float64)
    for i in range(width):
        before = old[:, group.start + i]
        for j in range(width):
            after = new[:, group.start + j]
            for turned, digit in enumerate((after, alphabet - 1 - after)):
                score[turned, i, j] = weights[before == digit].sum()
    score /= weights.sum().clamp(min=1e-300)
    score[0].diagonal().add_(_SAME_NAME)
    chosen = _best_matching(score.amax(0))
    own, levels, codes = torch.arange(alphabet), [], []
    for i, j in enumerate(chosen.tolist()):
        levels.append(group.start + j)
        codes.append(own.flip(0) if score[1, i, j] > score[0, i, j] else own.clone())
    return levels, codes


def _best_matching(score: Tensor) -> Tensor:
    """The column of each row ``[K]``, all different, of the largest sum of ``score`` ``[K, K]``."""
    from scipy.optimize import linear_sum_assignment  # here, so that torch alone is enough to import

    _, columns = linear_sum_assignment(score.numpy(), maximize=True)
    return torch.from_numpy(columns).to(torch.int64)
