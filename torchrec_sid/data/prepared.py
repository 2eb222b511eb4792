"""A prepared log on disk: what :func:`~torchrec_sid.data.prepare.prepare` writes and readers open."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from torchrec_sid.data.events import SPLITS
from torchrec_sid.data.examples import SEGMENTS
from torchrec_sid.data.history_store import HistoryStore
from torchrec_sid.data.parquet import Array
from torchrec_sid.errors import ArtifactError, SidError

__all__ = ["LAYOUT_VERSION", "MANIFEST", "SEGMENTS", "PreparedLog"]

MANIFEST = "manifest.json"
LAYOUT_VERSION = 2


@dataclass(frozen=True)
class PreparedLog:
    """A prepared log; its large parts are memory-mapped."""

    path: Path
    manifest: dict[str, Any]
    """Version, fingerprint, configuration and counts; see docs/data.md."""

    @classmethod
    def open(cls, path: str | Path) -> PreparedLog:
        """Open a prepared log.

        Raises:
            ArtifactError: none there, a newer layout, or damaged.
        """
        path = Path(path)
        file = path / MANIFEST
        if not file.is_file():
            raise ArtifactError(str(path), "not a prepared log", "Make it with torchrec_sid.data.prepare.")
        try:
            manifest = json.loads(file.read_text())
        except json.JSONDecodeError as error:
            raise ArtifactError(str(file), f"not JSON ({error})", "Prepare the log again.") from error
        if manifest["version"] > LAYOUT_VERSION:
            raise ArtifactError(
                str(file),
                f"has layout version {manifest['version']}, this release reads up to {LAYOUT_VERSION}",
                "Upgrade torchrec-sid.",
            )
        return cls(path, manifest)

    def __getstate__(self) -> dict[str, Any]:
        # Mapped arrays would be copied into a worker process; it opens its own.
        return {"path": self.path, "manifest": self.manifest}

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
    def dense_names(self) -> tuple[str, ...]:
        """Names of the dense features."""
        return tuple(self.manifest["dense"])

    def rows(self, split: str) -> int:
        """Examples in a split, sampled negatives included."""
        return self.manifest["splits"][self.check_split(split)]["rows"]

    @cached_property
    def store(self) -> HistoryStore:
        """The history store."""
        return HistoryStore.open(self.path / "history")

    @cached_property
    def item_ids(self) -> Array:
        """``[N]`` int64: the item id of each dense index."""
        return self._item_array("id")

    @cached_property
    def item_train_events(self) -> Array:
        """``[N]`` int64: events of each item in train (without sampled negatives)."""
        return self._item_array("train_events")

    @cached_property
    def item_segment(self) -> Array:
        """``[N]`` int8: position in :data:`SEGMENTS`."""
        return self._item_array("segment")

    def check_split(self, split: str) -> str:
        """The split's name, or SidError if there is no such split."""
        if split not in SPLITS:
            raise SidError("split", f"{split!r}", f"Choose from {', '.join(SPLITS)}.")
        return split

    def _item_array(self, name: str) -> Array:
        file = self.path / "items" / f"{name}.npy"
        try:
            values: Array = np.load(file, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise ArtifactError(str(file), f"cannot be read ({error})", "Prepare the log again.") from error
        return values
