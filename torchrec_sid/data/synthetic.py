"""Write a synthetic log with a planted hierarchy, in the documented format, in bounded memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from torchrec_sid.artifact import (
    Contents,
    folder_lock,
    has_manifest,
    open_folder,
    record_tree,
    seal_folder,
    whole_folder,
    write_json,
)
from torchrec_sid.data.appender import NpyAppender
from torchrec_sid.data.parquet import Array
from torchrec_sid.data.planted import LATENT, SyntheticConfig, World
from torchrec_sid.data.schema import EVENTS, ITEMS, SETTINGS, LogFolder

__all__ = ["FIRST_ITEM_ID", "SyntheticConfig", "write_synthetic"]

RECIPE = "synthetic.json"
_KIND = "synthetic_log"
_VERSION = 1
_CHUNK = 1 << 16

FIRST_ITEM_ID = 10_000_000
"""Item k has id FIRST_ITEM_ID + k, so that an id never passes for a dense index unnoticed."""

_CANDIDATE_TOPICS = 3
_FRESH = 0.05
_TRIES = 16


def write_synthetic(path: str | Path, config: SyntheticConfig | None = None) -> LogFolder:
    """Write a log folder, or reuse the one in ``path`` if it was made with the same configuration.

    The same configuration gives the same bytes. Besides the documented columns, ``items.parquet`` has
    ``topic`` and ``subtopic``, the planted truth.

    Args:
        path: folder to write, as a whole or not at all.
        config: what to plant.

    Raises:
        SidError: ``path`` holds something else.
    """
    config = config or SyntheticConfig()
    path = Path(path)
    recipe = json.loads(json.dumps({"version": _VERSION, "config": asdict(config)}))
    with folder_lock(path):
        if not has_manifest(path, RECIPE) or _recipe_of(path) != recipe:
            with whole_folder(path, _KIND, RECIPE) as work:
                _write(work, World(config), recipe)
    return LogFolder.open(path)


def _recipe_of(path: Path) -> dict[str, Any]:
    # Logs of earlier releases kept the recipe alone.
    found = open_folder(
        path, kind=_KIND, version=1, manifest=RECIPE, earlier=lambda body, _: Contents(1, body, {})
    )
    return found.config


def _write(done: Path, world: World, recipe: dict[str, Any]) -> None:
    _write_items(done / ITEMS, world)
    for number, source in enumerate(world.config.sources):
        name = "item_emb.npy" if source == "content" else f"item_emb_{source}.npy"
        _write_embeddings(done / name, world, number)
    _write_events(done / EVENTS, world)
    write_json(done / SETTINGS, {"default_source": world.config.sources[0]})
    seal_folder(done, kind=_KIND, version=1, config=recipe, files=record_tree(done), manifest=RECIPE)


def _chunks(total: int) -> Iterator[Array]:
    for begin in range(0, total, _CHUNK):
        yield np.arange(begin, min(begin + _CHUNK, total))


def _random(world: World, *stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.SFC64([world.config.seed, *stream]))


def _write_items(path: Path, world: World) -> None:
    schema = pa.schema(
        [
            ("item_id", pa.int64()),
            ("title", pa.string()),
            ("text", pa.string()),
            ("category", pa.string()),
            ("topic", pa.int32()),
            ("subtopic", pa.int32()),
        ]
    )
    with pq.ParquetWriter(path, schema) as writer:
        for item in _chunks(world.config.items):
            topic, subtopic = (pa.array(f(item).astype(np.int32)) for f in (world.topic, world.subtopic))
            text = pc.binary_join_element_wise(
                "topic ", topic.cast("string"), ", subtopic ", subtopic.cast("string"), ""
            )
            title = pc.binary_join_element_wise(text, ", item ", pa.array(item).cast("string"), "")
            category = pc.binary_join_element_wise(
                "category ", pa.array(world.category(item)).cast("string"), ""
            )
            ids = pa.array(item + FIRST_ITEM_ID)
            writer.write_table(pa.table([ids, title, text, category, topic, subtopic], schema=schema))


def _write_embeddings(path: Path, world: World, number: int) -> None:
    """Unit vectors: topic + subtopic + a projection of the item's latent + noise."""
    c = world.config
    random = _random(world, 1, number)

    def directions(*shape: int) -> Array:
        vectors = random.standard_normal((*shape, c.dim), np.float32)
        return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)

    topics, subtopics, axes = directions(c.topics), directions(c.topics, c.subtopics), directions(LATENT)
    # Each source shows its own part of the latent well and the rest faintly: fusing them pays.
    own = np.arange(LATENT) % len(c.sources) == number
    axes *= np.where(own, 1.0, 0.4)[:, None].astype(np.float32) / np.sqrt(LATENT)
    with NpyAppender(path, np.float16, (c.dim,)) as file:
        for chunk, item in enumerate(_chunks(c.items)):
            topic = world.topic(item)
            noise = _random(world, 2, number, chunk).standard_normal((len(item), c.dim), np.float32)
            x = np.float32(0.67) * topics[topic] + np.float32(0.5) * subtopics[topic, world.subtopic(item)]
            x += np.float32(0.45) * (world.latent(item) @ axes)
            x += np.float32(c.noise / np.sqrt(c.dim)) * noise
            file.append(x / np.linalg.norm(x, axis=1, keepdims=True))


