"""From the specification of a log to what a model reads of it."""

from __future__ import annotations

from torchrec_sid.data.encoding import Jagged, table_of
from torchrec_sid.data.example_features import dense_names, log_features, looks_up, number_keys
from torchrec_sid.data.parquet import Array
from torchrec_sid.data.prepared import PreparedLog
from torchrec_sid.data.specification import (
    FIRST_ROW,
    CategoricalFeature,
    Feature,
    ItemIdFeature,
    NumericFeature,
)
from torchrec_sid.data.statistics import measure_log
from torchrec_sid.errors import SidError
from torchrec_sid.models.build import LogSizes
from torchrec_sid.models.feature_fields import FeatureInputs, TableInput, VectorInput


def log_sizes(log: PreparedLog, dim: int) -> LogSizes:
    """What a model needs to know of a log, measured on its training rows.

    Args:
        log: prepared.
        dim: D, width of features that do not name one.

    Raises:
        SidError: a feature that no model reads.
    """
    measured = measure_log(log)
    labels = () if log.specification is None else log.specification.labels
    return LogSizes(
        log.items,
        log.actions,
        dense_names(log),
        measured.action_values,
        measured.dense,
        features=feature_inputs(log, dim),
        labels=tuple(label.name for label in labels[1:]),
        label_weights=tuple(label.weight for label in labels),
    )


def feature_inputs(log: PreparedLog, dim: int) -> FeatureInputs:
    """The features of a log's specification as inputs of a model; numbers are dense inputs instead.

    Raises:
        SidError: several values per event of a history, item ids in another way than as raw ids.
    """
    tables: dict[bool, list[TableInput]] = {False: [], True: []}
    vectors: dict[bool, list[VectorInput]] = {False: [], True: []}
    numbers = number_keys(log)
    for key, feature in log_features(log).items():
        past = feature.source == "history"
        if key in numbers:
            continue
        if looks_up(feature):
            tables[past].append(_table(log, key, feature, dim))
        else:
            width = 1 if isinstance(feature, NumericFeature) else _width(log, key, feature)
            vectors[past].append(VectorInput(key, width))
    return FeatureInputs(
        tuple(tables[False]), tuple(vectors[False]), tuple(tables[True]), tuple(vectors[True])
    )


def group_names(log: PreparedLog, key: str) -> tuple[str, ...]:
    """Names of the rows of a categorical feature, for metrics by its values.

    Raises:
        SidError: no such feature, or one that does not have one value of a vocabulary.
    """
    feature = log_features(log).get(key)
    if not isinstance(feature, CategoricalFeature) or feature.multi or feature.source == "history":
        fit = [k for k, f in log_features(log).items() if isinstance(f, CategoricalFeature) and not f.multi]
        raise SidError("slices", f"{key!r}", f"Name a categorical feature of one value: {', '.join(fit)}.")
    if feature.hash_rows is not None:
        raise SidError("slices", f"{key!r} is hashed", "Its values have no names; give it a vocabulary.")
    return ("missing", "unknown", *log.vocabulary(table_of(feature)).to_pylist())


def _table(log: PreparedLog, key: str, feature: Feature, dim: int) -> TableInput:
    if feature.source == "history" and getattr(feature, "multi", False):
        raise SidError(
            f"features.history.{feature.name}", "several values per event", "Name a feature of one value."
        )
    width = getattr(feature, "dim", None) or dim
    if isinstance(feature, ItemIdFeature):
        if feature.arm != "full_id":
            raise SidError(
                f"features.{feature.source}.{feature.name}.arm",
                repr(feature.arm),
                "Features of item ids are raw ids: full_id. SIDs are for the candidate and its history.",
            )
        return TableInput(key, f"{key}_item", log.items + 1, width)
    assert isinstance(feature, CategoricalFeature | NumericFeature)
    return TableInput(key, table_of(feature), max(FIRST_ROW, log.table_rows(feature)), width)


def _width(log: PreparedLog, key: str, feature: Feature) -> int:
    found: Array | Jagged
    if feature.source == "context":
        raise SidError(
            f"features.context.{feature.name}", "a vector of the context", "Give vectors to items or users."
        )
    found = log.user_feature(key) if feature.source == "user" else log.item_feature(key)
    assert not isinstance(found, Jagged)
    return int(found.shape[1])
