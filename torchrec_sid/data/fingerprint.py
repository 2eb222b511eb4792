"""What a prepared log was made of: its input files, by content."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchrec_sid.data.schema import EVENTS, HISTORIES, ITEMS, LogFolder


@dataclass(frozen=True)
class InputFiles:
    """Size, modification time and SHA-256 of each input file."""

    entries: dict[str, dict[str, Any]]
    """File name -> ``bytes``, ``mtime_ns``, ``sha256``, as the manifest holds them."""

    @classmethod
    def of(cls, folder: LogFolder, manifest: Path) -> InputFiles:
        """Hash the files of a log; those unchanged since an earlier manifest are not read again.

        Args:
            folder: the log. Its embeddings count by which items have one, not by their values: examples
                do not depend on them.
            manifest: of an earlier preparation, if there is one.
        """
        known: dict[str, Any] = {}
        if manifest.is_file():
            try:
                known = json.loads(manifest.read_text())["inputs"]
            except (json.JSONDecodeError, KeyError):
                known = {}
        paths = [folder.path / n for n in (ITEMS, EVENTS, HISTORIES) if (folder.path / n).is_file()]
        return cls({path.name: _entry(path, known.get(path.name, {})) for path in paths})

    def fingerprint(self, version: int, config: dict[str, Any], folder: LogFolder) -> str:
        """SHA-256 (hex) of the contents, the configuration, the items and the layout version."""
        digest = hashlib.sha256()
        contents = {name: entry["sha256"] for name, entry in self.entries.items()}
        digest.update(json.dumps([version, config, contents, folder.drop_bare], sort_keys=True).encode())
        digest.update(folder.item_ids.tobytes())
        return digest.hexdigest()


def _entry(path: Path, known: dict[str, Any]) -> dict[str, Any]:
    status = path.stat()
    same = known.get("bytes") == status.st_size and known.get("mtime_ns") == status.st_mtime_ns
    if same and "sha256" in known:
        return known
    with path.open("rb") as file:
        sha = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns, "sha256": sha}
