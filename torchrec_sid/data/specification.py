"""What the columns of a log are: features, labels, keys and counters, in dataclasses and one YAML file.

docs/your_data.md shows the file. Data, models and serving read the same :class:`Specification`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from torchrec_sid.artifact.place import RemotePath, locate
from torchrec_sid.artifact.typed import MismatchError, read_typed
from torchrec_sid.errors import SidError

Source = Literal["context", "user", "item", "history"]
SOURCES: tuple[Source, ...] = ("context", "user", "item", "history")
"""Where a column stands: events.parquet of the example, users.parquet, items.parquet, or the events of the
history."""

MISSING_ROW, UNKNOWN_ROW, FIRST_ROW = 0, 1, 2
"""Rows of every categorical table: a null, a value outside the vocabulary, the first value."""

DENSE = ("log_history_length", "past_positive_rate", "log_seconds_since_last")
"""The dense features of every example, all of the user's past strictly before it."""

RESERVED = frozenset(
    ("item", "history", "history_action", "history_age", "item_sid", "history_sid")  # keys of a batch
    + ("user", "ts", "label", "action", "hist_begin", "hist_end", "segment", "event", "weight", "request")
    + ("split", "bucket", "id", "keys", "train_events")
    + DENSE
)
"""Names of what every prepared log holds of its examples, items and users, which no feature may take."""

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class CategoricalFeature:
    """One value of few or many, or a bag of them; becomes rows of an embedding table."""

    name: str
    """Unique within its source."""
    source: Source
    """Where its column stands."""
    column: str = ""
    """Column; empty: the name. A history feature whose column is not in events.parquet is the item's."""
    multi: bool = False
    """Several values: a list column, or text cut at ``separator``."""
    separator: str | None = None
    """What stands between the values of a text; blanks around values are trimmed."""
    extract: str | None = None
    """Regular expression; the value is its first group (a year in a title), missing where none matches."""
    vocabulary: tuple[str, ...] | None = None
    """The values in the order of their rows; None: those of the training period."""
    min_count: int = 1
    """A learned vocabulary keeps values that occur this often."""
    hash_rows: int | None = None
    """Hash the values into this many rows, without a vocabulary."""
    dim: int | None = None
    """Width; None: that of the model."""
    table: str | None = None
    """Table that is shared with the features that name it too; None: one of its own."""


@dataclass(frozen=True)
class NumericFeature:
    """A number: a dense input, or rows of a table by quantile."""

    name: str
    """Unique within its source."""
    source: Source
    """Where its column stands."""
    column: str = ""
    """Column; empty: the name."""
    extract: str | None = None
    """Regular expression whose first group is the number."""
    log: bool = False
    """Take sign(x) log(1 + \\|x\\|) first."""
    standardise: bool = True
    """Subtract the mean of the training period and divide by its standard deviation; missing becomes 0."""
    buckets: int | None = None
    """Rows of a table by quantiles of the training period, in the place of a dense input."""
    dim: int | None = None
    """Width of that table; None: that of the model."""
    table: str | None = None
    """Table that is shared; needs ``buckets``."""


@dataclass(frozen=True)
class EmbeddingFeature:
    """A vector: a list column of floats, or an embedding file of the items."""

    name: str
    """Unique within its source."""
    source: Source
    """Where it stands; ``item`` reads an embedding source of that name where there is no such column."""
    column: str = ""
    """Column or embedding source; empty: the name."""
    dim: int | None = None
    """Width of its projection; None: that of the model."""


@dataclass(frozen=True)
class ItemIdFeature:
    """Ids of items: one, or a list; reaches the model as any arm does."""

    name: str
    """Unique within its source."""
    source: Source
    """Where its column stands."""
    column: str = ""
    """Column; empty: the name."""
    multi: bool = False
    """A list of ids."""
    arm: str = "full_id"
    """Channels joined by ``+``, as in ``full_id+side``."""


Feature = CategoricalFeature | NumericFeature | EmbeddingFeature | ItemIdFeature

KINDS: dict[str, type[Any]] = {
    "categorical": CategoricalFeature,
    "numeric": NumericFeature,
    "embedding": EmbeddingFeature,
    "item_id": ItemIdFeature,
}
"""``kind`` in the file -> class; categorical where none is named."""


