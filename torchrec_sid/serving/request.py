"""`Request`: what a ranker is asked, as tensors alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from torchrec_sid.errors import SidError


class Bags(NamedTuple):
    """One sparse feature: bag after bag."""

    values: Tensor
    """``[n]`` int64: packed SIDs, ids or actions."""
    lengths: Tensor
    """``[B]`` int64: values of each example, or of each user; they sum to n."""


COUNTS = "counts"
"""Name of :attr:`Request.counts` among the inputs of a program."""


class Request(NamedTuple):
    """B examples to rank; with ``counts`` they are candidates of U users, one user after the other."""

    dense: Tensor
    """``[B, F]`` float32."""
    features: dict[str, Bags]
    """Sparse features by name."""
    extras: dict[str, Tensor]
    """Further inputs by the name of the model's argument: ``[B, ...]``, or one row per value of the feature
    that ``rows_of`` names."""
    rows_of: dict[str, str]
    """Extra -> feature whose values its rows go with; extras that are not here have a row per example."""
    counts: Tensor | None = None
    """``[U]`` int64 above 0 that sum to B: examples of each user. None: every example is one user's."""
    by_user: tuple[str, ...] = ()
    """With ``counts``: features that have a bag per user, which all of his examples read."""

    @property
    def rows(self) -> int:
        """B."""
        return self.dense.shape[0]

    @property
    def users(self) -> int:
        """U."""
        return self.rows if self.counts is None else self.counts.shape[0]

    def take(self, users: Sequence[int]) -> Request:
        """The users ``users`` (without ``counts``: the examples), in that order; they may repeat."""
        index = torch.as_tensor(users, dtype=torch.int64)
        if self.counts is None:
            return self._gather(index, index)
        taken = self._gather(_places(self.counts, index), index)
        return taken._replace(counts=self.counts[index])

    def by_row(self) -> Request:
        """The same without ``counts``: every example carries the history of its user."""
        if self.counts is None:
            return self
        each = torch.arange(self.users).repeat_interleave(self.counts)
        return self._gather(torch.arange(self.rows), each)._replace(counts=None, by_user=())

    def shared(self, size: int) -> Request:
        """Users of ``size`` examples each (the last may have fewer): all take the history of the first.

        Raises:
            SidError: it is by user already.
        """
        if self.counts is not None:
            raise SidError("request", f"{self.users} users already", "Share the histories of rows.")
        first = torch.arange(0, self.rows, size)
        by_user = tuple(name for name in self.features if name.startswith("history"))
        whole = self._replace(by_user=by_user)._gather(torch.arange(self.rows), first)
        return whole._replace(counts=torch.diff(first, append=torch.tensor([self.rows])))

    def of_size(self, rows: int) -> Request:
        """``rows`` examples, in turn those of this one; with ``counts`` candidates of its first user."""
        whole = self.by_row()
        taken = whole.take([i % whole.rows for i in range(rows)])
        return taken if self.counts is None else taken.shared(rows)

    def arguments(self) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
        """What a program is called with."""
        features = {name: (bags.values, bags.lengths) for name, bags in self.features.items()}
        extras = self.extras if self.counts is None else {**self.extras, COUNTS: self.counts}
        return self.dense, features, extras

    def _gather(self, examples: Tensor, users: Tensor) -> Request:
        index = {name: users if name in self.by_user else examples for name in self.features}
        places = {name: _places(bags.lengths, index[name]) for name, bags in self.features.items()}
        features = {
            name: Bags(bags.values[places[name]], bags.lengths[index[name]])
            for name, bags in self.features.items()
        }
        extras = {
            name: tensor[places[self.rows_of[name]] if name in self.rows_of else examples]
            for name, tensor in self.extras.items()
        }
        return Request(self.dense[examples], features, extras, self.rows_of, self.counts, self.by_user)

    def without_values(self, names: Sequence[str]) -> Request:
        """The same examples with every bag of the features ``names`` empty."""
        features = {
            name: Bags(bags.values[:0], torch.zeros_like(bags.lengths)) if name in names else bags
            for name, bags in self.features.items()
        }
        extras = {
            name: tensor[:0] if self.rows_of.get(name) in names else tensor
            for name, tensor in self.extras.items()
        }
        return self._replace(features=features, extras=extras)

    def to_tensors(self) -> dict[str, Tensor]:
        """Flat, by name, for a file: copies, since features of one history share their lengths."""
        tensors = {"dense": self.dense} | ({} if self.counts is None else {COUNTS: self.counts})
        for name, bags in self.features.items():
            tensors[f"values/{name}"], tensors[f"lengths/{name}"] = bags
        tensors |= {f"extra/{name}": tensor for name, tensor in self.extras.items()}
        return {name: tensor.clone() for name, tensor in tensors.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], inputs: Inputs) -> Request:
        """The counterpart of :meth:`to_tensors`."""
        features = {n: Bags(tensors[f"values/{n}"], tensors[f"lengths/{n}"]) for n in inputs.features}
        extras = {name: tensors[f"extra/{name}"] for name in inputs.extras}
        counts = tensors[COUNTS] if inputs.by_user else None
        return cls(tensors["dense"], features, extras, dict(inputs.rows_of), counts, inputs.by_user)


