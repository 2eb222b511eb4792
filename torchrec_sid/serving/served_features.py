"""`ServedFeatures`: the features of a log's specification, as a served folder holds them.

Features of items lie here by dense index; those of context, user and past events come with a request, as
their owner writes them, and become rows and numbers by the vocabularies and scales of the training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from torchrec_sid.artifact import Place, load_artifact, save_artifact
from torchrec_sid.data.encoding import FeatureEncoding, Jagged, NumberScale, ValueRows
from torchrec_sid.data.example_features import number_keys, take
from torchrec_sid.data.prepared import PreparedLog
from torchrec_sid.data.specification import (
    EmbeddingFeature,
    Feature,
    ItemIdFeature,
    NumericFeature,
    Specification,
    feature_key,
)
from torchrec_sid.errors import ArtifactError, SidError

Array = np.ndarray[Any, Any]
FEATURES = "features.safetensors"
KIND, VERSION = "served_features", 1


class ServedFeatures:
    """Encodes the features of requests.

    Args:
        specification: of the log.
        encoding: its vocabularies and scales.
        of_items: feature -> its values of all items, by dense index.
        numbers: features that are dense inputs, in their order.
        items: N; ids that no item has are row N.
    """

    def __init__(
        self,
        specification: Specification,
        encoding: FeatureEncoding,
        of_items: Mapping[str, Array | Jagged],
        numbers: tuple[str, ...],
        items: int,
    ) -> None:
        self.specification, self.numbers = specification, numbers
        self._encoding, self._of_items, self._items = encoding, dict(of_items), items
        self._features = {feature_key(f): f for f in specification.features}

    @property
    def asked(self) -> dict[str, Feature]:
        """Key -> feature that a request may state: all but those of items."""
        return {key: f for key, f in self._features.items() if key not in self._of_items}

    @property
    def keys(self) -> tuple[str, ...]:
        """Of all features."""
        return tuple(self._features)

    def of_candidates(self, key: str, given: pa.Array | None, items: Array) -> Array | Jagged:
        """A feature of context, user or item for candidates.

        Args:
            key: of the feature.
            given: what the request says: one value, or one for each candidate; None: missing.
            items: ``[n]`` dense indices of the candidates.

        Returns:
            ``[n]`` rows or numbers, ``[n, d]`` vectors, or several rows each.

        Raises:
            SidError: another number of values, values that are no numbers.
        """
        if key in self._of_items:
            return self._complete(self._features[key], take(self._of_items[key], items))
        found = self._encode(key, _one(given, self._features[key]), (1, len(items)))
        whole = len(found.lengths) if isinstance(found, Jagged) else len(found)
        at = np.zeros(len(items), np.int64) if whole == 1 else np.arange(len(items))
        return take(found, at)

    def of_events(self, key: str, given: pa.Array | None, kept: Array, items: Array, events: int) -> Array:
        """A feature of past events.

        Args:
            key: of the feature.
            given: what the request says of its ``events`` events; None: missing.
            kept: ``[m]`` places of the events that the model reads.
            items: ``[m]`` dense indices of their items.
            events: of the request.

        Raises:
            SidError: another number of values than events, values that are no numbers.
        """
        if key in self._of_items:
            found = take(self._of_items[key], items)
        else:
            column = pa.nulls(events) if given is None else given
            found = take(self._encode(key, column, (events,)), kept)
        whole = self._complete(self._features[key], found)
        assert not isinstance(whole, Jagged)  # refused where the model was built
        return whole

    def _encode(self, key: str, column: pa.Array, sizes: tuple[int, ...]) -> Array | Jagged:
        if len(column) not in sizes:
            wanted = " or ".join(map(str, sorted(set(sizes))))
            raise SidError(key, f"{len(column)} values", f"Send {wanted}.")
        try:
            return self._complete(
                self._features[key], self._encoding.encode(self._features[key], _typed(column))
            )
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise SidError(key, str(error).splitlines()[0], "Send it as the log has it.") from error

    def _complete(self, feature: Feature, found: Array | Jagged) -> Array | Jagged:
        if isinstance(feature, ItemIdFeature) and not isinstance(found, Jagged):
            return np.where(found < 0, self._items, found)
        return found

    @staticmethod
    def write(log: PreparedLog, path: Place) -> bool:
        """Write the features of a log; False where it has none."""
        plain, said = log.manifest["specification"], log.manifest["features"]
        if plain is None or log.specification is None or not log.specification.features:
            return False
        tensors: dict[str, Tensor] = {}
        for feature in log.specification.features:
            key = feature_key(feature)
            if feature.source not in ("item", "history"):
                continue
            try:
                found = log.item_feature(key)
            except ArtifactError:
                continue  # a column of past events
            if isinstance(found, Jagged):
                tensors[f"values/{key}"] = torch.from_numpy(np.array(found.values))
                tensors[f"lengths/{key}"] = torch.from_numpy(np.array(found.lengths))
            else:
                tensors[f"column/{key}"] = torch.from_numpy(np.array(found))
        for name, table in said["tables"].items():
            if table["hash_rows"] is None:
                texts = [text.encode() for text in log.vocabulary(name).to_pylist()]
                tensors[f"text/{name}"] = torch.frombuffer(
                    bytearray(b"".join(texts) or b"\0"), dtype=torch.uint8
                )
                tensors[f"text_lengths/{name}"] = torch.tensor(
                    [len(text) for text in texts], dtype=torch.int64
                )
        config = {
            "specification": plain,
            "tables": {name: table["hash_rows"] for name, table in said["tables"].items()},
            "scales": said["scales"],
            "numbers": number_keys(log),
            "items": log.items,
        }
        save_artifact(path, kind=KIND, version=VERSION, config=config, tensors=tensors)
        return True

    @classmethod
    def read(
        cls, path: Place, index: Callable[[pa.Array], Array], *, verify: bool = True
    ) -> ServedFeatures:
        """Read what :meth:`write` wrote.

        Args:
            path: of the file.
            index: own ids of items -> dense indices, -1 where unknown.
            verify: compare the file with its hash.

        Raises:
            ArtifactError: missing, altered or damaged.
        """
        found = load_artifact(path, kind=KIND, version=VERSION, verify=verify)
        tensors, config = {name: t.numpy() for name, t in found.tensors.items()}, found.config
        try:
            specification = Specification.from_plain(config["specification"], str(path))
            encoding = FeatureEncoding(specification.features, index)
            for name, hash_rows in config["tables"].items():
                texts = None if hash_rows is not None else _texts(tensors, name)
                encoding.tables[name] = ValueRows(hash_rows) if texts is None else ValueRows(None, texts)
            encoding.scales = {name: NumberScale(**scale) for name, scale in config["scales"].items()}
            columns: dict[str, Array | Jagged] = {}
            for name, values in tensors.items():
                kind, _, key = name.partition("/")
                if kind == "column":
                    columns[key] = values
                elif kind == "values":
                    columns[key] = Jagged(values, tensors[f"lengths/{key}"])
            return cls(specification, encoding, columns, tuple(config["numbers"]), config["items"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(str(path), f"is damaged ({error!r})", "Export the model again.") from error


def _texts(tensors: Mapping[str, Array], name: str) -> pa.Array:
    lengths = tensors[f"text_lengths/{name}"]
    ends = np.append(0, np.cumsum(lengths)).astype(np.int64)
    whole = tensors[f"text/{name}"].tobytes()
    texts = [whole[begin:end].decode() for begin, end in zip(ends[:-1], ends[1:], strict=True)]
    return pa.array(texts, pa.large_string())


def _one(given: pa.Array | None, feature: Feature) -> pa.Array:
    """The column of one request; the values of a feature that has several are one row's."""
    if given is None:
        if isinstance(feature, EmbeddingFeature):
            raise SidError(feature_key(feature), "missing", "Send its numbers.")
        return pa.nulls(1)
    whole = getattr(feature, "multi", False) or isinstance(feature, EmbeddingFeature)
    if whole and not pa.types.is_list(given.type):
        return pa.ListArray.from_arrays(pa.array([0, len(given)], pa.int32()), given)
    return given


def _typed(column: pa.Array) -> pa.Array:
    # All missing: any feature reads that from texts.
    return column.cast(pa.large_string()) if pa.types.is_null(column.type) else column


def is_number(feature: Feature) -> bool:
    """Whether a request states a feature in numbers."""
    return isinstance(feature, NumericFeature | EmbeddingFeature)
