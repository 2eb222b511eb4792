"""One preparation: the queries in their order, and the state that they share."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from torchrec_sid.artifact import save_array
from torchrec_sid.data import event_queries as queries
from torchrec_sid.data.appender import NpyAppender
from torchrec_sid.data.engines import Table, one_row
from torchrec_sid.data.event_checks import EventStatistics, check_events, check_split_order
from torchrec_sid.data.event_columns import EventColumns
from torchrec_sid.data.example_files import ExampleFiles, example_rows
from torchrec_sid.data.examples import BLOCKS_PER_FILE, popularity_segments
from torchrec_sid.data.feature_learning import LogFeatures
from torchrec_sid.data.given_histories import refuse_future
from torchrec_sid.data.history_files import write_histories
from torchrec_sid.data.lake import ParquetTable
from torchrec_sid.data.negatives import NegativeSampler, NegativeSampling
from torchrec_sid.data.parquet import Array
from torchrec_sid.data.prepare_run import PrepareRun
from torchrec_sid.data.prepared import bucket_name
from torchrec_sid.data.specification import DENSE, counter_names
from torchrec_sid.errors import SidError

QUANTILE_ROWS = 1 << 18
"""Times of at most so many events decide where splits begin."""


class Preparation:
    """One run.

    Args:
        run: what its steps share.
    """

    def __init__(self, run: PrepareRun) -> None:
        self.run, self.engine, self.progress = run, run.engine, run.progress
        self.folder, self.config, self.source = run.folder, run.config, run.source

    def write(self) -> dict[str, Any]:
        """All queries and files; returns the manifest."""
        run = self.run
        self.folder.validate()
        self.progress(f"checking {len(self.source):,} events")
        raw = self.engine.read("raw_events", self.source)
        run.columns = self._action_that_is_whole(raw)
        known, statistics = self._checked(raw)
        sampled = statistics.positives == statistics.rows
        if sampled and self.config.negatives is None:
            raise SidError(self.source.where, "every label is 1", "Set negatives to a NegativeSampling.")
        kept, held_out = self._released(known, statistics)
        users, past = self._past(kept)
        train_events = self._train_events(past)
        features = LogFeatures.learn(run, past, users, train_events)
        self.progress("writing histories")
        ranges = write_histories(run, past, features)
        if ranges is not None:
            past = self._given(past, ranges)
        draws = self._draws(past, self.config.negatives) if sampled and self.config.negatives else None
        rows = example_rows(run, queries.with_negatives(past, draws), features)
        self.progress("writing examples")
        segment = popularity_segments(train_events)
        splits = ExampleFiles(run, features, segment).write(rows, lambda: self._coarse(kept))
        self._write_items(train_events, segment)
        return {
            "items": len(self.folder),
            "users": self._write_users(users),
            "buckets": run.buckets,
            "events": statistics.rows,
            "history_events": self._history_events(),
            "actions": max(statistics.actions, 2),
            "dense": [*DENSE, *counter_names(run.specification)],
            "block_rows": self.config.block_rows,
            "blocks_per_file": BLOCKS_PER_FILE,
            "sampled_negatives": sampled,
            "clock": statistics.clock,
            "dropped": self._dropped(statistics, held_out, features),
            "explicit_histories": asdict(run.given.counts) if run.given else None,
            "columns": {part: value for part, value in asdict(run.columns).items() if part != "labels"},
            "features": features.write(run),
            "splits": splits,
        }

    def _action_that_is_whole(self, raw: Table) -> EventColumns:
        """Ratings with fractions are no actions, unless somebody asked for them."""
        asked = self.config.action_column or (self.run.specification.columns.action)
        name = self.run.columns.action
        if asked or name is None or pa.types.is_integer(self.source.schema.field(name).type):
            return self.run.columns
        whole = queries.whole_number(raw[name])
        halves = raw.filter(raw[name].notnull() & whole.isnull()).count()
        if not one_row(self.engine, halves.name("rows").as_table())["rows"]:
            return self.run.columns
        self.progress(f"column {name!r} has fractions: an event's action is its label")
        return replace(self.run.columns, action=None)

    def _checked(self, raw: Table) -> tuple[Table, EventStatistics]:
        typed = queries.typed_events(raw, self.source, self.run.columns, self.engine)
        items = self._items(typed)
        events = self.engine.keep("events", queries.with_items(typed, items))
        statistics = check_events(
            self.engine, raw, events, self.source, self.run.columns, self.folder.drop_bare
        )
        if not statistics.rows:
            raise SidError(self.source.where, "no event on an item with an embedding", "Add embeddings.")
        if not statistics.clock:
            events = self._logical_time(events)
        known = events.filter(events["index"] >= 0)
        if self.run.columns.split:
            check_split_order(self.engine, known, self.source.where)
            return known, statistics
        return queries.split_by_time(known, self._split_times(known, statistics.rows)), statistics

    def _items(self, typed: Table) -> Table:
        keys = pa.concat_arrays([self.folder.item_keys, self.folder.bare_keys])
        bare = len(self.folder.bare_keys)
        index = np.append(np.arange(len(self.folder)), np.full(bare, -1)).astype(np.int32)
        release = np.append(self.run.release, np.zeros(bare, np.int8))
        if typed.item.type().is_string() == pa.types.is_integer(keys.type):
            words = ("text", "integers") if typed.item.type().is_string() else ("integers", "text")
            held = f"column {self.run.columns.item!r} holds {words[0]}"
            found = f"{held}, the ids of items.parquet are {words[1]}"
            raise SidError(self.source.where, found, "Write both alike.")
        return self.run.pass_on("items", pa.table({"key": keys, "index": index, "release": release}))

    def _logical_time(self, events: Table) -> Table:
        for name, why in (("order", "integer"), ("split", "text")):
            if name not in self.source.names:
                raise SidError(
                    self.source.where,
                    f"no column {name!r}, and no times (it has {self.source.names})",
                    f"Add {name!r}, {why}, or give times.",
                )
        longest = one_row(self.engine, events.aggregate(n=events.order.max()))["n"] + 1
        if "target_no" not in self.source.names:
            return events.mutate(ts=events.order)
        return events.mutate(
            ts=queries.either(events.target_no < 0, events.order, events.target_no + longest)
        )

    def _split_times(self, known: Table, rows: int) -> list[int]:
        """Where valid and test begin: quantiles of every 2^k-th event, of all up to 2^18."""
        stride = 1
        while -(-rows // stride) > QUANTILE_ROWS:
            stride *= 2
        chosen = known.filter(known.event % stride == 0).order_by("ts").select("ts")
        times = [batch.column(0).to_numpy() for batch in self.engine.stream(chosen)]
        ts = np.concatenate(times)
        shares = (self.config.train_share, self.config.train_share + self.config.valid_share)
        return [int(ts[int(share * len(ts))]) for share in shares]

    def _coarse(self, kept: Table) -> str | None:
        """Why a log that was split by time may have an empty split."""
        if self.run.columns.split:
            return None
        events = self.engine.keep("times", queries.distinct_times(kept))
        count = one_row(self.engine, events.count().name("n").as_table())["n"]
        return f"its {count} different times are too coarse to be cut into shares"

    def _released(self, known: Table, statistics: EventStatistics) -> tuple[Table, int]:
        kept = known.filter(known.split >= known.release)
        names = [n for n in kept.columns if n not in ("item", "index", "release", "order", "target_no")]
        kept = self.engine.keep("kept", kept.select(*names, item=kept["index"].cast("int32")))
        count = one_row(self.engine, kept.count().name("n").as_table())["n"]
        return kept, statistics.rows - count

    def _past(self, kept: Table) -> tuple[Table, Table]:
        self.progress("looking up every user's past")
        users = self.engine.keep(
            "users", queries.known_users(kept, self.run.buckets, self.run.positives_only)
        )
        return users, self.engine.keep("past", queries.strictly_past(kept, users, self.run.positives_only))

    def _train_events(self, past: Table) -> Array:
        counts = past.filter(past.split == 0).group_by("item").aggregate(n=past.event.count())
        out = np.zeros(len(self.folder), np.int64)
        for batch in self.engine.stream(counts):
            out[batch.column("item").to_numpy()] = batch.column("n").to_numpy()
        return out

    def _given(self, past: Table, ranges: pa.Table) -> Table:
        assert self.run.given is not None
        joined = self.engine.keep("given", queries.with_given(past, self.run.pass_on("ranges", ranges)))
        refuse_future(self.engine, joined, self.run.given)
        found = one_row(self.engine, joined.filter(joined.given).count().name("n").as_table())
        self.run.given.counts.events = found["n"]
        return joined.drop("given", "given_last")

    def _draws(self, past: Table, config: NegativeSampling) -> Table:
        """Negatives of every event, drawn in order of time from what the log held by then."""
        self.progress("drawing negatives")
        paths = {name: self.run.scratch / f"log_{name}.npy" for name in ("item", "ts", "event")}
        ordered = past.order_by("ts", "event").select("item", "ts", "event")
        kinds = {"item": np.int32, "ts": np.int64, "event": np.int64}
        files = {name: NpyAppender(paths[name], kinds[name]) for name in paths}
        for batch in self.engine.stream(ordered):
            for name, file in files.items():
                file.append(batch.column(name).to_numpy())
        for file in files.values():
            file.close()
        item, ts, event = (np.load(path, mmap_mode="r") for path in paths.values())
        sampler = NegativeSampler(config, item, ts, self.config.seed)
        schema = pa.schema([("event", pa.int64()), ("slot", pa.int32()), ("item", pa.int32())])
        with pq.ParquetWriter(self.run.scratch / "draws.parquet", schema) as writer:
            for begin in range(0, len(event), QUANTILE_ROWS):
                rows = np.array(event[begin : begin + QUANTILE_ROWS])
                drawn = sampler.draw(begin, rows)
                first = np.searchsorted(drawn.positive, drawn.positive, side="left")
                slot = np.arange(len(drawn.positive)) - first + 1
                columns = [rows[drawn.positive], slot.astype(np.int32), drawn.item]
                writer.write_table(pa.table([pa.array(c) for c in columns], schema=schema))
        return self.engine.read("draws", ParquetTable.find(self.run.scratch, "draws"))

    def _write_items(self, train_events: Array, segment: Array) -> None:
        folder = self.run.work / "items"
        save_array(folder / "id.npy", self.folder.item_ids)
        save_array(folder / "train_events.npy", train_events)
        save_array(folder / "segment.npy", segment)
        pq.write_table(pa.table({"item": self.folder.item_keys}), folder / "keys.parquet")

    def _history_events(self) -> int:
        folders = [self.run.work / "history" / bucket_name(b) for b in range(self.run.buckets)]
        return sum(len(np.load(folder / "item.npy", mmap_mode="r")) for folder in folders)

    def _write_users(self, users: Table) -> int:
        folder = self.run.work / "users"
        query = users.order_by("index").select("user")
        count = 0
        with pq.ParquetWriter(folder / "keys.parquet", query.schema().to_pyarrow()) as writer:
            for batch in self.engine.stream(query):
                writer.write_batch(batch)
                count += len(batch)
        return count

    def _dropped(self, statistics: EventStatistics, held_out: int, features: LogFeatures) -> dict[str, int]:
        dropped = {"held_out": held_out, "without_embedding": statistics.without_embedding}
        dropped["items_without_embedding"] = len(self.folder.bare_keys)
        if self.run.given is not None:
            counts = self.run.given.counts
            dropped["history_entries"] = counts.entries_held_out + counts.entries_without_embedding
        dropped |= features.left_out()
        for name, count in dropped.items():
            if count:
                self.progress(f"left out: {count:,} {name.replace('_', ' ')}")
        return dropped