class Inputs(NamedTuple):
    """What a program reads; checks requests against it."""

    dense: int
    """F."""
    features: tuple[str, ...]
    """Sparse features, in the order of the program."""
    extras: dict[str, tuple[str, tuple[int, ...]]]
    """Extra -> its dtype, and its shape behind the first dimension."""
    rows_of: dict[str, str]
    """As in :class:`Request`."""
    max_lengths: dict[str, int]
    """Feature -> most values of one example that the model reads."""
    together: tuple[tuple[str, ...], ...] = ()
    """Features of one history: every example has as many values of each."""
    ranges: dict[str, tuple[int, int]] = {}  # noqa: RUF012  never changed
    """Feature -> smallest and largest value that the model knows."""
    by_user: tuple[str, ...] = ()
    """As in :class:`Request`; none: the program reads a bag of every feature for each example."""

    def check(self, request: Request) -> None:
        """Refuse what the program would compute wrongly.

        Raises:
            SidError: a feature or extra that is missing or too many, a dtype or shape, lengths that do not
                add up or differ within one history, more values than the model reads, a value that it does
                not know, or a dense value that is not finite.
        """
        dense = request.dense
        if dense.dim() != 2 or dense.shape[1] != self.dense or dense.dtype != torch.float32:
            raise SidError(
                "dense", f"{dense.dtype} of shape {tuple(dense.shape)}", f"Pass float32 [B, {self.dense}]."
            )
        if not bool(dense.isfinite().all()):
            row, column = (int(i) for i in (~dense.isfinite()).nonzero()[0])
            raise SidError(
                "dense",
                f"{float(dense[row, column])} in row {row}, column {column}",
                "Pass finite numbers.",
            )
        self._check_counts(request)
        _same_names("feature", request.features, self.features)
        _same_names("extra input", request.extras, self.extras)
        for name, bags in request.features.items():
            bags_of = request.users if name in self.by_user else request.rows
            _check_bags(name, bags, bags_of, self.max_lengths.get(name))
            _check_range(name, bags.values, self.ranges.get(name))
        for group in self.together:
            _check_together(group, request.features)
        for name, (dtype, shape) in self.extras.items():
            extra = request.extras[name]
            of = self.rows_of.get(name)
            rows = request.rows if of is None else len(request.features[of].values)
            if str(extra.dtype) != dtype or tuple(extra.shape) != (rows, *shape):
                raise SidError(
                    f"extra input {name!r}",
                    f"{extra.dtype} of shape {tuple(extra.shape)}",
                    f"Pass {dtype} of shape {(rows, *shape)}.",
                )

    def _check_counts(self, request: Request) -> None:
        if (request.counts is None) == bool(self.by_user) or request.by_user != self.by_user:
            raise SidError(
                COUNTS,
                "missing" if request.counts is None else f"given, with {list(request.by_user)} by user",
                f"This program reads {list(self.by_user) or 'nothing'} by user.",
            )
        counts = request.counts
        if counts is None:
            return
        if counts.dtype != torch.int64 or counts.dim() != 1:
            raise SidError(COUNTS, f"{counts.dtype} of shape {tuple(counts.shape)}", "Pass int64 [U].")
        if not len(counts) or int(counts.min()) < 1 or int(counts.sum()) != request.rows:
            raise SidError(
                COUNTS,
                f"{counts.tolist()[:8]} for {request.rows} examples",
                "Give every user at least one example, and every example a user.",
            )


def _places(lengths: Tensor, index: Tensor) -> Tensor:
    """Places of the values of the bags ``index``, bag after bag."""
    starts = lengths.cumsum(0) - lengths
    chosen = lengths[index]
    first = chosen.cumsum(0) - chosen
    return torch.arange(int(chosen.sum())) + (starts[index] - first).repeat_interleave(chosen)


def _same_names(
    kind: str, found: Mapping[str, object], wanted: Sequence[str] | Mapping[str, object]
) -> None:
    for name in wanted:
        if name not in found:
            raise SidError(f"{kind} {name!r}", "missing", f"The program reads {list(wanted)}.")
    for name in found:
        if name not in wanted:
            raise SidError(f"{kind} {name!r}", "not read by this program", f"It reads {list(wanted)}.")


def _check_range(name: str, values: Tensor, bounds: tuple[int, int] | None) -> None:
    if bounds is None or not len(values):
        return
    low, high = (int(bound) for bound in values.aminmax())
    if low < bounds[0] or high > bounds[1]:
        odd = low if low < bounds[0] else high
        raise SidError(
            f"feature {name!r}", f"the value {odd}", f"The model knows {bounds[0]} to {bounds[1]}."
        )


def _check_together(names: Sequence[str], features: Mapping[str, Bags]) -> None:
    first = features[names[0]].lengths
    for name in names[1:]:
        other = features[name].lengths
        if not torch.equal(first, other):
            row = int((first != other).nonzero()[0])
            raise SidError(
                f"feature {name!r}",
                f"{int(other[row])} values in row {row}, {names[0]!r} has {int(first[row])}",
                "Send one value of each per event.",
            )


def _check_bags(name: str, bags: Bags, rows: int, most: int | None) -> None:
    where = f"feature {name!r}"
    for word, tensor in zip(("values", "lengths"), bags, strict=True):
        if tensor.dtype != torch.int64 or tensor.dim() != 1:
            raise SidError(
                where, f"{word} {tensor.dtype} of shape {tuple(tensor.shape)}", "Pass int64 [n]."
            )
    if len(bags.lengths) != rows:
        raise SidError(
            where, f"{len(bags.lengths)} lengths for {rows} bags", "Give one per example or user."
        )
    if not rows:
        return
    low, high = (int(bound) for bound in bags.lengths.aminmax())
    total = int(bags.lengths.sum())
    if low < 0 or total != len(bags.values):
        raise SidError(
            where, f"lengths from {low} that sum to {total} for {len(bags.values)} values", "Match them."
        )
    if most is not None and high > most:
        raise SidError(where, f"{high} values of one example", f"Send the newest {most}.")
