"""A specification guessed from what the columns of a folder look like: a draft to begin with."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as kinds

from torchrec_sid.data.event_columns import NAMES, is_text
from torchrec_sid.data.inspection import ColumnProfile, TableProfile, is_number
from torchrec_sid.data.specification import (
    RESERVED,
    CategoricalFeature,
    Counters,
    EmbeddingFeature,
    Feature,
    KeyColumns,
    LabelTask,
    NumericFeature,
    Source,
    Specification,
    column_of,
    feature_key,
)
from torchrec_sid.errors import SidError

LARGEST_VOCABULARY = 100_000
"""A column of more values is hashed, into as many rows."""
_CODES = 64
"""Whole numbers of at most so many values are categories."""
_KEY_SHARE = 0.5
"""A text of more different values than this share of its rows is a key or prose, not a category."""
_OUTCOME_AUC = 0.9
"""A column of the events that ranks the labels this well is taken for what happened after the label."""
_SEPARATORS = ("|", ";", ", ", ",")
_TIMES = (3e8, 4e12)
"""Whole numbers between these are seconds or milliseconds since 1970."""
_OUTCOME = re.compile(
    r"(^|_)(is|has|did)_|rating|stars|score|dwell|watch|play_time|playtime|duration_ms|completed|"
    r"click|like|follow|comment|share|forward|hate|purchase|bought|revenue|conversion|feedback|reward|"
    r"profile_stay|long_view|label|target",
    re.IGNORECASE,
)
"""Names of what is known only after the event."""
_OF_PREPARATION = ("split", "order", "target_no", "impression", "hist_len", "cold_holdout")
_PARTS = {
    "events.split": "split",
    "events.impression": "request",
    "events.order": "order",
    "events.target_no": "order",
    "items.title": "text",
    "items.text": "text",
    "items.cold_holdout": "hold-out",
}
"""Columns that docs/data.md names, and what they are for."""
_LABEL_OF_RATINGS = "at_least"
_CODE = re.compile(r"(id|code|no|zip|postal|zipcode)$", re.IGNORECASE)
"""Ends of names of whole numbers that count nothing."""
_NO_ITEM_FEATURES = ("title", "text", "first_seen")
_MANY_VISITS = 20
"""Events per user from which a row for each user pays."""
_SHARED = 4
"""Categories that every event of a history carries too; each is one more look-up per event."""


@dataclass(frozen=True)
class Guess:
    """A draft, and why each column that is not in it is left out."""

    specification: Specification
    uses: Mapping[str, str]
    """``TABLE.COLUMN`` -> the part that it plays, or what its feature is."""
    left_out: Mapping[str, str]
    """``TABLE.COLUMN`` -> why it is none, or of past events alone."""


def guess_specification(tables: Mapping[str, TableProfile]) -> Guess:
    """Draft a specification.

    Columns of items and users become features by their type and number of values; those of events only
    where they do not look like outcomes, since a candidate's own outcome would be a leak. Histories carry
    the outcomes too: there they are past. Counters are of items, of users, and of users by the first
    category of the items.

    Args:
        tables: of :func:`~torchrec_sid.data.inspection.profile_folder`.

    Raises:
        SidError: no events, or a part that no column plays (user, item, time, label).
    """
    if "events" not in tables:
        raise SidError("events.parquet", "no such file", "A specification describes a log of events.")
    drafter = _Drafter(tables)
    return Guess(drafter.draft(), drafter.uses, drafter.left_out)


class _Drafter:
    def __init__(self, tables: Mapping[str, TableProfile]) -> None:
        self.tables = tables
        self.uses: dict[str, str] = {}
        self.left_out: dict[str, str] = {}
        self.outcomes: list[Feature] = []
        self.names: set[str] = set(RESERVED)

    def draft(self) -> Specification:
        events = self.tables["events"]
        found = {part: _part(events, part) for part in ("user", "item", "time")}
        labels, action = _labels(events)
        keys = KeyColumns(action=action, time_unit=_unit(events.column(found["time"])), **found)
        if "items" in self.tables:
            keys = replace(keys, item_id=_part(self.tables["items"], "item_id"))
        if "users" in self.tables:
            keys = replace(keys, user_id=_part(self.tables["users"], "user_id"))
        self._say_parts(keys, labels)
        taken = {*found.values(), *(label.column for label in labels), action or "rating"}
        taken |= set(_OF_PREPARATION)
        of_items = list(self._of("item", "items", {keys.item_id, *_OF_PREPARATION, *_NO_ITEM_FEATURES}))
        of_users = list(self._of("user", "users", {keys.user_id}))
        of_events = list(self._of_events(events, taken, labels))
        of_history = list(self._of_history(of_items, of_events))
        if _visits(events, keys.user) >= _MANY_VISITS:
            user = _category("user_id", "context", events.column(keys.user).values)
            of_events.append(self._named(replace(user, column=keys.user), "events"))
        features = (*of_events, *of_users, *of_items, *of_history)
        clock = events.column(keys.time).values > 1
        counters = Counters(_counter_keys(of_items), days=7 if clock else None)
        return Specification(keys, labels, features, counters)

    def _of(self, source: Source, table: str, without: set[str | None]) -> Iterator[Feature]:
        if table not in self.tables:
            return
        profile = self.tables[table]
        for column in profile.columns:
            if column.name in without:
                continue
            made = _feature(column, profile, source)
            if isinstance(made, str):
                self.left_out[f"{table}.{column.name}"] = made
            else:
                yield self._named(made, table)

    def _of_events(
        self, events: TableProfile, taken: set[str | None], labels: tuple[LabelTask, ...]
    ) -> Iterator[Feature]:
        for column in events.columns:
            if column.name in taken:
                continue
            made = _feature(column, events, "context")
            if isinstance(made, EmbeddingFeature):
                made = "a vector of each event"
            why = made if isinstance(made, str) else _outcome(column, events, labels)
            if why is not None:
                self.left_out[f"events.{column.name}"] = why
            if not isinstance(made, str) and why is not None and not getattr(made, "multi", False):
                self.outcomes.append(made)
            elif not isinstance(made, str) and why is None:
                yield self._named(made, "events")

    def _of_history(self, of_items: list[Feature], of_events: list[Feature]) -> Iterator[Feature]:
        """What past events were like: their outcomes, and categories in the tables of the candidate's."""
        for feature in self.outcomes:
            name = _plain(feature.name)
            yield replace(feature, name=name, source="history", column=_unless(name, feature.name))
        events = self.tables["events"].sample.column_names
        shared: list[CategoricalFeature] = [
            f for f in of_events if isinstance(f, CategoricalFeature) and not f.multi
        ]
        for feature in of_items:
            # Where the events have a column of that name, the history would read that one.
            if isinstance(feature, CategoricalFeature) and not feature.multi:
                shared += [feature] if column_of(feature) not in events else []
        rich = sorted(shared, key=lambda f: f.hash_rows is not None)[:_SHARED]
        taken = {_plain(f.name) for f in self.outcomes}
        for category in rich:
            if category.name not in taken:
                yield replace(category, source="history", table=feature_key(category))

    def _say_parts(self, keys: KeyColumns, labels: tuple[LabelTask, ...]) -> None:
        for part in ("user", "item", "time", "action"):
            if getattr(keys, part) is not None:
                self.uses[f"events.{getattr(keys, part)}"] = part
        for label in labels:
            if label.column is not None:
                self.uses[f"events.{label.column}"] = "label"
        self.uses[f"items.{keys.item_id}"] = self.uses[f"users.{keys.user_id}"] = "key"
        for name, use in _PARTS.items():
            self.uses[name] = use

    def _named(self, feature: Feature, table: str) -> Feature:
        """The feature, under a name that no other has and that a specification takes."""
        kind = {CategoricalFeature: "categorical", NumericFeature: "numeric"}.get(type(feature), "vector")
        self.uses.setdefault(f"{table}.{feature.name}", kind)
        name = _plain(feature.name)
        while name in self.names:
            name = f"{feature.source}_{name}"
        self.names.add(name)
        return replace(feature, name=name, column=_unless(name, column_of(feature)))