@dataclass(frozen=True)
class LabelTask:
    """Something to predict: a column of 0 and 1, or a threshold of the action."""

    name: str
    """Of the task."""
    column: str | None = None
    """Column of 0 and 1, true and false."""
    action: int | None = None
    """The label is whether the user's action is at least this."""
    weight: float = 1.0
    """Of its loss."""


@dataclass(frozen=True)
class KeyColumns:
    """Columns of events.parquet that every log has, by the names that this log gives them."""

    user: str = "user"
    item: str = "item"
    time: str = "ts"
    time_unit: Literal["s", "ms", "us"] = "s"
    """Of a time that is a number."""
    action: str | None = None
    """What the user did, 0..127; None: ``rating`` where there is one, else the first label."""
    split: str | None = None
    """Names of the splits; None: ``split`` where there is one, else by time."""
    request: str | None = None
    """Rows of one request, for metrics by request; None: ``impression`` where there is one."""
    weight: str | None = None
    """Weight of an example in the loss; None: 1."""
    item_id: str = "item_id"
    """Key of items.parquet."""
    user_id: str = "user_id"
    """Key of users.parquet."""


@dataclass(frozen=True)
class Counters:
    """Strictly past counts and smoothed rates of every label, of logged events alone.

    Each key gives ``KEY_events`` and, per label, ``KEY_LABEL_rate``, over all the past, and with ``days``
    over a window too.
    """

    keys: tuple[str, ...] = ("item", "user")
    """``item``, ``user``, the name of an item feature (its categories), or ``user x CATEGORY``."""
    days: int | None = None
    """Length of the window; None: all the past alone."""
    prior: float = 0.5
    """Rate of what has no past."""
    strength: float = 2.0
    """Events that the prior is worth."""


@dataclass(frozen=True)
class Specification:
    """A log as its owner describes it.

    Raises:
        SidError: a name twice or reserved, a field that contradicts another, an unknown counter key.
    """

    columns: KeyColumns = field(default_factory=KeyColumns)
    labels: tuple[LabelTask, ...] = (LabelTask("label", column="label"),)
    """The first is the main one: slices, past rates and sampled negatives are of it."""
    features: tuple[Feature, ...] = ()
    counters: Counters | None = None

    def __post_init__(self) -> None:
        _check_labels(self.labels)
        for feature in self.features:
            _check_feature(feature)
        further = [f"label_{label.name}" for label in self.labels]
        keys = [feature_key(f) for f in self.features]
        _refuse_twice("features", [*keys, *further, *counter_names(self)])
        self._check_tables()
        if self.counters is not None:
            _check_counters(self.counters, self.of("item", CategoricalFeature))

    def of(self, source: Source, *kinds: type[Any]) -> tuple[Any, ...]:
        """The features of a source, of some kinds or of all."""
        return tuple(f for f in self.features if f.source == source and isinstance(f, kinds or object))

    def _check_tables(self) -> None:
        """Features that share a table agree in what makes its rows."""
        first: dict[str, Any] = {}
        for feature in self.features:
            table = getattr(feature, "table", None)
            if table is None:
                continue
            other = first.setdefault(table, feature)
            for name in ("dim", "hash_rows", "vocabulary", "min_count", "buckets"):
                mine, theirs = getattr(feature, name, None), getattr(other, name, None)
                if type(feature) is not type(other) or mine != theirs:
                    raise SidError(
                        f"table {table!r}",
                        f"{name} {theirs} of {feature_key(other)}, {mine} of {feature_key(feature)}",
                        "Features of one table have the same kind, dim, rows and vocabulary.",
                    )

    def to_yaml(self) -> str:
        """The file that :meth:`read` reads."""
        body: dict[str, Any] = {}
        columns = _changed(self.columns)
        if columns:
            body["columns"] = columns
        body["labels"] = {label.name: _changed(label, "name") for label in self.labels}
        kinds = {kind: name for name, kind in KINDS.items()}
        for feature in self.features:
            entry = _changed(feature, "name", "source")
            if not isinstance(feature, CategoricalFeature):
                entry = {"kind": kinds[type(feature)], **entry}
            body.setdefault("features", {}).setdefault(feature.source, {})[feature.name] = entry
        if self.counters is not None:
            body["counters"] = _changed(self.counters)
        return yaml.safe_dump(body, sort_keys=False)

    @classmethod
    def read(cls, path: str | Path | RemotePath) -> Specification:
        """Read a file, local or behind a URI.

        Raises:
            SidError: missing, not YAML, an unknown name, a value of another type, a contradiction.
        """
        place = locate(path)
        try:
            with place.open_bytes() if isinstance(place, RemotePath) else place.open("rb") as file:
                body = yaml.safe_load(file.read().decode())
        except OSError as error:
            raise SidError(
                str(path), f"cannot be read ({error.strerror or error})", "Name a file."
            ) from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise SidError(str(path), f"is not YAML ({error})", "Mend it at that line.") from error
        return cls.from_plain(body, str(path))

    @classmethod
    def from_plain(cls, body: Any, where: str = "specification") -> Specification:
        """From what YAML or JSON holds.

        Raises:
            SidError: as :meth:`read`.

        Example:
            >>> found = Specification.from_plain({"features": {"user": {"age": {"kind": "numeric"}}}})
            >>> found.features[0].name
            'age'
        """
        try:
            body = _mapping(body or {}, "the file")
            _known(body, ("columns", "labels", "features", "counters"), "the file")
            columns = read_typed(KeyColumns, body.get("columns", {}), "columns")
            labels = cls.labels
            if "labels" in body:
                entries = _mapping(body["labels"], "labels")
                labels = tuple(_named(LabelTask, name, v, f"labels.{name}") for name, v in entries.items())
            counters = None
            if body.get("counters") is not None:
                counters = read_typed(Counters, body["counters"], "counters")
            return cls(columns, labels, tuple(_read_features(body.get("features", {}))), counters)
        except MismatchError as error:
            raise SidError(f"{where}, {error.at}", error.found, error.wanted) from error

    def to_plain(self) -> dict[str, Any]:
        """As JSON holds it, for manifests; :meth:`from_plain` reads it back."""
        plain: dict[str, Any] = yaml.safe_load(self.to_yaml())
        return plain


