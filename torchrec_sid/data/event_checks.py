"""Checks of events.parquet as one query that finds the first bad row, and what else one pass can tell."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import ibis

from torchrec_sid.data.engines import ROW, Engine, Table, one_row
from torchrec_sid.data.event_columns import EventColumns
from torchrec_sid.data.event_queries import SECONDS_LIMIT
from torchrec_sid.data.examples import SPLITS
from torchrec_sid.data.lake import ParquetTable
from torchrec_sid.errors import SidError

Row = dict[str, Any]


class _Check(NamedTuple):
    """One way in which a row can be bad."""

    bad: Any
    """Boolean expression."""
    found: Callable[[Row, Row], str]
    """Raw row, typed row -> what is wrong, with ``{row}`` for the place."""
    remedy: str


@dataclass(frozen=True)
class EventStatistics:
    """What one pass over checked events learns; of the events whose item is known."""

    rows: int
    positives: int
    without_embedding: int
    actions: int
    """Largest action + 1."""
    clock: bool
    """Whether there are times; without, ``order`` stands for them."""


def check_events(
    engine: Engine,
    raw: Table,
    events: Table,
    source: ParquetTable,
    columns: EventColumns,
    drop_bare: bool,
) -> EventStatistics:
    """Refuse the first bad row.

    Args:
        engine: runs the queries.
        raw: the rows as they stand.
        events: those of :func:`~torchrec_sid.data.event_queries.with_items`.
        source: where they come from.
        columns: what the columns are called.
        drop_bare: whether events on items without an embedding are left out; if not, they are bad.

    Raises:
        SidError: naming the row and its value.
    """
    clocked = one_row(
        engine,
        events.aggregate(
            rows=events.event.count(),
            unknown=_times(events.ts == -1),
            first_unknown=events.event.min(where=events.ts == -1),
            first_known=events.event.min(where=events.ts != -1),
            negative=_times(events.ts < -1),
        ),
    )
    clock = _has_clock(clocked, engine, events, source, columns)
    checks = [*_null_checks(events, columns, clock), *_value_checks(events, columns, clock)]
    checks += _item_checks(events, columns, drop_bare)
    firsts = events.aggregate(**{f"c{i}": events.event.min(where=c.bad) for i, c in enumerate(checks)})
    found = one_row(engine, firsts)
    bad = {i: row for i in range(len(checks)) if (row := found[f"c{i}"]) is not None}
    if bad:
        first = min(bad, key=lambda i: (bad[i], i))
        _refuse(engine, raw, events, source, checks[first], bad[first])
    return _statistics(engine, events, clock)


def check_split_order(engine: Engine, events: Table, where: str) -> None:
    """Refuse splits that overlap in time.

    Raises:
        SidError: naming the two and their times.
    """
    spans = {}
    for number in range(3):
        inside = events.split == number
        spans[f"first{number}"] = events.ts.min(where=inside)
        spans[f"last{number}"] = events.ts.max(where=inside)
    found = one_row(engine, events.aggregate(**spans))
    for a, b in ((0, 1), (1, 2), (0, 2)):
        last, first = found[f"last{a}"], found[f"first{b}"]
        if last is not None and first is not None and last > first:
            raise SidError(
                where,
                f"{SPLITS[a]} reaches to ts {last}, {SPLITS[b]} begins at {first}",
                "Split by time, or a history shows labels of a later split; "
                "without a split column the log is split by time quantiles.",
            )


def _statistics(engine: Engine, events: Table, clock: bool) -> EventStatistics:
    known = events["index"] >= 0
    found = one_row(
        engine,
        events.aggregate(
            rows=_times(known),
            positives=_times(known & (events.label == 1)),
            bare=_times(~known),
            action=events.action.max(where=known),
        ),
    )
    return EventStatistics(
        found["rows"], found["positives"], found["bare"], int(found["action"] or 0) + 1, clock
    )


def _has_clock(
    found: dict[str, Any], engine: Engine, events: Table, source: ParquetTable, columns: EventColumns
) -> bool:
    rows, unknown = found["rows"], found["unknown"]
    if not unknown:
        return True
    if unknown == rows:
        return False
    name = columns.time
    if 2 * unknown >= rows:
        row = found["first_known"]
        value = one_row(engine, events.filter(events.event == row).select("ts"))["ts"]
        what = f"{name} is {value} at {source.position(row)}, -1 in {unknown} of {rows} rows"
    else:
        row = found["first_unknown"]
        what = f"{name} is -1 at {source.position(row)}, known in {rows - unknown} of {rows} rows"
    raise SidError(source.where, what, "Give all times or none; -1 in every row says that none is known.")


def _null_checks(events: Table, columns: EventColumns, clock: bool) -> list[_Check]:
    names = {"user": columns.user, "item": columns.item, "ts": columns.time}
    for number, label in enumerate(columns.labels):
        if label.column is not None:
            names["label" if number == 0 else f"label_{label.name}"] = label.column
    if columns.action is not None:
        names["action"] = columns.action
    if columns.split is not None:
        names["split"] = columns.split
    for part in ("key", "request", "weight"):
        column = getattr(columns, part)
        if column is not None:
            names[part] = column
    if not clock:
        names |= {part: part for part in ("order", "target_no") if part in events.columns}

    def check(part: str, column: str) -> _Check:
        def found(raw: Row, _: Row) -> str:
            if raw[column] is None:
                return f"column {column!r} is null at {{row}}"
            if part == "split":
                return f"split {raw[column]!r} at {{row}}"
            return f"{column} is {raw[column]} at {{row}}"

        remedy = "Fill or drop the rows without a value."
        if part == "split":
            remedy = f"Use {', '.join(SPLITS)}."
        elif part.startswith("label"):
            remedy = "Use 0..1."
        elif part == "action":
            remedy = "Use 0..127."
        elif part in ("user", "item", "key", "request"):
            remedy = "Use whole numbers up to 2^63 - 1, or text, in every row."
        elif part == "ts":
            remedy = "Write int64 seconds since 1970, a timestamp or a date in every row."
        return _Check(events[part].isnull(), found, remedy)

    return [check(part, column) for part, column in names.items()]


def _value_checks(events: Table, columns: EventColumns, clock: bool) -> list[_Check]:
    checks = []
    for name in (n for n in events.columns if n == "label" or n.startswith("label_")):
        number = next(
            label
            for i, label in enumerate(columns.labels)
            if name == ("label" if i == 0 else f"label_{label.name}")
        )
        checks.append(_range_check(events[name], number.column or number.name, name, 0, 1))
    action = columns.action or columns.label
    checks.append(_range_check(events.action, action, "action", 0, 127))
    if clock:
        bad = (events.ts < 0) | (events.ts > SECONDS_LIMIT)
        checks.append(
            _Check(
                bad,
                lambda raw, _: f"{columns.time} is {raw[columns.time]} at {{row}}",
                "Write int64 seconds since 1970, or name columns.time_unit in a specification; -1 in every "
                "row where no time is known.",
            )
        )
    if "weight" in events.columns:
        weight = columns.weight or ""
        checks.append(
            _Check(
                ~((events.weight >= 0) & (events.weight < float("inf"))),
                lambda raw, _: f"{weight} is {raw[weight]} at {{row}}",
                "A weight is 0 or more.",
            )
        )
    return checks


def _range_check(column: Any, called: str, part: str, low: int, high: int) -> _Check:
    return _Check(
        (column < low) | (column > high),
        lambda raw, typed: f"{called} is {raw.get(called, typed[part])} at {{row}}",
        f"Use {low}..{high}.",
    )


def _item_checks(events: Table, columns: EventColumns, drop_bare: bool) -> list[_Check]:
    checks = [
        _Check(
            events["index"].isnull() & events.item.notnull(),
            lambda raw, _: f"item {raw[columns.item]} at {{row}} is not in items.parquet",
            "Add it.",
        )
    ]
    if not drop_bare:
        checks.append(
            _Check(
                events["index"] == -1,
                lambda raw, _: f"item {raw[columns.item]} at {{row}} has no embedding",
                "Add one, or open the folder with missing_embedding='drop'.",
            )
        )
    return checks


def _refuse(
    engine: Engine, raw: Table, events: Table, source: ParquetTable, check: _Check, row: int
) -> None:
    values = one_row(engine, raw.filter(raw[ROW] == row))
    typed = one_row(engine, events.filter(events.event == row))
    found = check.found(values, typed).replace("{row}", source.position(row))
    raise SidError(source.where, found, check.remedy)


def _times(condition: Any) -> Any:
    return ibis.ifelse(condition, 1, ibis.null("int8")).count()