def _plain(name: str) -> str:
    """A name as a specification takes it."""
    plain = re.sub(r"[^A-Za-z0-9_]", "_", name) or "column"
    return plain if re.match(r"[A-Za-z_]", plain) else f"_{plain}"


def _unless(name: str, column: str) -> str:
    return "" if name == column else column


def _part(table: TableProfile, part: str) -> str:
    lower = {c.name.lower(): c.name for c in table.columns}
    for name in NAMES[part]:
        if name in lower:
            return lower[name]
    raise SidError(
        f"{table.name}.parquet",
        f"no column looks like {part} (it has {', '.join(lower.values())})",
        "Write a specification with columns, or rename the column.",
    )


def _unit(time: ColumnProfile) -> Literal["s", "ms", "us"]:
    """The unit in which the latest time is within the last decades, if it is a number."""
    latest = time.high or 0.0
    return "us" if latest > 1e14 else "ms" if latest > 1e11 else "s"


def _labels(events: TableProfile) -> tuple[tuple[LabelTask, ...], str | None]:
    """A column of 0 and 1 by its name, else ratings that are better than the mean."""
    try:
        column = _part(events, "label")
    except SidError:
        rating = next((c for c in events.columns if c.name == "rating" and c.is_number), None)
        if rating is None:
            raise
        values = events.sample.column("rating").drop_null().cast(pa.float64(), safe=False)
        threshold = int(np.ceil(float(np.mean(values.to_numpy()))))
        return (LabelTask(f"{_LABEL_OF_RATINGS}_{threshold}", action=threshold),), "rating"
    return (LabelTask("label", column=column),), None


