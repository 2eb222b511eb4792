"""Which column of a log plays which part, by a specification or by the names that people use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.types as kinds

from torchrec_sid.data.lake import ParquetTable, key_kind
from torchrec_sid.data.specification import (
    EmbeddingFeature,
    Feature,
    KeyColumns,
    LabelTask,
    Specification,
    column_of,
)
from torchrec_sid.errors import SidError

_ITEMS = [
    "product_id",
    "sku",
    "asin",
    "parent_asin",
    "movie_id",
    "video_id",
    "article_id",
    "news_id",
    "ad_id",
    "adgroup_id",
    "creative_id",
    "goods_id",
    "content_id",
    "post_id",
    "doc_id",
    "song_id",
    "track_id",
    "book_id",
    "isbn",
    "business_id",
]
_USERS = [
    "uid",
    "userid",
    "member_id",
    "customer_id",
    "visitor_id",
    "account_id",
    "reviewer_id",
    "reviewerid",
]
_TIMES = [
    "ts",
    "timestamp",
    "time",
    "event_time",
    "time_stamp",
    "time_ms",
    "timestamp_ms",
    "datetime",
    "event_timestamp",
    "unix_time",
    "created_at",
    "date",
]
_LABELS = [
    "label",
    "click",
    "clicked",
    "is_click",
    "is_clicked",
    "clk",
    "purchased",
    "bought",
    "is_purchase",
    "like",
    "liked",
    "is_like",
    "conversion",
    "converted",
    "target",
]
NAMES: dict[str, tuple[str, ...]] = {
    "user": ("user", "user_id", *_USERS),
    "item": ("item", "item_id", "iid", "itemid", *_ITEMS),
    "time": tuple(_TIMES),
    "label": tuple(_LABELS),
    "item_id": ("item_id", "item", "id", "iid", "itemid", *_ITEMS),
    "user_id": ("user_id", "user", "id", *_USERS),
}
"""What people call the columns that every log has, the likeliest first."""


@dataclass(frozen=True)
class EventColumns:
    """The parts of events.parquet."""

    user: str
    item: str
    time: str
    labels: tuple[LabelTask, ...]
    action: str | None
    """None: the first label."""
    split: str | None
    request: str | None
    weight: str | None
    key: str | None
    """Joins events with given histories."""
    extra: tuple[str, ...]
    """Columns that features of context and history read."""
    per_second: int = 1
    """Units of a time that is a number."""

    @property
    def label(self) -> str:
        """Column of the main label; the action's where it is a threshold."""
        column = self.labels[0].column or self.action
        assert column is not None
        return column


def named_column(table: ParquetTable, part: str, wanted: str | None) -> str:
    """The column that plays a part: the one that is asked for, else the likeliest name that is there.

    Raises:
        SidError: there is none.
    """
    default = getattr(KeyColumns(), part, part)
    if wanted is not None and (wanted in table.names or wanted != default):
        candidates: tuple[str, ...] = (wanted,)
    else:
        candidates = NAMES[part]
    lower = {name.lower(): name for name in table.names}
    for name in candidates:
        if name.lower() in lower:
            return lower[name.lower()]
    wanted = wanted or default
    raise SidError(
        table.where,
        f"no column {wanted!r} (it has {table.names})",
        f"Add {wanted!r}, or name its column in a specification.",
    )


def event_columns(
    table: ParquetTable, specification: Specification | None, key: str | None, action: str | None
) -> EventColumns:
    """Find the parts of events.parquet and check their types.

    Args:
        table: the events.
        specification: what the log's owner says; None: names that people use.
        key: column that joins given histories.
        action: column of the action, where the configuration names one.

    Raises:
        SidError: a column that is not there, or of a type that cannot play its part.
    """
    spec = specification or Specification()
    c = spec.columns
    labels = spec.labels
    if specification is None:
        labels = (replace(labels[0], column=named_column(table, "label", None)),)
    found = EventColumns(
        user=named_column(table, "user", c.user),
        item=named_column(table, "item", c.item),
        time=named_column(table, "time", c.time),
        labels=labels,
        action=_action(table, action or c.action, labels),
        split=c.split or ("split" if "split" in table.names else None),
        request=c.request or ("impression" if "impression" in table.names else None),
        weight=c.weight,
        key=key,
        extra=_extra(table, spec),
        per_second={"s": 1, "ms": 1_000, "us": 1_000_000}[c.time_unit],
    )
    _check_types(table, found)
    return found


def _action(table: ParquetTable, named: str | None, labels: Sequence[LabelTask]) -> str | None:
    if named is not None:
        return named
    if "rating" in table.names:
        return "rating"
    if labels[0].column is None:
        raise SidError(table.where, "a label is a threshold, but nothing says what the action is",
                       "Name columns.action in the specification.")  # fmt: skip
    return None


def _extra(table: ParquetTable, specification: Specification) -> tuple[str, ...]:
    columns = []
    for feature in specification.features:
        column = column_of(feature)
        if feature.source == "context" and column not in table.names:
            raise missing_column(feature, table)
        if feature.source in ("context", "history") and column in table.names:
            columns.append(column)
    return tuple(dict.fromkeys(columns))


def missing_column(feature: Feature, table: ParquetTable) -> SidError:
    """The error for a feature whose column is not there."""
    column, at = column_of(feature), f"features.{feature.source}.{feature.name}"
    more = " or embedding source" if isinstance(feature, EmbeddingFeature) else ""
    return SidError(
        at, f"{table.where} has no column{more} {column!r}", f"Choose from {', '.join(table.names)}."
    )


def _check_types(table: ParquetTable, c: EventColumns) -> None:
    wanted = [(c.user, "key"), (c.item, "key"), (c.time, "time")]
    wanted += [(label.column, "number") for label in c.labels if label.column is not None]
    wanted += [(name, kind) for name, kind in ((c.action, "number"), (c.split, "text")) if name is not None]
    wanted += [(name, kind) for name, kind in ((c.weight, "number"), (c.key, "key")) if name is not None]
    wanted += [(c.request, "key")] if c.request is not None else []
    for name, kind in wanted:
        if name not in table.names:
            raise SidError(
                table.where, f"no column {name!r} (it has {table.names})", f"Add {name!r}, {_WORDS[kind]}."
            )
        found = table.schema.field(name).type
        if not _FITS[kind](found):
            raise SidError(
                table.where,
                f"column {name!r} has type {found}",
                f"Write it as {_WORDS[kind]}; see docs/data.md.",
            )


def _is_number(kind: pa.DataType) -> bool:
    return (
        kinds.is_integer(kind)
        or kinds.is_floating(kind)
        or kinds.is_decimal(kind)
        or kinds.is_boolean(kind)
    )


def is_text(kind: pa.DataType) -> bool:
    """Whether an Arrow type is text."""
    return bool(kinds.is_string(kind) or kinds.is_large_string(kind))


def _is_time(kind: pa.DataType) -> bool:
    moment = kinds.is_timestamp(kind) or kinds.is_date(kind) or is_text(kind)
    return moment or (_is_number(kind) and not kinds.is_boolean(kind))


_FITS = {
    "key": lambda kind: key_kind(kind) is not None,
    "time": _is_time,
    "number": _is_number,
    "text": is_text,
}
_WORDS = {
    "key": "integer or text",
    "time": "integer seconds, a timestamp or a date",
    "number": "integer 0 or 1, or a boolean",
    "text": "text",
}
