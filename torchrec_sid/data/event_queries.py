"""The queries of a preparation, from raw events to what each event may know. One text for every engine.

Times are int64 seconds, users and items dense indices. "Strictly past" is a window that ends one second
before the event, so that events of one moment do not see each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ibis
import pyarrow.types as kinds

from torchrec_sid.data.engines import ROW, Engine, Table
from torchrec_sid.data.event_columns import EventColumns, is_text
from torchrec_sid.data.examples import SPLITS
from torchrec_sid.data.lake import ParquetTable, key_kind

SECONDS_LIMIT = 100_000_000_000
"""The year 5138: larger times are milliseconds."""

_DAY = 86_400


def typed_events(raw: Table, source: ParquetTable, columns: EventColumns, engine: Engine) -> Table:
    """Raw events -> columns of known types; what cannot be read becomes null, for the checks to find.

    Returns:
        ``event`` int64, ``user`` and ``item`` int64 or text, ``ts`` int64, ``label`` and ``label_NAME``
        int8,
        ``action`` int16, ``split`` int8 (-1: by time), ``key`` (-1 or null without one), ``request``,
        ``weight`` float32, ``order`` and ``target_no`` where they are, and the columns of features as
        ``extra_COLUMN``.
    """

    def key(name: str) -> Any:
        return (
            whole_number(raw[name]) if key_kind(source.schema.field(name).type) == "integer" else raw[name]
        )

    action: Any = whole_number(raw[columns.action]) if columns.action else None
    labels = {}
    for number, label in enumerate(columns.labels):
        value = (
            whole_number(raw[label.column])
            if label.column is not None
            else (action >= label.action).cast("int64")
        )
        labels["label" if number == 0 else f"label_{label.name}"] = value
    out = {
        "event": raw[ROW],
        "user": key(columns.user),
        "item": key(columns.item),
        "ts": _seconds(raw[columns.time], source, columns, engine),
        **labels,
        "action": labels["label"] if action is None else action,
    }
    out["split"] = _split_number(raw[columns.split]) if columns.split else ibis.literal(-1, "int8")
    if columns.key:
        out["key"] = key(columns.key)
    if columns.request:
        out["request"] = key(columns.request)
    if columns.weight:
        out["weight"] = raw[columns.weight].cast("float32")
    for name in ("order", "target_no"):
        if name in source.names:
            out[name] = (
                whole_number(raw[name]) if kinds.is_integer(source.schema.field(name).type) else raw[name]
            )
    out |= {f"extra_{name}": raw[name] for name in columns.extra}
    return raw.select(**out)


def with_items(events: Table, items: Table) -> Table:
    """Add ``index`` (null: not in items.parquet, -1: without an embedding) and ``release``."""
    joined = events.left_join(items, events.item == items.key)
    return joined.select(*[events[name] for name in events.columns], items["index"], items.release)


def split_by_time(events: Table, starts: list[int]) -> Table:
    """Fill in ``split`` by the times at which valid and test begin."""
    split = (events.ts >= starts[0]).cast("int8") + (events.ts >= starts[1]).cast("int8")
    return events.mutate(split=split.cast("int8"))


def known_users(events: Table, buckets: int, positives_only: bool) -> Table:
    """Users in order of their first row: ``user`` (own id), ``index``, ``bucket``, ``stored`` events."""
    counted = events.label.nullif(0).count() if positives_only else events.event.count()
    users = events.group_by("user").aggregate(first=events.event.min(), stored=counted)
    users = users.mutate(index=ibis.row_number().over(ibis.window(order_by=users["first"])))
    users = users.mutate(bucket=user_bucket(users["index"], buckets))
    before = users.stored.sum().over(
        ibis.window(group_by=users.bucket, order_by=users["index"], preceding=(None, 1))
    )
    return users.mutate(begin=before.fill_null(0).cast("int64"))


def user_bucket(index: Any, buckets: int) -> Any:
    """Dense user indices below 2^31 -> buckets, by Knuth's multiplicative hash: integers below 2^63 only,
    which every engine computes alike."""
    mixed = (index.cast("int64") * 2_654_435_761) % 2**32
    return ((mixed // 2**16) % buckets).cast("int32")


def strictly_past(events: Table, users: Table, positives_only: bool) -> Table:
    """What each event may know of its user.

    Returns:
        The events with ``user`` (dense), ``bucket``, ``seen`` events and ``liked`` ones strictly before,
        ``last`` time among them (null without one), ``hist_begin`` and ``hist_end`` in the bucket's store.
    """
    own = events.join(users, events.user == users.user)
    own = own.select(
        *[events[name] for name in events.columns if name != "user"],
        user=users["index"].cast("int64"),
        bucket=users.bucket,
        hist_begin=users.begin,
    )
    past = ibis.range_window(group_by=own.user, order_by=own.ts, preceding=(None, 1))
    own = own.mutate(
        seen=ibis.rank().over(ibis.window(group_by=own.user, order_by=own.ts)).cast("int64"),
        liked=own.label.nullif(0).count().over(past).cast("int64"),
        last=own.ts.max().over(past),
    )
    return own.mutate(hist_end=own.hist_begin + (own.liked if positives_only else own.seen))


def store_rows(past: Table, positives_only: bool, extra: tuple[str, ...]) -> Table:
    """Events of the histories: by bucket, user and time."""
    kept = past.filter(past.label == 1) if positives_only else past
    more = [f"extra_{name}" for name in extra]
    return kept.order_by("bucket", "user", "ts", "event").select(
        "bucket", "user", "item", "ts", "action", *more
    )


def with_negatives(past: Table, draws: Table | None) -> Table:
    """Examples: the logged events as ``slot`` 0, and drawn negatives with the past of their positive."""
    logged = past.mutate(slot=ibis.literal(0, "int32"))
    if draws is None:
        return logged
    drawn = past.join(draws, past.event == draws.event)
    no = {
        name: ibis.literal(0).cast(past[name].type()) for name in past.columns if name.startswith("label")
    }
    drawn = drawn.select(
        *[past[name] for name in past.columns if name not in ("item", "action", *no)],
        item=draws.item,
        action=ibis.literal(0).cast(past.action.type()),
        slot=draws.slot,
        **no,
    ).select(*logged.columns)
    return logged.union(drawn, distinct=False)


def with_given(past: Table, ranges: Table) -> Table:
    """Events whose history is given take that one: its range, its length, its last time as ``given_last``.

    Args:
        past: of :func:`strictly_past`.
        ranges: ``bucket``, ``key``, ``begin``, ``end``, ``last`` (null where no time is known).
    """
    same = [past.bucket == ranges.bucket, past.key == ranges.key]
    joined = past.left_join(ranges, same)
    found, length = ranges.begin.notnull(), ranges.end - ranges.begin
    replaced = {
        "hist_begin": ibis.ifelse(found, ranges.begin, past.hist_begin),
        "hist_end": ibis.ifelse(found, ranges.end, past.hist_end),
        "seen": ibis.ifelse(found, length, past.seen),
        "liked": ibis.ifelse(found, length, past.liked),
        "last": ibis.ifelse(found, ranges["last"], past["last"]),
    }
    kept = [past[name] for name in past.columns if name not in replaced]
    return joined.select(*kept, **replaced, given=found, given_last=ranges["last"])


@dataclass(frozen=True)
class CounterKey:
    """One key of the counters."""

    name: str
    """As in the specification, without blanks."""
    user: bool
    """Whether counts are of the user's own events."""
    categories: Table | None
    """``item``, ``category`` of an item feature; None: the item or the user itself."""


