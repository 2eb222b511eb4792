"""Features of a specification in the batches of a reader: gathered by item, user, event and example."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from torchrec_sid.data.encoding import Jagged
from torchrec_sid.data.history_store import HistoryStore
from torchrec_sid.data.parquet import Array
from torchrec_sid.data.prepared import PreparedLog
from torchrec_sid.data.specification import (
    EmbeddingFeature,
    Feature,
    ItemIdFeature,
    NumericFeature,
    feature_key,
)
from torchrec_sid.errors import ArtifactError


class Gathered(NamedTuple):
    """What the features of a batch are looked up by."""

    columns: dict[str, Array | Jagged]
    """Columns of the examples, padded."""
    item: Array
    """``[B]`` candidates."""
    at: Array
    """``[events]`` positions in the store."""
    events: Array
    """``[events]`` items of the history."""
    store: HistoryStore


def log_features(log: PreparedLog) -> dict[str, Feature]:
    """Key -> feature of the specification that a log was prepared with."""
    specification = log.specification
    return {} if specification is None else {feature_key(f): f for f in specification.features}


def looks_up(feature: Feature) -> bool:
    """Whether a feature is rows of a table, which ride in the KeyedJaggedTensor."""
    if isinstance(feature, NumericFeature):
        return feature.buckets is not None
    return not isinstance(feature, EmbeddingFeature)


def number_keys(log: PreparedLog) -> tuple[str, ...]:
    """Keys of the features that are dense inputs: numbers without a table, of anything but the history."""
    return tuple(
        key
        for key, feature in log_features(log).items()
        if isinstance(feature, NumericFeature) and feature.buckets is None and feature.source != "history"
    )


def dense_names(log: PreparedLog) -> tuple[str, ...]:
    """Names of the dense inputs of a batch, in order: those of every log, counters, numbers."""
    return (*log.dense_names, *number_keys(log))


def weighs_examples(log: PreparedLog) -> bool:
    """Whether the examples of a log have weights."""
    return log.specification is not None and log.specification.columns.weight is not None


def columns_of(log: PreparedLog, keys: tuple[str, ...]) -> tuple[str, ...]:
    """Columns of the examples that some features are gathered from."""
    features = [log_features(log)[key] for key in keys]
    context = tuple(feature_key(f) for f in features if f.source == "context")
    return (*context, *(("user",) if any(f.source == "user" for f in features) else ()))


def gather(log: PreparedLog, key: str, where: Gathered) -> Array | Jagged:
    """A feature of a batch.

    Returns:
        ``[B]`` or ``[events]`` int64 rows or float32, ``[B, d]`` float32, or several rows an example.
    """
    feature = log_features(log)[key]
    if feature.source == "context":
        found = where.columns[key]
    elif feature.source == "user":
        user = where.columns["user"]
        assert not isinstance(user, Jagged)
        found = take(log.user_feature(key), user)
    elif feature.source == "item":
        found = take(log.item_feature(key), where.item)
    else:
        found = _of_history(log, key, where)
    if getattr(feature, "multi", False) and not isinstance(found, Jagged):
        found = Jagged(np.empty(0, np.int64), np.zeros(len(found), np.int64))  # of a bucket without rows
    if isinstance(feature, ItemIdFeature) and not isinstance(found, Jagged):
        # Ids that no item has share a row of their own.
        return np.where(found < 0, log.items, found)
    return found


def _of_history(log: PreparedLog, key: str, where: Gathered) -> Array | Jagged:
    try:
        return take(where.store.feature(key), where.at)
    except ArtifactError:  # no column of the events: a feature of their items
        return take(log.item_feature(key), where.events)


def take(values: Array | Jagged, index: Array) -> Array | Jagged:
    """Rows of a feature by position, several values a row included."""
    if not isinstance(values, Jagged):
        return np.asarray(values[index])
    lengths = values.lengths[index]
    starts = np.cumsum(values.lengths) - values.lengths
    return Jagged(np.asarray(values.values[ranges(starts[index], lengths)]), lengths)


def ranges(begin: Array, lengths: Array) -> Array:
    """All positions ``begin[i] .. begin[i] + lengths[i]`` in turn: two ``[B]`` int64 -> ``[sum]`` int64."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(begin - before, lengths) + np.arange(int(lengths.sum()))
