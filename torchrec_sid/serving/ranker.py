"""`Ranker`: a user's history and candidates by their own ids in, a score for each candidate out.

A served folder holds the program, which reads indices, SIDs and buckets of ages, and ``items.safetensors``,
which says what the program reads of each item. This module stands between the two and what a server is
asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from torchrec_sid.ages import NO_TIME, age_bucket
from torchrec_sid.artifact import load_artifact
from torchrec_sid.data.encoding import Jagged, concatenated
from torchrec_sid.errors import ArtifactError, SidError
from torchrec_sid.hashing import text_id
from torchrec_sid.serving.request import Bags, Request
from torchrec_sid.serving.served_features import FEATURES, ServedFeatures
from torchrec_sid.serving.served_model import (
    ITEMS,
    ITEMS_KIND,
    ITEMS_VERSION,
    ServedModel,
    open_served,
)

Array = np.ndarray[Any, Any]


class RankRequest(NamedTuple):
    """One user and the candidates for him, by the item ids of the log."""

    candidates: Array
    """``[n]`` int64 item ids."""
    history: Array
    """``[m]`` int64 item ids, oldest first."""
    actions: Array
    """``[m]`` int64, what the user did."""
    times: Array
    """``[m]`` int64 seconds; -1 where unknown."""
    now: int
    """Seconds, of the request; -1 where unknown."""
    dense: Array
    """``[n, F]`` float32, in the order of :attr:`Ranker.dense_names`."""
    features: Mapping[str, pa.Array] = {}  # noqa: RUF012  never changed
    """Features of the specification, as the log has them: one value or ``[n]`` of context and user, ``[m]``
    of past events. What is not here is missing; features of items are the folder's."""


class Ranked(NamedTuple):
    """The answer to one request."""

    scores: Array
    """``[n]`` or ``[n, tasks]`` float32 probabilities."""
    unknown_history: int
    """Events that were left out, because this model does not know their items."""


