"""From runs of codes to pieces: double-array tries in flat tensors, walked by tensor operations alone."""

from __future__ import annotations

from itertools import count
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from torchrec_sid.devices import FrozenState
from torchrec_sid.errors import SidError
from torchrec_sid.tables.sentencepiece.pieces import SidPieces

IntArray = np.ndarray[Any, np.dtype[np.int64]]

NO_PIECE = -1e30
"""Score of a state that is only the beginning of pieces. Finite, because it is added to."""
MAX_STATES = 1 << 24
"""A state fits the bits that a float32 leaves free in a float64, less one for the sign."""


class PieceMap(FrozenState):
    """All pieces as tries, one for each level at which a piece can start.

    A state is an int32. The state after one more code ``c`` is found at ``state + c`` of two arrays:
    ``owner`` says which state that entry belongs to, ``follower`` where it leads. A step is two gathers and
    a little arithmetic, however many pieces there are. State 0 is dead: no piece continues like this.
    States of an earlier level are smaller than those of a later one. A first code without a piece leads to
    a state of the unknown piece, so that only longer runs can be dead.

    Args:
        pieces: the vocabulary.
        unk_score: score of the unknown piece.
        device: where the buffers live.
    """

    owner: Tensor
    """``[S]`` int32: the state that the entry belongs to, -1 where it is free."""
    follower: Tensor
    """``[S]`` int32: the state it leads to."""
    piece: Tensor
    """``[S]`` int32: the piece that a state spells; 0, the unknown one, where it spells none."""
    score: Tensor
    """``[S]`` float32: its score; :data:`NO_PIECE` where a run of two or more codes is no piece."""
    start: Tensor
    """``[S]`` int32: the level at which it starts."""
    shifts: Tensor
    masks: Tensor
    roots: Tensor

    def __init__(self, pieces: SidPieces, unk_score: float, device: torch.device) -> None:
        super().__init__()
        spec = pieces.spec
        self.longest: int = int((pieces.stops - pieces.starts).max().clamp(min=1))
        roots: list[int] = []
        # A score of -0.0 instead of 0.0: :class:`BestPath` fills the free bits of negative numbers.
        scores = np.where(pieces.scores.numpy() == 0, -0.0, pieces.scores.numpy())
        parts: dict[str, list[np.ndarray[Any, Any]]] = {}
        parts["owner"], parts["follower"] = [np.full(1, -1)], [np.zeros(1)]
        parts["piece"], parts["start"] = [np.zeros(1)], [np.zeros(1)]
        parts["score"] = [np.full(1, NO_PIECE)]
        widest, used = max(spec.cardinalities), 1
        self.complete: bool = True
        for start in range(spec.levels):
            trie = _trie(pieces, start)
            self.complete = self.complete and trie.complete
            array = _double_array(trie.children, widest)
            size = len(array.owner)
            piece = np.zeros(size, dtype=np.int64)
            piece[array.base] = trie.piece
            score = np.where(piece > 0, scores[piece], NO_PIECE)
            single = array.base[trie.depth == 1]
            score[single] = np.where(piece[single] > 0, scores[piece[single]], unk_score)
            parts["owner"].append(np.where(array.owner >= 0, array.owner + used, -1))
            parts["follower"].append(np.where(array.owner >= 0, array.follower + used, 0))
            parts["piece"].append(piece)
            parts["score"].append(score)
            parts["start"].append(np.full(size, start))
            roots.append(int(array.base[0]) + used)
            used += size
        if used > MAX_STATES:
            raise SidError(
                "SidPieces", f"{used} states", f"At most {MAX_STATES} fit: train a smaller vocabulary."
            )
        for name, arrays in parts.items():
            dtype = torch.float32 if name == "score" else torch.int32
            tensor = torch.from_numpy(np.concatenate(arrays)).to(device, dtype)
            self.register_buffer(name, tensor, persistent=False)
        for name, values, kind in (
            ("shifts", spec.shifts, torch.int64),
            ("masks", [(1 << bits) - 1 for bits in spec.level_bits], torch.int64),
            ("roots", roots, torch.int32),
        ):
            column = torch.tensor(values, dtype=kind, device=device).unsqueeze(1)
            self.register_buffer(name, column, persistent=False)

    def walk(self, packed: Tensor) -> Tensor:
        """Packed SIDs ``[n]`` int64 -> the state ``[spans, n]`` int32 of every run of codes.

        Rows are ordered as in :meth:`spans`: by length, then by start. Every step takes all starts at once.
        """
        codes = (
            packed.unsqueeze(0).bitwise_right_shift(self.shifts).bitwise_and_(self.masks).to(torch.int32)
        )
        levels, n = codes.shape[0], codes.shape[1]
        # No first code is dead: its entry belongs to the root.
        states = self.follower.index_select(0, (codes + self.roots).view(-1))
        rows = [states.view(levels, n)]
        for length in range(2, self.longest + 1):
            states = states[: (levels - length + 1) * n]
            place = states + codes[length - 1 :].view(-1)
            # 1 where the entry belongs to another state, 0 where to this one: a comparison and a selection
            # would cost several times these three passes.
            miss = self.owner.index_select(0, place).sub_(states).abs_().clamp_(max=1)
            found = self.follower.index_select(0, place)
            states = found.addcmul_(found, miss, value=-1)
            rows.append(states.view(levels - length + 1, n))
        return torch.cat(rows)

    def spans(self) -> list[tuple[int, int]]:
        """Runs of levels, as (start, stop), in the order of the rows of :meth:`walk`."""
        levels = len(self.shifts)
        lengths = range(1, self.longest + 1)
        return [(start, start + n) for n in lengths for start in range(levels - n + 1)]