def count_past(rows: Table, key: CounterKey, labels: Mapping[str, str], days: int | None) -> Table:
    """Counts of logged events strictly before each example, by one key.

    Returns:
        ``event``, ``slot``, and int64 ``KEY_events`` and, for the positives of each label,
        ``KEY_LABEL_rate``,
        over all the past and with ``_{days}d`` over the last days. Of an example of several categories:
        sums over them. ``labels`` are columns and the names of their labels.
    """
    part = rows.select("event", "slot", "ts", "user", "item", *labels)
    if key.categories is None:
        groups = ["user"] if key.user else ["item"]
    else:
        joined = part.join(key.categories, part.item == key.categories.item)
        part = joined.select(*[part[n] for n in part.columns], key.categories.category)
        groups = ["user", "category"] if key.user else ["category"]
    windows = {"": (None, 1)} | ({} if days is None else {f"_{days}d": (days * _DAY, 1)})
    counts = {}
    for suffix, preceding in windows.items():
        window = ibis.range_window(
            group_by=[part[g] for g in groups], order_by=part.ts, preceding=preceding
        )
        logged = part.slot == 0
        counts[f"{key.name}_events{suffix}"] = _times(logged).over(window).cast("int64")
        for column, label in labels.items():
            positive = _times(logged & (part[column] == 1)).over(window)
            counts[f"{key.name}_{label}_rate{suffix}"] = positive.cast("int64")
    found = part.select("event", "slot", **counts)
    if key.categories is None:
        return found
    sums = {name: found[name].sum().cast("int64") for name in counts}
    return found.group_by("event", "slot").aggregate(**sums)