def feature_key(feature: Feature) -> str:
    """What a feature is called in a batch: its name, of the history ``history_NAME``."""
    return f"history_{feature.name}" if feature.source == "history" else feature.name


def column_of(feature: Feature) -> str:
    """The column that a feature reads."""
    return feature.column or feature.name


def counter_names(specification: Specification) -> tuple[str, ...]:
    """Names of the counters' columns, in the order in which examples carry them."""
    counters = specification.counters
    if counters is None:
        return ()
    windows = [""] if counters.days is None else ["", f"_{counters.days}d"]
    names = []
    for key in counters.keys:
        stem = key.replace(" ", "")
        for window in windows:
            names.append(f"{stem}_events{window}")
            names += [f"{stem}_{label.name}_rate{window}" for label in specification.labels]
    return tuple(names)


def _read_features(body: Any) -> Iterable[Feature]:
    sources = _mapping(body, "features")
    _known(sources, SOURCES, "features")
    for source, entries in sources.items():
        for name, entry in _mapping(entries or {}, f"features.{source}").items():
            at = f"features.{source}.{name}"
            values = dict(_mapping(entry or {}, at))
            kind = values.pop("kind", "categorical")
            if not isinstance(kind, str) or kind not in KINDS:
                raise MismatchError(f"{at}.kind", repr(kind), _choose(str(kind), KINDS))
            yield _named(KINDS[kind], name, values, at, source=source)


def _named(kind: type[Any], name: str, entry: Any, at: str, **more: Any) -> Any:
    values = dict(_mapping(entry or {}, at))
    allowed = [f.name for f in fields(kind) if f.name not in ("name", "source")]
    _known(values, allowed, at)
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise MismatchError(at, f"the name {name!r}", "Use letters, digits and underscores.")
    return read_typed(kind, {"name": name, **more, **values}, at)