class _Trie(NamedTuple):
    """The pieces that start at one level; node 0 is the root."""

    children: list[dict[int, int]]
    """Code -> node, of each node."""
    piece: IntArray
    """Piece of each node, 0 where it has none."""
    depth: IntArray
    """Codes from the root to each node."""
    complete: bool
    """Whether every code of the level is a piece."""


def _trie(pieces: SidPieces, start: int) -> _Trie:
    spec = pieces.spec
    children: list[dict[int, int]] = [{}]
    piece, depth = [0], [0]

    def child(node: int, code: int) -> int:
        if code not in children[node]:
            children[node][code] = len(children)
            children.append({})
            piece.append(0)
            depth.append(depth[node] + 1)
        return children[node][code]

    rows = ((pieces.starts == start) & (pieces.stops > start)).nonzero().flatten().tolist()
    for number in rows:
        stop, bits = int(pieces.stops[number]), int(pieces.bits[number])
        node = 0
        for level in range(start, stop):
            shift = spec.shifts[level] - spec.shifts[stop - 1]
            node = child(node, bits >> shift & ((1 << spec.level_bits[level]) - 1))
        piece[node] = number
    for code in range(spec.cardinalities[start]):
        child(0, code)
    complete = all(piece[node] for node in children[0].values())
    return _Trie(children, np.array(piece), np.array(depth), complete)


class _Array(NamedTuple):
    """A trie as a double array, states counted from 0."""

    base: IntArray
    """State of each node."""
    owner: IntArray
    follower: IntArray


def _double_array(children: list[dict[int, int]], widest: int) -> _Array:
    """Give every node a base of its own, such that the entries ``base + code`` of no two nodes meet."""
    codes = [np.fromiter(c, dtype=np.int64, count=len(c)) for c in children]
    sizes = np.array([len(c) for c in codes])
    entries = int(sizes.sum())
    room = widest + 2 * entries
    taken = np.zeros(room + widest, dtype=bool)
    used = np.zeros(room + widest, dtype=bool)
    base = np.zeros(len(children), dtype=np.int64)
    rng = np.random.default_rng(0)
    # Nodes with several children first, widest first, each at the first of random places that fits; where
    # none of many does, the array has become too dense for such nodes and grows.
    for node in np.argsort(-sizes, kind="stable")[: int((sizes > 1).sum())]:
        for attempt in count():
            bases = rng.integers(0, room, 256)
            fits = ~(taken[bases[:, None] + codes[node]].any(1) | used[bases])
            if fits.any():
                break
            if attempt % 4 == 3:
                extra = np.zeros(widest + room // 4, dtype=bool)
                taken, used = np.concatenate([taken, extra]), np.concatenate([used, extra])
                room += len(extra)
        base[node] = bases[fits.argmax()]
        used[base[node]] = True
        taken[base[node] + codes[node]] = True
    _place_only_children(base, codes, np.flatnonzero(sizes == 1), taken, used)
    leaves = np.flatnonzero(sizes == 0)
    free = np.flatnonzero(~used)
    if len(free) < len(leaves):
        free = np.concatenate([free, np.arange(len(used), len(used) + len(leaves))])
    base[leaves] = free[: len(leaves)]
    # Any state may be asked for any code.
    length = int(base.max()) + widest + 1
    owner, follower = np.full(length, -1), np.zeros(length, dtype=np.int64)
    for node in np.flatnonzero(sizes):
        owner[base[node] + codes[node]] = base[node]
        follower[base[node] + codes[node]] = base[list(children[node].values())]
    return _Array(base, owner, follower)


def _place_only_children(
    base: IntArray,
    codes: list[IntArray],
    nodes: IntArray,
    taken: np.ndarray[Any, Any],
    used: np.ndarray[Any, Any],
) -> None:
    """Nodes with one child fit any free entry: all at once, repeating for those whose base was taken."""
    first = 0
    while len(nodes):
        free = np.flatnonzero(~taken)
        free = np.roll(free, -first)[: len(nodes)]
        wanted = free - np.array([int(codes[node][0]) for node in nodes])[: len(free)]
        good = wanted >= 0
        good[good] &= ~used[wanted[good]]
        # Of equal bases only the first may stay.
        _, earliest = np.unique(wanted, return_index=True)
        unique = np.zeros(len(wanted), dtype=bool)
        unique[earliest] = True
        good &= unique
        chosen = nodes[: len(free)][good]
        base[chosen] = wanted[good]
        used[wanted[good]] = True
        taken[free[good]] = True
        nodes = np.concatenate([nodes[: len(free)][~good], nodes[len(free) :]])
        first += 1 + int((~good).sum())
