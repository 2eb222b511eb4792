"""What a prepared log was made of: its input files, by content."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchrec_sid.artifact.place import Place
from torchrec_sid.data.lake import file_hash
from torchrec_sid.data.schema import LogFolder
from torchrec_sid.errors import ArtifactError

TABLES = ("items", "events", "histories", "users")
"""Tables of a log folder that examples are made of."""


@dataclass(frozen=True)
class InputFiles:
    """Size, modification time and SHA-256 of each input file."""

    entries: dict[str, dict[str, Any]]
    """Path below the folder -> ``bytes``, ``mtime_ns``, ``sha256``, as the manifest holds them."""

    @classmethod
    def of(cls, folder: LogFolder, known: dict[str, Any]) -> InputFiles:
        """Hash the files of a log; those unchanged since an earlier manifest are not read again.

        Args:
            folder: the log. Its embeddings count by which items have one, not by their values: examples
                do not depend on them.
            known: entries of an earlier preparation.
        """
        entries = {}
        for name in TABLES:
            table = folder.table(name)
            for file in () if table is None else table.files:
                path = str(file).removeprefix(f"{folder.path}/")
                entries[path] = file_entry(file, known.get(path, {}))
        return cls(entries)

    def fingerprint(self, version: int, config: dict[str, Any], folder: LogFolder) -> str:
        """SHA-256 (hex) of the contents, the configuration, the items and the layout version."""
        digest = hashlib.sha256()
        contents = {name: entry["sha256"] for name, entry in self.entries.items()}
        digest.update(json.dumps([version, config, contents, folder.drop_bare], sort_keys=True).encode())
        digest.update(folder.item_ids.tobytes())
        return digest.hexdigest()


def file_entry(file: Place, known: dict[str, Any]) -> dict[str, Any]:
    """Size, modification time and SHA-256 of a file; one that is as ``known`` says is not read again.

    Raises:
        ArtifactError: it cannot be read.
    """
    if not isinstance(file, Path):
        return {"bytes": file.size(), "mtime_ns": 0, "sha256": file_hash(file)}
    try:
        status = file.stat()
        same = known.get("bytes") == status.st_size and known.get("mtime_ns") == status.st_mtime_ns
        if same and "sha256" in known:
            return known
        return {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns, "sha256": file_hash(file)}
    except OSError as error:
        raise ArtifactError(str(file), f"cannot be read ({error})", "Copy or write it again.") from error