def _feature(column: ColumnProfile, table: TableProfile, source: Source) -> Feature | str:
    """The feature that a column looks like, or why it is none."""
    sample = table.sample.column(column.name)
    name, known = column.name, table.rows - column.missing
    if column.values <= 1 and not (column.is_list and kinds.is_floating(column.type.value_type)):
        return "one value" if column.values else "no values"
    if column.is_list:
        if kinds.is_floating(column.type.value_type):
            return _vector(name, sample, source)
        return replace(_category(name, source, column.values), multi=True)
    if kinds.is_boolean(column.type):
        return CategoricalFeature(name, source)
    if kinds.is_timestamp(column.type) or kinds.is_date(column.type):
        return "a time"
    if is_text(column.type):
        return _text_feature(column, sample, source, known)
    if not column.is_number:
        return f"type {column.type}"
    return _number(column, sample, source, known)


def _number(column: ColumnProfile, sample: pa.ChunkedArray, source: Source, known: int) -> Feature | str:
    numbers = sample.drop_null().cast(pa.float64(), safe=False).to_numpy()
    numbers = numbers[np.isfinite(numbers)]
    whole = bool((numbers == np.floor(numbers)).all())
    if whole and len(numbers) and (_TIMES[0] < float(np.median(numbers)) < _TIMES[1] or _is_date(numbers)):
        return "a time"
    if whole and _CODE.search(column.name):
        return _key(column, known) or _category(column.name, source, column.values)
    if whole and column.values <= _CODES:
        return CategoricalFeature(column.name, source)
    skewed = len(numbers) > 0 and float(numbers.min()) >= 0
    skewed &= float(numbers.max(initial=0)) > 20 * max(float(np.median(numbers)) if len(numbers) else 0, 1)
    return NumericFeature(column.name, source, log=skewed)