def _mapping(value: Any, at: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise MismatchError(at, f"{value!r}", "It must be a mapping of names to values.")
    return value


def _known(values: Mapping[Any, Any], names: Iterable[str], at: str) -> None:
    for name in values:
        if name not in list(names):
            raise MismatchError(at, f"unknown key {name!r}", _choose(str(name), names))


def _choose(found: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(found), list(names), 1)  # YAML has numbers for names too
    return f"Did you mean {near[0]!r}?" if near else f"Choose from {', '.join(names)}."


def _changed(value: Any, *without: str) -> dict[str, Any]:
    """The fields that differ from their defaults, as plain values."""
    out = {}
    plain = asdict(value)
    for f in fields(value):
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        if f.name not in without and getattr(value, f.name) != default:
            entry = plain[f.name]
            out[f.name] = list(entry) if isinstance(entry, tuple) else entry
    return out


def _refuse_twice(where: str, names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise SidError(where, f"{name!r} occurs twice", "Give each a name of its own.")
        seen.add(name)


def _check_labels(labels: tuple[LabelTask, ...]) -> None:
    if not labels:
        raise SidError("labels", "none", "Name at least one.")
    _refuse_twice("labels", [label.name for label in labels])
    for label in labels:
        if (label.column is None) == (label.action is None):
            found = f"column {label.column!r}, action {label.action!r}"
            raise SidError(f"labels.{label.name}", found, "Give a column or an action, one of the two.")
        if label.action is not None and not 1 <= label.action <= 127:
            raise SidError(f"labels.{label.name}.action", f"{label.action}", "Use 1..127.")
        if not label.weight >= 0:
            raise SidError(f"labels.{label.name}.weight", f"{label.weight}", "A weight is 0 or more.")


def _check_feature(feature: Feature) -> None:
    at = f"features.{feature.source}.{feature.name}"
    if feature_key(feature) in RESERVED:
        raise SidError(
            at,
            "every log has something else of this name",
            f"Choose another name, and say column: {column_of(feature)}.",
        )
    dim = getattr(feature, "dim", None)
    if dim is not None and dim < 1:
        raise SidError(f"{at}.dim", f"{dim}", "Choose 1 or more, or leave it out.")
    extract = getattr(feature, "extract", None)
    if extract is not None:
        try:
            groups = re.compile(extract).groups
        except re.error as error:
            raise SidError(f"{at}.extract", f"{extract!r} ({error})", "Mend the expression.") from error
        if groups < 1:
            raise SidError(f"{at}.extract", f"{extract!r} has no group", "Put brackets around the value.")
    if isinstance(feature, CategoricalFeature):
        _check_categorical(feature, at)
    if isinstance(feature, NumericFeature):
        if feature.buckets is not None and not 2 <= feature.buckets <= 10_000:
            raise SidError(f"{at}.buckets", f"{feature.buckets}", "Choose 2 to 10,000.")
        if feature.buckets is None and feature.table is not None:
            raise SidError(f"{at}.table", f"{feature.table!r}", "A table needs buckets.")


def _check_categorical(feature: CategoricalFeature, at: str) -> None:
    if feature.vocabulary is not None:
        if feature.hash_rows is not None:
            raise SidError(at, "a vocabulary and hash_rows", "Give one of the two.")
        _refuse_twice(f"{at}.vocabulary", feature.vocabulary)
    if feature.hash_rows is not None and not 1 <= feature.hash_rows < 2**31:
        raise SidError(f"{at}.hash_rows", f"{feature.hash_rows}", "Choose 1 to 2**31 - 1.")
    if feature.min_count < 1:
        raise SidError(f"{at}.min_count", f"{feature.min_count}", "Choose 1 or more.")
    if feature.separator is not None and (not feature.separator or not feature.multi):
        raise SidError(
            f"{at}.separator", f"{feature.separator!r}", "Set multi: true, and name what separates values."
        )


def _check_counters(counters: Counters, categories: tuple[CategoricalFeature, ...]) -> None:
    names = [c.name for c in categories]
    known = ["item", "user", *names, *(f"user x {name}" for name in names)]
    for key in counters.keys:
        if key not in known:
            raise SidError("counters.keys", f"{key!r}", _choose(key, known))
    _refuse_twice("counters.keys", counters.keys)
    if counters.days is not None and counters.days < 1:
        raise SidError("counters.days", f"{counters.days}", "Choose 1 or more, or leave it out.")
    if not 0 <= counters.prior <= 1 or not counters.strength > 0:
        raise SidError(
            "counters", f"prior {counters.prior}, strength {counters.strength}", "Use 0..1, and above 0."
        )