def _write_events(path: Path, world: World) -> None:
    c = world.config
    schema = pa.schema(
        [("user", pa.int32()), ("item", pa.int64()), ("ts", pa.int64()), ("label", pa.int8())]
    )
    exposure = _Exposure(world)
    with pq.ParquetWriter(path, schema) as writer:
        for chunk, event in enumerate(_chunks(c.events)):
            random = _random(world, 3, chunk)
            first, last = (int(e) * world.seconds // c.events for e in (event[0], event[-1] + 1))
            ts = np.sort(random.integers(first, max(last, first + 1), len(event)))
            user = exposure.users(random.random(len(event)))
            tastes = world.tasting(user, ts)
            item = exposure.items(tastes, ts, random)
            chance = 1 / (1 + np.exp(-world.log_odds(tastes, item)))
            label = random.random(len(event)) < chance
            columns = [user, item + FIRST_ITEM_ID, ts + c.start, label]
            arrays = [
                pa.array(v.astype(f.type.to_pandas_dtype())) for v, f in zip(columns, schema, strict=True)
            ]
            writer.write_table(pa.table(arrays, schema=schema))


class _Exposure:
    """Who sees what: an active user, a topic of the user's taste, a popular item of it that is there."""

    def __init__(self, world: World) -> None:
        self.world = world
        topic = np.concatenate([world.topic(i).astype(np.int32) for i in _chunks(world.config.items)])
        self.by_topic = np.argsort(topic, kind="stable").astype(np.int32)
        self.topic_begin = np.searchsorted(topic[self.by_topic], np.arange(world.config.topics + 1))
        self.weight = np.empty(len(topic) + 1)
        self.weight[0] = 0
        for place in _chunks(len(topic)):
            self.weight[place + 1] = world.popularity(self.by_topic[place].astype(np.int64))
        np.cumsum(self.weight, out=self.weight)

    @cached_property
    def user_ends(self) -> Array:
        """``[users]`` float64 cumulative share of the events, capped at ``max_history`` each."""
        c = self.world.config
        share = np.concatenate([self.world.activity(u) for u in _chunks(c.users)])
        cap = c.max_history / c.events
        share /= share.sum()
        for _ in range(64):
            over = share >= cap
            if not over.any() or over.all():
                break
            share[over] = cap
            share[~over] *= (1 - cap * over.sum()) / share[~over].sum()
        return np.cumsum(np.minimum(share, max(cap, 1 / c.users)))

    def users(self, draw: Array) -> Array:
        """Uniform draws ``[n]`` -> users ``[n]`` int64."""
        found = np.searchsorted(self.user_ends, draw * self.user_ends[-1], side="right")
        return np.minimum(found, self.world.config.users - 1)

    def items(self, user: Array, ts: Array, random: np.random.Generator) -> Array:
        """An item ``[n]`` int64 for each user at each time, among those that have arrived."""
        world = self.world
        shape = (len(user), _CANDIDATE_TOPICS)
        candidates = np.minimum(
            np.searchsorted(world.topic_ends, random.random(shape), side="right"), world.config.topics - 1
        )
        everyone = np.repeat(user, _CANDIDATE_TOPICS)
        topic = _favourite(world.likes_topic(everyone, candidates.ravel()).reshape(shape), candidates)

        item = np.full(len(user), -1)
        self._fresh(item, user, ts, random)
        todo = np.flatnonzero(item < 0)
        tries = 0
        while len(todo):
            # Where a topic has hardly anything yet, the user looks elsewhere.
            own = tries < _TRIES
            low = self.weight[self.topic_begin[topic[todo]]] if own else 0.0
            high = self.weight[self.topic_begin[topic[todo] + 1]] if own else self.weight[-1]
            place = np.searchsorted(
                self.weight, low + random.random(len(todo)) * (high - low), side="right"
            )
            drawn = self.by_topic[np.clip(place - 1, 0, len(self.by_topic) - 1)].astype(np.int64)
            there = world.arrival(drawn) <= ts[todo]
            item[todo[there]] = drawn[there]
            todo = todo[~there]
            tries += 1
        return item

    def _fresh(self, item: Array, user: Array, ts: Array, random: np.random.Generator) -> None:
        """Give some events an item that arrived a short time ago, of the topic the user likes best."""
        world = self.world
        new = world.config.items - world.old_items
        arrived = np.minimum(ts * (new + 1) // world.seconds, new)
        recent = np.minimum(arrived, int(new * _FRESH) + 1)
        chosen = (random.random(len(user)) < world.config.freshness) & (arrived > 0)
        where = np.flatnonzero(chosen)
        back = (random.random((len(where), _CANDIDATE_TOPICS)) * recent[where, None]).astype(np.int64)
        candidates = world.old_items + arrived[where, None] - 1 - back
        everyone = np.repeat(user[where], _CANDIDATE_TOPICS)
        taste = world.likes_topic(everyone, world.topic(candidates.ravel())).reshape(candidates.shape)
        item[where] = _favourite(taste, candidates)


def _favourite(taste: Array, candidates: Array) -> Array:
    """The candidate ``[n, m]`` with the largest taste ``[n, m]`` -> ``[n]``."""
    return np.take_along_axis(candidates, taste.argmax(1)[:, None], axis=1)[:, 0]