class Ranker:
    """Ranks by item ids, over a served folder.

    Example:
        >>> ranker = Ranker.load("out/run/served/float")  # doctest: +SKIP
        >>> ranker.rank([request])[0].scores  # doctest: +SKIP
    """

    def __init__(
        self,
        model: ServedModel,
        ids: Array,
        columns: Mapping[str, Tensor],
        dense_names: Sequence[str],
        features: ServedFeatures | None = None,
    ) -> None:
        self.model, self.features = model, features
        self.dense_names = tuple(dense_names)
        """Dense inputs that a request states; numbers of the specification come behind them."""
        self._ids, self._columns = ids, dict(columns)
        self._history = [name for name in model.inputs.features if name.startswith("history")]
        limits = [model.inputs.max_lengths[name] for name in self._history]
        self.history_length = min(limits, default=0)

    @classmethod
    def load(cls, folder: str | Path, *, verify: bool = True) -> Ranker:
        """Read a served folder.

        Raises:
            ArtifactError: a file is missing, altered, or of another kind.
        """
        model = ServedModel.load(folder, verify=verify)
        items = load_artifact(Path(folder) / ITEMS, kind=ITEMS_KIND, version=ITEMS_VERSION, verify=verify)
        columns = {"": items.tensors["index"]}
        for name, tensor in items.tensors.items():
            if name.startswith("column/"):
                columns[name.removeprefix("column/")] = tensor
        ids = items.tensors["item_ids"].numpy()
        features = None
        if FEATURES in model.files:
            features = ServedFeatures.read(
                Path(folder) / FEATURES, lambda own: _index(own, ids, columns[""].numpy()), verify=verify
            )
        known = ("history_action", "history_age", *(features.keys if features is not None else ()))
        for name in (*model.inputs.features, *model.inputs.extras):
            if name not in known and _column(name) not in columns:
                raise ArtifactError(
                    str(Path(folder) / ITEMS), f"does not say {name!r} of items", "Export the model again."
                )
        return cls(model, ids, columns, items.config["dense"], features)

    @classmethod
    def load_checked(cls, folder: str | Path) -> Ranker:
        """Read a served folder and let it answer its example.

        Raises:
            SidError: it does not answer as where it was exported; also what :meth:`load` raises.
        """
        ranker = cls.load(folder)
        ranker.model.check_example()
        return ranker

    @staticmethod
    def version_of(folder: str | Path) -> str:
        """What changes with anything that a served folder answers: its seal."""
        return open_served(folder).seal

    @property
    def item_ids(self) -> Array:
        """``[N]`` int64 ids of the items that can be ranked, ascending."""
        return self._ids

    def check(self, request: RankRequest) -> None:
        """Refuse what cannot be ranked, before it waits.

        Raises:
            SidError: no candidate, one that the model does not know, histories whose parts differ in
                length, times out of order or after the request, dense features that are not finite.
        """
        if not len(request.candidates):
            raise SidError("candidates", "none", "Send at least one item id.")
        _, known = self._places(request.candidates)
        if not known.all():
            item = request.candidates[~known][0]
            raise SidError(
                "candidates",
                f"item {item} is not in this model",
                "Leave it out, or append it to the catalog and export the model again.",
            )
        lengths = {
            "history": request.history,
            "history_action": request.actions,
            "history_ts": request.times,
        }
        if len({len(part) for part in lengths.values()}) > 1:
            found = ", ".join(f"{name} has {len(part)}" for name, part in lengths.items())
            raise SidError("history", found, "Send one action and one time per event.")
        known_times = request.times[request.times >= 0]
        if len(known_times) and (np.diff(known_times) < 0).any():
            raise SidError("history_ts", "times fall", "Send the oldest event first.")
        if request.now >= 0 and len(known_times) and known_times[-1] > request.now:
            raise SidError(
                "history_ts",
                f"{known_times[-1]} is after ts {request.now}",
                "Send only events from before the request.",
            )
        if request.dense.shape != (len(request.candidates), len(self.dense_names)):
            raise SidError(
                "dense",
                f"shape {request.dense.shape}",
                f"Send {list(self.dense_names)}, each once or once per candidate.",
            )
        asked = {} if self.features is None else self.features.asked
        for name in request.features:
            if name not in asked:
                raise SidError(name, "no feature that a request states", f"It states {sorted(asked)}.")
        self._encoded(request, self._events(request))
        wrong = ~np.isfinite(request.dense)
        if wrong.any():
            row, column = np.argwhere(wrong)[0]
            raise SidError(
                self.dense_names[column],
                f"{request.dense[row, column]} for candidate {request.candidates[row]}",
                "Send finite numbers.",
            )

    def rank(self, requests: Sequence[RankRequest]) -> list[Ranked]:
        """Answers to requests that :meth:`check` took, from one run of the program.

        Raises:
            SidError: an input that the program refuses.
        """
        events = [self._events(request) for request in requests]
        sizes = [len(request.candidates) for request in requests]
        logits = self.model(self._request(requests, events, sizes))
        scores = torch.sigmoid(logits).split(sizes)
        return [
            Ranked(part.numpy(), len(request.history) - len(event.kept))
            for part, request, event in zip(scores, requests, events, strict=True)
        ]

    def _request(
        self, requests: Sequence[RankRequest], events: Sequence[_Events], sizes: list[int]
    ) -> Request:
        """Each user's history once, and all candidates."""
        items = torch.from_numpy(np.concatenate([self._places(r.candidates)[0] for r in requests]))
        lengths = torch.tensor([len(event.places) for event in events])
        ones = torch.ones(len(items), dtype=torch.int64)

        def joined(parts: Sequence[Array]) -> Tensor:
            return torch.from_numpy(np.concatenate(parts))

        places = joined([event.places for event in events])
        own = [self._encoded(request, event) for request, event in zip(requests, events, strict=True)]
        features: dict[str, Bags] = {}
        for name in self.model.inputs.features:
            if own and name in own[0]:
                found = concatenated([part[name] for part in own])
                each = lengths if name.startswith("history") else ones
                if isinstance(found, Jagged):
                    features[name] = Bags(*(torch.from_numpy(np.array(part)) for part in found))
                else:
                    features[name] = Bags(torch.from_numpy(found), each)
            elif name == "history_action":
                features[name] = Bags(joined([event.actions for event in events]), lengths)
            elif name == "history_age":
                features[name] = Bags(joined([event.ages for event in events]), lengths)
            elif name.startswith("history"):
                features[name] = Bags(self._columns[_column(name)][places], lengths)
            else:
                features[name] = Bags(self._columns[_column(name)][items], ones)
        extras = {}
        for name in self.model.inputs.extras:
            if own and name in own[0]:
                rows = torch.from_numpy(np.asarray(concatenated([part[name] for part in own])))
                extras[name] = rows if rows.dim() > 1 else rows.unsqueeze(1)
                continue
            at = places if name.startswith("history") else items
            extras[name] = self._columns[_column(name)][at]
        dense = torch.from_numpy(np.concatenate([request.dense for request in requests]))
        for name in () if self.features is None else self.features.numbers:
            number = np.asarray(concatenated([part[name] for part in own]))
            dense = torch.cat([dense, torch.from_numpy(number).unsqueeze(1)], dim=1)
        by_user = tuple(self._history)
        counts = torch.tensor(sizes) if by_user else None
        request = Request(dense, features, extras, dict(self.model.inputs.rows_of), counts, by_user)
        # Programs of earlier releases read a history for each candidate.
        return request if self.model.inputs.by_user else request.by_row()

    def _encoded(self, request: RankRequest, events: _Events) -> dict[str, Array | Jagged]:
        """The features of the specification for the candidates and the events that are kept."""
        if self.features is None:
            return {}
        index = self._columns[""].numpy()
        items = index[self._places(request.candidates)[0]]
        found: dict[str, Array | Jagged] = {}
        for key in self.features.keys:
            given = request.features.get(key)
            if key.startswith("history_"):
                if self.history_length:
                    past, count = index[events.places], len(request.history)
                    found[key] = self.features.of_events(key, given, events.newest, past, count)
            else:
                found[key] = self.features.of_candidates(key, given, items)
        return found

    def _places(self, ids: Array) -> tuple[Array, Array]:
        """Where the ids are in the columns, and which are there at all."""
        at = np.minimum(np.searchsorted(self._ids, ids), len(self._ids) - 1)
        return at, self._ids[at] == ids

    def _events(self, request: RankRequest) -> _Events:
        """The newest events that the model reads, without items that it does not know."""
        places, known = self._places(request.history)
        kept = np.flatnonzero(known)
        newest = kept[max(0, len(kept) - self.history_length) :]
        then = request.times[newest]
        now = np.full(len(then), NO_TIME if request.now < 0 else request.now)
        ages = age_bucket(now, np.where(then < 0, NO_TIME, then))
        return _Events(kept, newest, places[newest], request.actions[newest], ages)


def _index(own: pa.Array, ids: Array, index: Array) -> Array:
    """Own ids -> dense indices, -1 where unknown; ``ids`` ascend, ``index`` belongs to them."""
    if pa.types.is_integer(own.type):
        wanted = own.cast(pa.int64()).fill_null(-1).to_numpy(zero_copy_only=False)
    else:
        wanted = np.array(
            [-1 if text is None else text_id(str(text)) for text in own.to_pylist()], np.int64
        )
    at = np.minimum(np.searchsorted(ids, wanted), len(ids) - 1)
    return np.where(ids[at] == wanted, index[at], -1)


def _column(field: str) -> str:
    """What a field holds of an item: ``item_sid`` and ``history_sid`` its ``sid``, ``item`` its index."""
    return field.removeprefix("history").removeprefix("item").removeprefix("_")


class _Events(NamedTuple):
    kept: Array
    """Events whose items the model knows."""
    newest: Array
    """Those of them that it reads."""
    places: Array
    actions: Array
    ages: Array
