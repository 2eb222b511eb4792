"""`Renaming`: other names for the codes of a quantizer that change nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from torchrec_sid.errors import SidError
from torchrec_sid.spec import SidSpec


class CodeGroup(NamedTuple):
    """Levels whose codes can bear other names: the quantizer stays the same function but for the names."""

    start: int
    """First level, from 0."""
    stop: int
    """One past the last level."""
    digits: bool
    """False: one codebook, whose rows can stand in any order. True: a stage of centred digits, which can
    change places among each other and be turned round."""


def code_groups(codebooks: Sequence[int], stages: Sequence[tuple[int, int]]) -> tuple[CodeGroup, ...]:
    """Of residual codebooks, and ``(m, alphabet)`` stages of digits after them."""
    groups = [CodeGroup(level, level + 1, digits=False) for level in range(len(codebooks))]
    for width, _ in stages:
        start = groups[-1].stop if groups else 0
        groups.append(CodeGroup(start, start + width, digits=True))
    return tuple(groups)


class Renaming(NamedTuple):
    """Which old name each new name stands for."""

    levels: tuple[int, ...]
    """Per level after renaming, the level before."""
    codes: tuple[Tensor, ...]
    """Per level after renaming ``[K_l]`` int64: the code of the level before that each code is."""

    @classmethod
    def none(cls, spec: SidSpec) -> Renaming:
        """Every name stands for itself."""
        return cls(tuple(range(spec.levels)), tuple(torch.arange(k) for k in spec.cardinalities))

    def apply(self, codes: Tensor) -> Tensor:
        """Codes ``[N, L]`` int64 under the old names -> the same under the new ones."""
        columns = []
        for level, old in zip(self.levels, self.codes, strict=True):
            new = torch.empty_like(old).scatter_(0, old, torch.arange(len(old)))
            columns.append(new.to(codes.device)[codes[:, level]])
        return torch.stack(columns, dim=1)

    def directions(self, basis: Tensor, first: int) -> Tensor:
        """Directions ``[C, d]`` of the digits from level ``first`` on, in their new places and turned."""
        order = torch.tensor(self.levels[first:], dtype=torch.int64, device=basis.device) - first
        # Digits are centred: the code 0 is the lowest, and the highest of a direction turned round.
        signs = [-1.0 if int(codes[0]) else 1.0 for codes in self.codes[first:]]
        return basis[order] * basis.new_tensor(signs).unsqueeze(1)

    def check(self, spec: SidSpec, groups: tuple[CodeGroup, ...]) -> None:
        """Refuse what would change more than names.

        Raises:
            SidError: levels that change places outside a stage of digits, names that are not a permutation,
                digits that are neither kept nor turned round.
        """
        allowed = {level: group for group in groups for level in range(group.start, group.stop)}
        for level, (old, names) in enumerate(zip(self.levels, self.codes, strict=True)):
            k, group = spec.cardinalities[level], allowed.get(level)
            own = torch.arange(k)
            good = spec.cardinalities[old] == k and torch.equal(names.sort().values, own)
            if group is None:
                good &= old == level and torch.equal(names, own)
            elif group.digits:
                good &= group.start <= old < group.stop
                good &= torch.equal(names, own) or torch.equal(names, own.flip(0))
            else:
                good &= old == level
            if not good:
                raise SidError(
                    f"renaming of level {level + 1}",
                    f"level {old + 1} with codes {names[:8].tolist()} ...",
                    "Make it with align_codes.",
                )
