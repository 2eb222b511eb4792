"""Beam search over residual codebooks, from tables of inner products instead of residuals."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_SCORES = 1_000_000  # hypotheses scored at a time: 4 MB of float32


def beam_search(x: Tensor, codebooks: Sequence[Tensor], used: Sequence[Tensor], beam: int) -> Tensor:
    """Codes whose sum of codewords is nearest to each row, keeping ``beam`` hypotheses per level.

    The squared error of a hypothesis grows at level l by ``|c|^2 - 2 x.c + 2 sum_m c.c_m`` over the codes
    ``c_m`` chosen before. All three terms are look-ups: ``x.c`` comes from one matrix product per level
    and ``c.c_m`` from tables between codebooks, so a beam costs no product in the dimension d.

    Args:
        x: ``[N, d]`` float32, mean removed.
        codebooks: per level ``[K_l, d]`` float32.
        used: per level ``[K_l]`` bool; codes that are False are never chosen.
        beam: hypotheses kept per row and level.

    Returns:
        ``[N, L]`` int64, the best hypothesis.
    """
    norms = [
        book.square().sum(1).masked_fill(~mask, torch.inf)
        for book, mask in zip(codebooks, used, strict=True)
    ]
    cross = [[earlier @ book.T for earlier in codebooks[:level]] for level, book in enumerate(codebooks)]
    rows = max(1, _SCORES // (beam * max(len(book) for book in codebooks)))
    found = [_search(part, codebooks, norms, cross, beam) for part in x.split(rows)]
    return torch.cat(found) if found else x.new_zeros(0, len(codebooks), dtype=torch.int64)


def _search(
    x: Tensor,
    codebooks: Sequence[Tensor],
    norms: Sequence[Tensor],
    cross: Sequence[Sequence[Tensor]],
    beam: int,
) -> Tensor:
    error = x.new_zeros(len(x), 1)
    codes = torch.zeros(len(x), 1, 0, dtype=torch.int64, device=x.device)
    for level, book in enumerate(codebooks):
        gain = torch.addmm(norms[level], x, book.T, alpha=-2).unsqueeze(1)  # [n, 1, K]
        score = error.unsqueeze(2) + gain  # [n, beams, K]
        for earlier, table in enumerate(cross[level]):
            score.add_(table[codes[:, :, earlier]], alpha=2)
        best = score.flatten(1).topk(min(beam, score[0].numel()), largest=False)
        # Hypotheses through unused codes have an infinite error and are never extended into the best.
        error, origin, code = best.values, best.indices // len(book), best.indices % len(book)
        codes = codes.gather(1, origin.unsqueeze(2).expand(-1, -1, level))
        codes = torch.cat([codes, code.unsqueeze(2)], dim=2)
    return codes[:, 0]