def _is_date(numbers: Any) -> bool:
    """Whether all are dates written as 20260131."""
    month, day = numbers // 100 % 100, numbers % 100
    inside = (numbers > 19_000_000) & (numbers < 22_000_000)
    return bool((inside & (month >= 1) & (month <= 12) & (day >= 1) & (day <= 31)).all())


def _text_feature(
    column: ColumnProfile, sample: pa.ChunkedArray, source: Source, known: int
) -> Feature | str:
    texts = sample.cast(pa.large_string()).drop_null()
    if pc.all(pc.match_substring_regex(texts, r"^\d{4}-\d\d(-\d\d|$)")).as_py():
        return "a time"
    for separator in _SEPARATORS:
        holding = pc.sum(pc.match_substring(texts, separator)).as_py() or 0
        parts = pc.list_flatten(pc.split_pattern(texts, separator))
        tokens = len(pc.unique(pc.utf8_trim_whitespace(parts)))
        if holding > 0.1 * len(texts) and tokens < min(0.2 * len(parts), LARGEST_VOCABULARY):
            return replace(_category(column.name, source, tokens), multi=True, separator=separator)
    return _key(column, known) or _category(column.name, source, column.values)


def _key(column: ColumnProfile, known: int) -> str | None:
    if column.values > max(_CODES, _KEY_SHARE * known):
        return f"{column.values:,} values in {known:,} rows: a key or prose"
    return None


def _category(name: str, source: Source, values: int) -> CategoricalFeature:
    hashed = LARGEST_VOCABULARY if values > LARGEST_VOCABULARY else None
    return CategoricalFeature(name, source, hash_rows=hashed)


def _vector(name: str, sample: pa.ChunkedArray, source: Source) -> Feature | str:
    lengths = pc.unique(pc.list_value_length(sample).drop_null()).to_pylist()
    if len([n for n in lengths if n]) != 1:
        return f"vectors of {len(lengths)} lengths"
    return EmbeddingFeature(name, source)


def _outcome(column: ColumnProfile, events: TableProfile, labels: tuple[LabelTask, ...]) -> str | None:
    """Why a column of the events may be known only after the label."""
    if _OUTCOME.search(column.name):
        return "an outcome, by its name"
    if column.is_list or labels[0].column is None:
        return None
    if events.column(labels[0].column).values == 1:
        return "of the positive alone: negatives are sampled"
    auc = _auc(events.sample.column(column.name), events.sample.column(labels[0].column))
    if auc is not None and auc > _OUTCOME_AUC:
        return f"an outcome: it tells the label (AUC {auc:.2f})"
    return None


def _auc(column: pa.ChunkedArray, label: pa.ChunkedArray) -> float | None:
    """How well a column of the sample ranks the labels, in the better direction; None: cannot be said."""
    from sklearn.metrics import roc_auc_score

    truth = label.cast(pa.float64(), safe=False).fill_null(0).to_numpy() > 0
    if truth.all() or not truth.any():
        return None
    if is_number(column.type):
        values = column.cast(pa.float64(), safe=False).fill_null(0).to_numpy()
        values = np.nan_to_num(values)
    else:
        coded = column.combine_chunks().dictionary_encode().indices.fill_null(-1).to_numpy() + 1
        if coded.max() > 0.01 * len(coded):
            return None  # means of few rows each say nothing
        values = (np.bincount(coded, truth) / np.maximum(np.bincount(coded), 1))[coded]
    auc = float(roc_auc_score(truth, values))
    return max(auc, 1 - auc)


def _visits(events: TableProfile, user: str) -> float:
    return events.rows / max(events.column(user).values, 1)


def _counter_keys(of_items: list[Feature]) -> tuple[str, ...]:
    categories: list[Any] = [
        f for f in of_items if isinstance(f, CategoricalFeature) and f.hash_rows is None
    ]
    best = sorted(categories, key=lambda f: not f.multi)  # genres and tags before anything else
    return ("item", "user", *(f"user x {f.name}" for f in best[:1]))