def _times(condition: Any) -> Any:
    return ibis.ifelse(condition, 1, ibis.null("int8")).count()


def whole_number(column: Any) -> Any:
    """A number as int64, null where it is none or has a fraction."""
    kind = column.type()
    if kind.is_boolean():
        return column.cast("int64")
    if kind.is_integer() and not kind.is_unsigned_integer():
        return column.cast("int64")
    if kind.is_integer() or kind.is_decimal():
        whole = column.try_cast("int64")
        return ibis.ifelse(whole.cast(kind) == column, whole, ibis.null("int64"))
    # Engines may compute both branches: nothing here fails on NaN or on what has no place in int64.
    whole = (column.abs() < 2.0**62) & (column % 1 == 0)
    return ibis.ifelse(whole, column, ibis.null(kind)).try_cast("int64")


def _seconds(column: Any, source: ParquetTable, columns: EventColumns, engine: Engine) -> Any:
    kind = source.schema.field(columns.time).type
    if kinds.is_timestamp(kind) or kinds.is_date(kind) or is_text(kind):
        if is_text(kind):
            column = column.try_cast("timestamp")
        micros = engine.microseconds(column)
        # A time before 1970 is refused, not taken for "unknown".
        return ibis.ifelse(micros < 0, -2, micros // 1_000_000).cast("int64")
    unit = columns.per_second
    if kinds.is_integer(kind):
        whole = whole_number(column)
        # What is below 0 is no time, or unknown: it stays what it is.
        return whole if unit == 1 else ibis.ifelse(whole < 0, whole, whole // unit).cast("int64")
    value = column.cast("float64")
    second = value if unit == 1 else value / unit
    # -1 is unknown, what else is below 0 is refused.
    whole = ibis.cases((value == -1, -1.0), (value < 0, -2.0), else_=second - second % 1)
    return ibis.ifelse(whole.abs() < 2.0**62, whole, ibis.null("float64")).try_cast("int64")


def _split_number(column: Any) -> Any:
    cases = [(column == name, ibis.literal(number, "int8")) for number, name in enumerate(SPLITS)]
    return ibis.cases(*cases, else_=ibis.null("int8"))


def either(condition: Any, then: Any, otherwise: Any) -> Any:
    """``then`` where the condition holds, else ``otherwise``."""
    return ibis.ifelse(condition, then, otherwise)


def distinct_times(events: Table) -> Table:
    """The different values of ``ts``."""
    return events.select("ts").distinct()
