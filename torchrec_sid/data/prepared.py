"""A prepared log on disk: what :func:`~torchrec_sid.data.prepare.prepare` writes and readers open."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from torchrec_sid.artifact import Contents, SealedFolder, open_folder, read_array
from torchrec_sid.artifact.sealed import is_hash
from torchrec_sid.data.encoding import Jagged, table_of
from torchrec_sid.data.examples import SEGMENTS, SPLITS
from torchrec_sid.data.history_store import HistoryStore
from torchrec_sid.data.parquet import Array
from torchrec_sid.data.specification import CategoricalFeature, NumericFeature, Specification
from torchrec_sid.errors import ArtifactError, SidError

__all__ = ["KIND", "LAYOUT_VERSION", "MANIFEST", "SEGMENTS", "PreparedLog"]

MANIFEST = "manifest.json"
KIND = "prepared_log"
LAYOUT_VERSION = 3
AGAIN = "Prepare the log again."
_OF_ITEMS: dict[str, Any] = {"id": np.int64, "train_events": np.int64, "segment": np.int8}


def bucket_name(bucket: int) -> str:
    """Folder of a bucket within a split or the history."""
    return f"{bucket:05d}"


@dataclass(frozen=True)
class PreparedLog:
    """A prepared log; its large parts are memory-mapped."""

    path: Path
    manifest: dict[str, Any]
    """Fingerprint, configuration and counts; see docs/data.md."""
    closed: tuple[str, ...] = ()
    """Splits that no reader of this object opens, so that nothing can be tuned on them."""

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = False) -> PreparedLog:
        """Open a prepared log.

        Args:
            path: the folder.
            verify: read every byte and compare it with the manifest.

        Raises:
            ArtifactError: none there, another layout, or damaged.
        """
        folder = open_prepared(path, verify=verify)
        if folder.version != LAYOUT_VERSION:
            raise ArtifactError(
                f"{path}/{MANIFEST}",
                f"has layout version {folder.version}, this release reads {LAYOUT_VERSION}",
                f"{AGAIN} It is made of the log alone.",
            )
        if (odd := _contradiction(folder.config)) is not None:
            raise ArtifactError(f"{path}/{MANIFEST}", f"is damaged: {odd}", AGAIN)
        return cls(Path(path), folder.config)

    def __getstate__(self) -> dict[str, Any]:
        # Mapped arrays would be copied into a worker process; it opens its own.
        return {"path": self.path, "manifest": self.manifest, "closed": self.closed}

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the input files and the configuration."""
        return self.manifest["fingerprint"]

    @property
    def items(self) -> int:
        """N: dense item indices are 0..N-1."""
        return self.manifest["items"]

    @property
    def actions(self) -> int:
        """Number of history actions: values are 0..actions-1."""
        return self.manifest["actions"]

    @property
    def block_rows(self) -> int:
        """Rows per block (row group)."""
        return self.manifest["block_rows"]

    @property
    def buckets(self) -> int:
        """Buckets of users, a power of two; each has its histories and its examples."""
        return self.manifest["buckets"]

    @property
    def dense_names(self) -> tuple[str, ...]:
        """Names of the dense features, counters included."""
        return tuple(self.manifest["dense"])

    @cached_property
    def specification(self) -> Specification | None:
        """What the log was prepared with; None: item, history and dense features alone."""
        plain = self.manifest["specification"]
        return None if plain is None else Specification.from_plain(plain, str(self.path))

    def rows(self, split: str, bucket: int | None = None) -> int:
        """Examples in a split or in one bucket of it, sampled negatives included."""
        counts = self.manifest["splits"][self.check_split(split)]
        return counts["rows"] if bucket is None else counts["buckets"][bucket]

    @cached_property
    def has_requests(self) -> bool:
        """Whether examples say which request they belong to."""
        parts = sorted((self.path / "train").glob("*/part-00000.parquet"))
        return bool(parts) and "request" in pq.read_schema(parts[0]).names

    @cached_property
    def store(self) -> HistoryStore:
        """The history store of a log of one bucket.

        Raises:
            SidError: there are several.
        """
        if self.buckets > 1:
            raise SidError(str(self.path), f"has {self.buckets} buckets", "Open each with bucket_store.")
        return self.bucket_store(0)

    def bucket_store(self, bucket: int) -> HistoryStore:
        """The history store of one bucket of users."""
        return HistoryStore.open(self.path / "history" / bucket_name(bucket))

    @cached_property
    def item_ids(self) -> Array:
        """``[N]`` int64: the item id of each dense index, as in ``LogFolder.item_ids``."""
        return self._array("items", "id")

    @cached_property
    def item_keys(self) -> pa.Array:
        """``[N]`` ids of the items as people write them, int64 or text."""
        return self._keys("items", "item")

    @cached_property
    def user_keys(self) -> pa.Array:
        """``[U]`` ids of the users as people write them, by dense user index."""
        return self._keys("users", "user")

    @cached_property
    def item_train_events(self) -> Array:
        """``[N]`` int64: events of each item in train (without sampled negatives)."""
        return self._array("items", "train_events")

    @cached_property
    def item_segment(self) -> Array:
        """``[N]`` int8: position in :data:`SEGMENTS`."""
        return self._array("items", "segment")

    def item_feature(self, key: str) -> Array | Jagged:
        """A feature of all items, ``[N]``, ``[N, d]``, or several values each."""
        return self._feature("items", key)

    def user_feature(self, key: str) -> Array | Jagged:
        """A feature of all users, ``[U]``, ``[U, d]``, or several values each."""
        return self._feature("users", key)

    def vocabulary(self, table: str) -> pa.Array:
        """Values of a table in the order of their rows, from row 2 on; row 0 is missing, 1 unknown."""
        return self._read("vocabularies", table).column("value").combine_chunks()

    def table_rows(self, feature: CategoricalFeature | NumericFeature) -> int:
        """Rows of a feature's table."""
        return self.manifest["features"]["rows"][table_of(feature)]

    def check_split(self, split: str) -> str:
        """The split's name, or SidError if there is no such split or it is closed."""
        if split not in SPLITS:
            raise SidError("split", f"{split!r}", f"Choose from {', '.join(SPLITS)}.")
        if split in self.closed:
            raise SidError(
                "split", f"{split!r} is closed to this run", "Tune on valid; test once, at the end."
            )
        return split

    def _feature(self, folder: str, key: str) -> Array | Jagged:
        if (self.path / folder / f"{key}.values.npy").is_file():
            offsets = self._array(folder, f"{key}.offsets")
            return Jagged(self._array(folder, f"{key}.values"), np.diff(offsets))
        return self._array(folder, key)

    def _array(self, folder: str, name: str) -> Array:
        path = self.path / folder / f"{name}.npy"
        if not path.is_file():
            raise ArtifactError(str(path), "no such file", AGAIN)
        with path.open("rb") as file:
            values: Array = read_array(file, str(path), AGAIN)
        wanted = _OF_ITEMS.get(name) if folder == "items" else None
        if wanted is not None and (values.dtype != wanted or values.shape != (self.items,)):
            found = f"holds {values.dtype} of shape {values.shape} for {self.items} items"
            raise ArtifactError(str(path), found, AGAIN)
        return values

    def _keys(self, folder: str, column: str) -> pa.Array:
        return self._read(folder, "keys").column(column).combine_chunks()

    def _read(self, folder: str, name: str) -> pa.Table:
        file = self.path / folder / f"{name}.parquet"
        try:
            return pq.read_table(file)
        except (pa.ArrowException, OSError) as error:
            raise ArtifactError(str(file), f"cannot be read ({error})", AGAIN) from error


