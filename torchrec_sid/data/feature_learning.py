"""The features of a log: learned from its training period, written for items and users, applied to
events."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from torchrec_sid.data.encoding import FeatureEncoding, Jagged, save_feature, table_of
from torchrec_sid.data.engines import Table
from torchrec_sid.data.event_columns import missing_column
from torchrec_sid.data.lake import ParquetTable, keys_of
from torchrec_sid.data.parquet import Array
from torchrec_sid.data.prepare_run import PrepareRun
from torchrec_sid.data.specification import (
    CategoricalFeature,
    EmbeddingFeature,
    Feature,
    NumericFeature,
    column_of,
    feature_key,
)
from torchrec_sid.errors import SidError

_SAMPLE = 1 << 18
"""Training rows that a numeric column is measured on, at most."""


@dataclass
class LogFeatures:
    """Encodings that were learned, and where each feature comes from."""

    encoding: FeatureEncoding
    of_items: tuple[Feature, ...]
    """Of items, and of the items of a history."""
    of_users: tuple[Feature, ...]
    of_events: tuple[Feature, ...]
    """Of the context."""
    of_past: tuple[Feature, ...]
    """Of the history, from columns of its events."""
    categories: dict[str, Jagged]
    """Rows of the categorical features of items, for counters."""
    unmatched_users: int = 0
    """Users of the log that users.parquet does not have."""

    @classmethod
    def learn(cls, run: PrepareRun, past: Table, users: Table, train_events: Array) -> LogFeatures:
        """Learn from the training period, and write the features of items and users.

        Args:
            run: of the preparation.
            past: events of :func:`~torchrec_sid.data.event_queries.strictly_past`.
            users: of :func:`~torchrec_sid.data.event_queries.known_users`.
            train_events: ``[N]`` events of each item in train.

        Raises:
            SidError: a column that is not there, or of a wrong type.
        """
        spec = run.specification
        events = run.source.names
        past_columns = tuple(f for f in spec.of("history") if column_of(f) in events)
        found = cls(
            FeatureEncoding(spec.features, run.folder.index_of),
            (*spec.of("item"), *(f for f in spec.of("history") if f not in past_columns)),
            spec.of("user"),
            spec.of("context"),
            past_columns,
            {},
        )
        for folder in ("items", "users"):
            (run.work / folder).mkdir()
        items = {feature_key(f): _item_column(run, f) for f in found.of_items}
        people, active = found._user_columns(run, past, users)
        found._count(found.of_items, items, train_events > 0)
        found._count(found.of_users, people, active)
        found._count_events(run, past)
        found.encoding.learn()
        for folder, features, columns in (
            ("items", found.of_items, items),
            ("users", found.of_users, people),
        ):
            for feature in features:
                values: Array | Jagged | None = _given_vectors(run, feature)
                if values is None:
                    values = found.encoding.encode(feature, columns[feature_key(feature)])
                save_feature(run.work / folder, feature_key(feature), values)
                if folder == "items" and isinstance(feature, CategoricalFeature):
                    found.categories[feature.name] = _as_jagged(values)
        return found

    def of_history(self, batch: pa.RecordBatch) -> dict[str, Array | Jagged]:
        """Features of history events, by key."""
        return self._encode(self.of_past, batch)

    def of_context(self, batch: pa.RecordBatch) -> dict[str, Array | Jagged]:
        """Features of examples, by key."""
        return self._encode(self.of_events, batch)

    def left_out(self) -> dict[str, int]:
        """What had no place, for the manifest."""
        ids = {f"ids_of_{key}": count for key, count in self.encoding.left_out.items()}
        return ids | ({"users_without_row": self.unmatched_users} if self.of_users else {})

    def write(self, run: PrepareRun) -> dict[str, Any]:
        """Write the vocabularies; returns what the manifest says."""
        said = self.encoding.write(run.work / "vocabularies")
        rows = {}
        for feature in run.specification.features:
            count = self.encoding.rows(feature)
            if count is not None and isinstance(feature, CategoricalFeature | NumericFeature):
                rows[table_of(feature)] = count
        return {"rows": rows, **said}

    def _encode(self, features: Iterable[Feature], batch: pa.RecordBatch) -> dict[str, Array | Jagged]:
        return {
            feature_key(f): self.encoding.encode(f, batch.column(f"extra_{column_of(f)}")) for f in features
        }

    def _count(self, features: Iterable[Feature], columns: dict[str, pa.Array], train: Array) -> None:
        mask = pa.array(train)
        for feature in features:
            column = columns[feature_key(feature)]
            if isinstance(feature, CategoricalFeature):
                self.encoding.count(feature, column.filter(mask))
            elif isinstance(feature, NumericFeature):
                self.encoding.measure(feature, column.filter(mask))

    def _count_events(self, run: PrepareRun, past: Table) -> None:
        train = past.filter(past.split == 0)
        features = (*self.of_events, *self.of_past)
        values = [f for f in features if isinstance(f, CategoricalFeature)]
        numbers = [f for f in features if isinstance(f, NumericFeature)]
        if values:
            names = dict.fromkeys(f"extra_{column_of(f)}" for f in values)
            for batch in run.engine.stream(train.select(*names)):
                for feature in values:
                    self.encoding.count(feature, batch.column(f"extra_{column_of(feature)}"))
        if numbers:
            stride = max(1, -(-len(run.source) // _SAMPLE))
            names = dict.fromkeys(f"extra_{column_of(f)}" for f in numbers)
            sample = train.filter(train.event % stride == 0).order_by("event").select(*names)
            whole = pa.Table.from_batches(
                run.engine.stream(sample), sample.schema().to_pyarrow()
            ).combine_chunks()
            for number in numbers:
                column = whole.column(f"extra_{column_of(number)}").combine_chunks()
                self.encoding.measure(number, column)

    def _user_columns(
        self, run: PrepareRun, past: Table, users: Table
    ) -> tuple[dict[str, pa.Array], Array]:
        """Columns of users.parquet by dense user index, and who has training events."""
        if not self.of_users:
            return {}, np.zeros(0, bool)
        table = run.folder.table("users")
        if table is None:
            raise SidError(
                f"{run.folder.path}/users.parquet", "no such file", "The features of users need it."
            )
        key = run.specification.columns.user_id
        if key not in table.names:
            raise SidError(table.where, f"no column {key!r}", "Name it in columns.user_id.")
        mine = [b.column(0) for b in run.engine.stream(users.order_by("index").select("user"))]
        people = pa.concat_arrays(mine)
        keys = keys_of(table.column(key), table.where, key, "Keep one row per user.")
        at = _positions(people, keys, table)
        self.unmatched_users = at.null_count
        active = np.zeros(len(people), bool)
        for batch in run.engine.stream(past.filter(past.split == 0).select("user").distinct()):
            active[batch.column(0).to_numpy()] = True
        columns = {}
        for feature in self.of_users:
            if column_of(feature) not in table.names:
                raise missing_column(feature, table)
            columns[feature_key(feature)] = table.column(column_of(feature)).take(at)
        return columns, active


def _positions(people: pa.Array, keys: pa.Array, table: ParquetTable) -> pa.Array:
    import pyarrow.compute as pc

    if pa.types.is_integer(people.type) != pa.types.is_integer(keys.type):
        raise SidError(
            table.where, f"users are {keys.type} here, {people.type} in the events", "Write both alike."
        )
    return pc.index_in(people.cast(keys.type), value_set=keys)


def _item_column(run: PrepareRun, feature: Feature) -> pa.Array:
    column = run.folder.item_column(column_of(feature))
    if column is not None:
        return column
    if isinstance(feature, EmbeddingFeature) and column_of(feature) in run.folder.sources:
        return pa.nulls(0)
    raise missing_column(feature, run.folder.item_table)


def _given_vectors(run: PrepareRun, feature: Feature) -> Array | None:
    """An embedding source of the items, where the feature names one."""
    name = column_of(feature)
    if not isinstance(feature, EmbeddingFeature) or feature.source not in ("item", "history"):
        return None
    if run.folder.item_column(name) is not None or name not in run.folder.sources:
        return None
    return np.asarray(run.folder.embedding_matrix(name), np.float32)


def _as_jagged(values: Array | Jagged) -> Jagged:
    return values if isinstance(values, Jagged) else Jagged(values, np.ones(len(values), np.int64))
