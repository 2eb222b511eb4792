"""Write the history stores, bucket by bucket, from two streams that are in that order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from torchrec_sid.ages import NO_TIME
from torchrec_sid.data import event_queries as queries
from torchrec_sid.data.feature_learning import LogFeatures
from torchrec_sid.data.given_histories import GivenBatch
from torchrec_sid.data.history_store import StoreWriter
from torchrec_sid.data.prepare_run import PrepareRun
from torchrec_sid.data.prepared import bucket_name


def write_histories(run: PrepareRun, past: Any, features: LogFeatures) -> pa.Table | None:
    """Write ``history/``; returns where the given histories stand, None where there are none.

    Returns:
        ``bucket``, ``key``, ``begin``, ``end``, ``last`` (null where no time is known).
    """
    rows = queries.store_rows(past, run.positives_only, run.columns.extra)
    log = _Buckets(run.engine.stream(rows))
    given = _given(run, past)
    ranges: list[pa.Table] = []
    waiting = next(given, None)
    for bucket in range(run.buckets):
        with StoreWriter(run.work / "history" / bucket_name(bucket)) as store:
            for batch in log.of(bucket):
                columns = [batch.column(n).to_numpy() for n in ("user", "item", "ts", "action")]
                store.append(*columns)
                store.features(features.of_history(batch))
            store.end_users()
            while waiting is not None and waiting.bucket == bucket:
                ranges.append(_range(waiting, len(store)))
                store.entries(waiting.items, waiting.ts, np.ones(len(waiting.items), np.int8))
                waiting = next(given, None)
    if run.given is None:
        return None
    return pa.concat_tables(ranges) if ranges else None


def _given(run: PrepareRun, past: Any) -> Iterator[GivenBatch]:
    if run.given is None:
        return
    source = run.given
    typed = run.engine.keep("histories", source.typed(run.engine.read("raw_histories", source.table)))
    source.check(run.engine, typed)
    yield from source.read(run.engine.stream(source.wanted(past, typed)))


def _range(batch: GivenBatch, begin: int) -> pa.Table:
    ends = begin + np.cumsum(batch.lengths)
    last = pa.array(batch.last, mask=batch.last == NO_TIME)
    bucket = np.full(len(ends), batch.bucket, np.int32)
    columns = {"bucket": bucket, "key": batch.key, "begin": ends - batch.lengths, "end": ends, "last": last}
    return pa.table(columns)


class _Buckets:
    """Batches in order of their column ``bucket``, taken bucket by bucket."""

    def __init__(self, batches: Iterator[pa.RecordBatch]) -> None:
        self._batches = batches
        self._held: pa.RecordBatch | None = next(batches, None)

    def of(self, bucket: int) -> Iterator[pa.RecordBatch]:
        """What is left of one bucket, the next in turn."""
        while self._held is not None:
            inside = int(np.searchsorted(self._held.column("bucket").to_numpy(), bucket, side="right"))
            if inside:
                yield self._held.slice(0, inside)
            if inside < len(self._held):
                self._held = self._held.slice(inside)
                return
            self._held = next(self._batches, None)
