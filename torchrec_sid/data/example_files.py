"""Write the examples of every bucket and split, and the items' files, from the rows that the queries
yield."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from torchrec_sid.data import event_queries as queries
from torchrec_sid.data.encoding import example_column
from torchrec_sid.data.engines import Table
from torchrec_sid.data.examples import SPLITS, ExampleWriter, SplitCounts
from torchrec_sid.data.feature_learning import LogFeatures
from torchrec_sid.data.parquet import Array
from torchrec_sid.data.prepare_run import PrepareRun
from torchrec_sid.data.prepared import bucket_name
from torchrec_sid.data.specification import counter_names
from torchrec_sid.errors import SidError
from torchrec_sid.hashing import text_id


class ExampleFiles:
    """Writes ``train/``, ``valid/`` and ``test/``.

    Args:
        run: of the preparation.
        features: learned.
        segment: ``[N]`` int8 popularity segment of each item.
    """

    def __init__(self, run: PrepareRun, features: LogFeatures, segment: Array) -> None:
        self.run, self.features, self.segment = run, features, segment
        self.counts = {name: SplitCounts() for name in SPLITS}

    def write(self, rows: Table, coarse: Callable[[], str | None]) -> dict[str, Any]:
        """Write all examples in order of bucket and time; returns the counts of each split.

        Args:
            rows: of :func:`example_rows`.
            coarse: says why a split may be empty.

        Raises:
            SidError: a split without both labels.
        """
        ordered = rows.order_by("bucket", "ts", "event", "slot")
        current, writers = 0, self._writers(0)
        for batch in _within_buckets(self.run.engine.stream(ordered)):
            bucket = batch.column("bucket")[0].as_py()
            while current < bucket:
                self._close(writers)
                current += 1
                writers = self._writers(current)
            self._add(batch, writers)
        while True:
            self._close(writers)
            current += 1
            if current == self.run.buckets:
                break
            writers = self._writers(current)
        for name, counts in self.counts.items():
            if not 0 < counts.positives < counts.rows:
                label = (
                    "has no events" if not counts.rows else f"has label {int(counts.positives > 0)} only"
                )
                why = coarse() if not counts.rows else None
                found = f"split {name!r} {label}" + (f": {why}" if why else "")
                raise SidError(self.run.source.where, found, "Give each split both labels.")
        return {name: counts.summary() for name, counts in self.counts.items()}

    def _writers(self, bucket: int) -> dict[str, ExampleWriter]:
        config = self.run.config
        seed = (config.seed, 0x73687566) if bucket == 0 else (config.seed, 0x73687566, bucket)
        window = -(-config.shuffle_window // self.run.buckets)
        return {
            name: ExampleWriter(
                self.run.work / name / bucket_name(bucket),
                config.block_rows,
                window if name == "train" else 0,
                seed,
            )
            for name in SPLITS
        }

    def _close(self, writers: dict[str, ExampleWriter]) -> None:
        for name, writer in writers.items():
            writer.close()
            self.counts[name].buckets.append(writer.rows)

    def _add(self, batch: pa.RecordBatch, writers: dict[str, ExampleWriter]) -> None:
        split = batch.column("split").to_numpy()
        examples = self._examples(batch)
        ts, label, segment = (examples.column(n).to_numpy() for n in ("ts", "label", "segment"))
        for number, (name, writer) in enumerate(writers.items()):
            inside = split == number
            if inside.any():
                self.counts[name].add(ts[inside], label[inside], segment[inside])
                writer.add(examples if inside.all() else examples.filter(pa.array(inside)))

    def _examples(self, batch: pa.RecordBatch) -> pa.Table:
        def of(name: str) -> Array:
            return batch.column(name).to_numpy(zero_copy_only=False)

        seen, ts = of("seen"), of("ts")
        last = batch.column("last").fill_null(0).to_numpy()
        unknown = batch.column("last").is_null().to_numpy(zero_copy_only=False)
        gap = np.where(unknown, 0, ts - last)
        item = of("item")
        columns: dict[str, Any] = {
            "user": of("user"),
            "item": item.astype(np.int32),
            "ts": ts,
            "label": of("label").astype(np.int8),
            "action": of("action").astype(np.int8),
            "hist_begin": of("hist_begin"),
            "hist_end": of("hist_end"),
            "segment": self.segment[item],
            "log_history_length": np.log1p(seen).astype(np.float32),
            "past_positive_rate": ((of("liked") + 1) / (seen + 2)).astype(np.float32),
            "log_seconds_since_last": np.log1p(gap).astype(np.float32),
        }
        columns |= self._counters(batch)
        columns["event"] = of("event")
        for label in self.run.columns.labels[1:]:
            columns[f"label_{label.name}"] = of(f"label_{label.name}").astype(np.int8)
        if self.run.columns.weight:
            columns["weight"] = of("weight")
        if self.run.columns.request:
            columns["request"] = _number(batch.column("request"))
        arrays = {name: pa.array(values) for name, values in columns.items()}
        found = self.features.of_context(batch)
        return pa.table(arrays | {key: example_column(values) for key, values in found.items()})

    def _counters(self, batch: pa.RecordBatch) -> dict[str, Array]:
        """Logarithms of counts, and rates, from integers."""
        counters = self.run.specification.counters
        if counters is None:
            return {}
        out = {}
        events, columns = np.zeros(0), 1 + len(self.run.specification.labels)
        for number, name in enumerate(counter_names(self.run.specification)):
            if number % columns == 0:  # the events of a key, before the rates of its labels
                events = batch.column(name).fill_null(0).to_numpy().astype(np.float64)
                out[name] = np.log1p(events).astype(np.float32)
                continue
            positives = batch.column(name).fill_null(0).to_numpy()
            rate = (positives + counters.prior * counters.strength) / (events + counters.strength)
            out[name] = rate.astype(np.float32)
        return out


def example_rows(run: PrepareRun, rows: Table, features: LogFeatures) -> Table:
    """Rows of examples with their counters; every counter's query runs now.

    Returns:
        The rows, and one int64 column per name of
        :func:`~torchrec_sid.data.specification.counter_names`: counts of events, or of positives for a
        rate.
    """
    counters = run.specification.counters
    if counters is None:
        return rows
    rows = run.engine.keep("examples", rows)
    labels = {"label" if i == 0 else f"label_{c.name}": c.name for i, c in enumerate(run.columns.labels)}
    for number, name in enumerate(counters.keys):
        run.progress(f"counting the past of {name}")
        user, _, category = name.rpartition(" x ")
        categories = None
        if category not in ("item", "user"):
            categories = _categories(run, features, category, number)
        key = queries.CounterKey(name.replace(" ", ""), user == "user" or name == "user", categories)
        counts = queries.count_past(rows, key, labels, counters.days)
        counts = run.engine.keep(f"counts_{number}", counts)
        same = [rows.event == counts.event, rows.slot == counts.slot]
        new = [counts[n] for n in counts.columns if n not in ("event", "slot")]
        joined = rows.left_join(counts, same).select(*[rows[n] for n in rows.columns], *new)
        rows = run.engine.keep(f"counted_{number}", joined)
    return rows


def _categories(run: PrepareRun, features: LogFeatures, name: str, number: int) -> Table:
    found = features.categories[name]
    item = np.repeat(np.arange(len(found.lengths)), found.lengths).astype(np.int32)
    pairs = np.unique(np.stack([item, found.values]), axis=1)
    table = pa.table({"item": pairs[0].astype(np.int32), "category": pairs[1]})
    return run.pass_on(f"categories_{number}", table)


def _within_buckets(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Batches that hold one bucket each."""
    for batch in batches:
        cuts = np.flatnonzero(np.diff(batch.column("bucket").to_numpy())) + 1
        ends = [*cuts.tolist(), len(batch)]
        for begin, end in zip([0, *cuts.tolist()], ends, strict=True):
            if end > begin:
                yield batch.slice(begin, end - begin)


def _number(ids: pa.Array) -> Array:
    """Own ids as int64, texts by their hash; -1 where there is none."""
    if pa.types.is_integer(ids.type):
        found: Array = ids.fill_null(-1).to_numpy(zero_copy_only=False)
        return found
    coded = ids.dictionary_encode()
    numbers = np.array([*map(text_id, coded.dictionary.to_pylist()), -1], np.int64)
    return numbers[coded.indices.fill_null(-1).to_numpy(zero_copy_only=False)]
