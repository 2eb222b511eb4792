"""``recipe.json``: what the SIDs of a folder are made of, sealed before they are made and again with them.

The first seal says whose work has begun, so that the same command goes on where it was killed; the second
one lists the quantizer and the vocabulary, and names the catalog.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from torchrec_sid.artifact import Place, SealedFolder, has_manifest, open_folder, record_file, seal_folder
from torchrec_sid.catalog import SidCatalog
from torchrec_sid.data.fingerprint import file_entry
from torchrec_sid.data.lake import folder_at
from torchrec_sid.errors import ArtifactError, SidError

KIND = "sid_recipe"
VERSION = 1
STAMP = "recipe.json"


def describe_sources(
    recipe: Mapping[str, Any],
    folders: Sequence[str | Path],
    output: Path,
    *,
    log: str | None,
    fit_on: NDArray[Any] | None,
    label: str | None,
    processes: int,
) -> dict[str, Any]:
    """What SIDs depend on: recipe, log, and the content of every file of the items.

    Args:
        recipe: its fields.
        folders: of the items, and of their embeddings where that is another.
        output: folder of the SIDs; files that did not change since its last stamp are not hashed again.
        log: fingerprint of the prepared log; None without one.
        fit_on: ``[N]`` bool, rows that the caller chose.
        label: column of the purity.
        processes: that fit together.
    """
    found = _open(output)
    known = found.config.get("inputs", {}) if found is not None else {}
    plain = {
        "recipe": recipe,
        "log": log,
        "fit_on": None if fit_on is None else hashlib.sha256(np.packbits(fit_on).tobytes()).hexdigest(),
        "label": label,
        "processes": processes,
        "inputs": _inputs(folders, known),
    }
    described: dict[str, Any] = json.loads(json.dumps(plain))
    return described


def begin(output: Path, wanted: Mapping[str, Any]) -> None:
    """Say that SIDs of ``wanted`` are being made: what is there belongs to nobody else from now on.

    Raises:
        SidError: the disk is full, read-only or not ours.
    """
    output.mkdir(parents=True, exist_ok=True)
    config = {**wanted, "catalog": None}
    seal_folder(output, kind=KIND, version=VERSION, config=config, files={}, manifest=STAMP)


def finish(output: Path, wanted: Mapping[str, Any], files: tuple[str, ...]) -> None:
    """Say that they are made.

    Args:
        output: their folder.
        wanted: as in :func:`begin`.
        files: those beside the catalog that belong to them.
    """
    config = {**wanted, "catalog": SidCatalog.open(output / "catalog", verify=False).fingerprint}
    records = {name: record_file(output, name, flush=True) for name in files}
    seal_folder(output, kind=KIND, version=VERSION, config=config, files=records, manifest=STAMP)


def progress_of(output: Path, wanted: Mapping[str, Any]) -> Literal["made", "begun", "other"]:
    """Whether ``wanted`` made what is there, has begun to, or has nothing to do with it."""
    found = _open(output)
    if found is None or not _same_content(found.config, wanted):
        return "other"
    mark = found.config.get("catalog")
    if mark is None:
        return "begun"
    try:
        found.verify()
        catalog = SidCatalog.open(output / "catalog", verify=False)
    except SidError:
        return "other"
    return "made" if catalog.extends(str(mark)) else "other"


def _open(output: Path) -> SealedFolder | None:
    """None where there is no stamp, or one that was altered, is of an earlier form, or lacks its files."""
    if not has_manifest(output, STAMP):
        return None
    try:
        return open_folder(output, kind=KIND, version=VERSION, manifest=STAMP)
    except ArtifactError:
        return None


def _inputs(folders: Sequence[str | Path], known: dict[str, Any]) -> dict[str, Any]:
    """Size, modification time and SHA-256 of the items and their embeddings, by file."""
    found = {}
    for place in map(folder_at, folders):
        tops = [top for top in place.iterdir() if top.name.startswith("item")]
        for path in sorted((file for top in tops for file in _files_below(top)), key=str):
            name = str(path).removeprefix(f"{place}/")
            found[name] = file_entry(path, known.get(name, {}))
    return found


def _files_below(path: Place) -> list[Place]:
    if path.is_file():
        return [path]
    return [file for below in path.iterdir() for file in _files_below(below)]


def _same_content(stamp: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Equal but for the times of files."""

    def contents(identity: Mapping[str, Any]) -> dict[str, Any]:
        hashes = {name: entry["sha256"] for name, entry in identity["inputs"].items()}
        return {**identity, "inputs": hashes, "catalog": None}

    return contents(stamp) == contents(wanted)
