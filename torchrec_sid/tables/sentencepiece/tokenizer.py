"""`SidTokenizer`: SIDs to pieces as the sentencepiece library cuts them, by tensor operations alone."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from torchrec_sid.devices import FrozenState, buffer_device
from torchrec_sid.errors import SidError
from torchrec_sid.tables.sentencepiece.piece_map import MAX_STATES, NO_PIECE, PieceMap
from torchrec_sid.tables.sentencepiece.pieces import UNK, SidPieces

# Items per pass on a CPU: what keeps every intermediate in the second-level cache.
_CHUNK = 32_768
# What the library's unigram model subtracts from the lowest score for a symbol without a piece.
_UNK_PENALTY = 10.0
_MAX_LEVELS = 14
_NO_RANK = 2**31 - 1


class Tokens(NamedTuple):
    """Pieces of a batch of SIDs."""

    ids: Tensor
    """``[n, L]`` int32: the piece that ends at each level, -1 where none does."""
    counts: Tensor
    """``[n]`` int64: pieces per SID, 1 to L."""

    def flat(self) -> Tensor:
        """``[sum of counts]`` int64: the pieces, SID by SID. Waits for the device: its length is data."""
        if torch.compiler.is_compiling():
            return self.ids[self.ids >= 0].to(torch.int64)
        stops = self.counts.cumsum(0)
        total = int(stops[-1]) if len(stops) else 0
        result = torch.empty(total + 1, dtype=torch.int64, device=self.ids.device)
        # Level by level every piece is written to its place, and what is no piece past the end: half the
        # time of a boolean selection.
        place = stops - self.counts
        for ids in self.ids.unbind(1):
            here = ids.bitwise_right_shift(31).add_(1)
            result.scatter_(0, torch.where(here > 0, place, total), ids.to(torch.int64))
            place += here
        return result[:total]


class SidTokenizer(nn.Module):
    """Packed SIDs -> pieces, on the device of its buffers, without a loop over items.

    Unigram: the best path over at most L (L + 1) / 2 runs of codes, in the library's order of float32
    additions and with its preference for the longer piece on a tie. BPE: at most L - 1 rounds, each merging
    the best pair of neighbours of every SID at once. Neighbouring unknown symbols become one unknown piece.

    Args:
        pieces: a trained vocabulary, of SIDs of at most 14 levels.
        device: where the buffers live; never meta.

    Example:
        >>> from torchrec_sid import PieceTrainerConfig, SidSpec, train_pieces
        >>> spec, codes = SidSpec((2, 2)), torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
        >>> config = PieceTrainerConfig(vocab_size=6)
        >>> pieces = train_pieces(spec, codes, config, weights=torch.tensor([90, 4, 3, 2]))
        >>> tokens = SidTokenizer(pieces)(spec.pack(codes))
        >>> tokens.counts.tolist()
        [1, 2, 2, 2]
    """

    def __init__(self, pieces: SidPieces, device: torch.device | str | None = None) -> None:
        super().__init__()
        levels = pieces.spec.levels
        if levels > _MAX_LEVELS:
            raise SidError(
                "SidTokenizer", f"{levels} levels", f"It cuts SIDs of at most {_MAX_LEVELS} levels."
            )
        place = buffer_device(device)
        known = pieces.scores[1:]
        lowest = known.min() if len(known) else torch.zeros(())
        self.map = PieceMap(pieces, float(lowest - _UNK_PENALTY), place)
        bpe = pieces.config.model == "bpe"
        self.path = MergePath(self.map) if bpe else BestPath(self.map)

    def forward(self, packed: Tensor) -> Tokens:
        """Packed SIDs ``[n]`` int64 within their alphabet -> :class:`Tokens`; never waits for a GPU."""
        # Neither a GPU nor an exported program is asked for sizes or values here.
        compiled = torch.compiler.is_compiling()
        if packed.device.type != "cpu" or compiled or packed.numel() <= _CHUNK:
            ids = self._cut(packed)
        else:
            ids = torch.cat([self._cut(piece) for piece in packed.split(_CHUNK)], dim=1)
        counts = ids.bitwise_right_shift(31).add_(1).sum(dim=0)
        return Tokens(ids.t(), counts)

    def _cut(self, packed: Tensor) -> Tensor:
        """``[n]`` -> ``[L, n]`` int32: the piece that ends at each level, or -1."""
        ends = self.path(self.map, self.map.walk(packed))
        if not self.map.complete:
            # Of neighbouring unknown symbols only the first is kept, as in the library. Such a piece is one
            # symbol long, so that its predecessor ends one level before.
            for level in range(len(ends) - 1, 0, -1):
                again = (ends[level] == UNK) & (ends[level - 1] == UNK)
                ends[level] = ends[level].masked_fill(again, -1)
        return torch.stack(ends)


class BestPath(FrozenState):
    """Unigram: Viterbi over the runs of codes.

    A candidate is one float64: its float32 score, and in the bits which that leaves free the state that
    ends there. The maximum of two then keeps score and state at once. Scores are negative, so that of equal
    scores the smaller state wins, which is the earlier start, as in the library. A vocabulary of a handful
    of pieces can have a positive score: there the maximum and its place are taken in the slower way.
    """

    rows: Tensor

    def __init__(self, pieces: PieceMap) -> None:
        super().__init__()
        spans = pieces.spans()
        self._levels: int = len(pieces.shifts)
        ending = [[i for i, span in enumerate(spans) if span[1] == e + 1] for e in range(self._levels)]
        # The rows of the runs that end at each level, by start.
        ending = [sorted(rows, key=lambda i: spans[i][0]) for rows in ending]
        self._first: list[int] = [spans[rows[0]][0] for rows in ending]
        self._count: list[int] = [len(rows) for rows in ending]
        self._negative: bool = not bool((pieces.score > 0).any())
        table = torch.tensor([row for rows in ending for row in rows], device=pieces.owner.device)
        self.register_buffer("rows", table, persistent=False)

    def forward(self, pieces: PieceMap, states: Tensor) -> list[Tensor]:
        """States ``[spans, n]`` int32 -> the piece ``[n]`` int32 that ends at each level, or -1."""
        n = states.shape[1]
        so_far = torch.full([self._levels + 1, n], -0.0, dtype=torch.float32, device=states.device)
        best: list[Tensor] = []
        row = 0
        for stop in range(self._levels):
            first, count = self._first[stop], self._count[stop]
            state = states.index_select(0, self.rows[row : row + count])
            row += count
            score = pieces.score.index_select(0, state.view(-1)).view(count, n)
            score = score.add_(so_far[first : first + count])
            if self._negative:
                candidate = score.to(torch.float64)
                candidate.view(torch.int64).bitwise_or_(state)
                winner = candidate.amax(dim=0)
                so_far[stop + 1] = winner
                best.append(winner.view(torch.int64).bitwise_and_(MAX_STATES - 1).to(torch.int32))
            else:
                so_far[stop + 1], chosen = score.max(dim=0)
                best.append(state.gather(0, chosen.unsqueeze(0)).squeeze(0))
        ends: list[Tensor] = []
        # Bit l of ``path``: the best path has a piece that ends after level l.
        path = torch.full_like(best[0], 1 << self._levels)
        for stop in range(self._levels, 0, -1):
            on = path.bitwise_right_shift(stop).bitwise_and_(1)
            state = best[stop - 1]
            path = path.bitwise_or_(on.bitwise_left_shift(pieces.start.index_select(0, state)))
            ends.append(pieces.piece.index_select(0, state).add_(1).mul_(on).sub_(1))
        ends.reverse()
        return ends


class MergePath(FrozenState):
    """BPE: of all neighbours that make a piece, join those of the earliest merge; repeat.

    Which run of codes two neighbours make is read from a table over all 2**(L - 1) ways to cut L levels.
    """

    span_at: Tensor
    span_to: Tensor
    bit_of: Tensor
    rank: Tensor

    def __init__(self, pieces: PieceMap) -> None:
        super().__init__()
        levels = len(pieces.shifts)
        self._levels: int = levels
        at, to = _cut_tables(levels, pieces.spans())
        bit_of = torch.tensor([0] + [1 << i for i in range(levels - 1)] + [0] * (16 - levels))
        # A merge is worth minus its rank; the low four bits leave room for where it happens.
        is_piece = pieces.score > NO_PIECE
        rank = torch.where(is_piece, (-pieces.score).to(torch.int64) << 4, _NO_RANK)
        for name, table in (("span_at", at), ("span_to", to), ("bit_of", bit_of), ("rank", rank)):
            self.register_buffer(name, table.to(pieces.owner.device, torch.int32), persistent=False)

    def forward(self, pieces: PieceMap, states: Tensor) -> list[Tensor]:
        """States ``[spans, n]`` int32 -> the piece ``[n]`` int32 that ends at each level, or -1."""
        n, inner = states.shape[1], self._levels - 1
        # One more row, dead: what a cut that is no longer there would make.
        states = torch.cat([states, states.new_zeros([1, n])]).view(-1)
        rank = self.rank.index_select(0, states)
        items = torch.arange(n, dtype=torch.int32, device=states.device)
        where = torch.arange(inner, dtype=torch.int32, device=states.device).unsqueeze(1)
        span_at = self.span_at * n
        cuts = torch.full([n], (1 << inner) - 1, dtype=torch.int32, device=states.device)
        for _ in range(inner):
            row = (cuts * inner).unsqueeze(0).add(where).view(-1)
            joined = span_at.index_select(0, row).view(inner, n).add_(items).view(-1)
            key = rank.index_select(0, joined).view(inner, n).bitwise_or_(where + 1)
            best = key.amin(dim=0)
            look = best.device.type == "cpu" and not torch.compiler.is_compiling()
            if look and bool((best == _NO_RANK).all()):
                break
            cuts = cuts.bitwise_xor_(self.bit_of.index_select(0, best.bitwise_and_(15)))
        ends: list[Tensor] = []
        row = cuts * self._levels
        for _ in range(self._levels):
            span = self.span_to.index_select(0, row)
            state = states.index_select(0, span.mul_(n).add_(items))
            # The dead state, which stands for no span, would spell the unknown piece.
            on = state.clamp(max=1)
            ends.append(pieces.piece.index_select(0, state).add_(1).mul_(on).sub_(1))
            row = row.add_(1)
        return ends


def _cut_tables(levels: int, spans: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """For every set of cuts (bit l - 1: between levels l and l + 1), numbers of spans.

    Returns:
        ``[2**(L-1) * (L-1)]``, the span that removing each cut would make, and ``[2**(L-1) * L]``, the span
        that ends at each level. Where there is none, ``len(spans)``.
    """
    number = {span: i for i, span in enumerate(spans)}
    none = len(spans)
    at, to = [], []
    for cuts in range(1 << (levels - 1)):
        borders = [0] + [i for i in range(1, levels) if cuts >> (i - 1) & 1] + [levels]
        made = {borders[i]: (borders[i - 1], borders[i + 1]) for i in range(1, len(borders) - 1)}
        ended = {borders[i]: (borders[i - 1], borders[i]) for i in range(1, len(borders))}
        at += [number.get(made.get(i, (0, 0)), none) for i in range(1, levels)]
        to += [number.get(ended.get(i, (0, 0)), none) for i in range(1, levels + 1)]
    return torch.tensor(at), torch.tensor(to)