def _contradiction(config: dict[str, Any]) -> str | None:
    """What in a manifest is not of a prepared log; None if all is."""
    for name in ("items", "buckets", "actions", "block_rows"):
        if type(config.get(name)) is not int or config[name] < 1:
            return f"{name} is {str(config.get(name))[:80]!r}"
    dense, splits = config.get("dense"), config.get("splits")
    if not isinstance(dense, list) or not all(isinstance(name, str) for name in dense):
        return "dense is no list of names"
    if not isinstance(splits, dict) or not is_hash(config.get("fingerprint")):
        return "splits or fingerprint are missing"
    for split in SPLITS:
        counts: Any = splits.get(split)
        parts: Any = counts["buckets"] if isinstance(counts, dict) and "buckets" in counts else None
        whole = isinstance(parts, list) and all(type(rows) is int and rows >= 0 for rows in parts)
        if not whole or len(parts) != config["buckets"] or sum(parts) != counts.get("rows"):
            return f"the rows of split {split!r}"
    return None


def open_prepared(path: str | Path, verify: bool = False) -> SealedFolder:
    """The sealed folder of a prepared log, of this layout or an earlier one.

    Raises:
        ArtifactError: none there, of a later layout, or damaged.
    """
    return open_folder(
        path,
        kind=KIND,
        version=LAYOUT_VERSION,
        verify=verify,
        remedy="Make it with torchrec_sid.data.prepare.",
        earlier=lambda body, _: Contents(int(body["version"]), body, {}),
    )
