"""From a log folder to a prepared log: checks, histories, counters, splits, negatives, features.

What can be said as a query is one (:mod:`~torchrec_sid.data.event_queries`), run by an engine in bounded
memory; what is left here is their order, and writing what they yield.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from torchrec_sid.artifact import (
    disk_errors,
    folder_lock,
    has_manifest,
    record_tree,
    seal_folder,
    whole_folder,
)
from torchrec_sid.data.event_columns import event_columns
from torchrec_sid.data.fingerprint import InputFiles
from torchrec_sid.data.lake import ParquetTable
from torchrec_sid.data.prepare_config import PrepareConfig
from torchrec_sid.data.prepared import KIND, LAYOUT_VERSION, PreparedLog, open_prepared
from torchrec_sid.data.schema import LogFolder
from torchrec_sid.data.specification import Specification
from torchrec_sid.errors import ArtifactError, SidError

__all__ = ["PrepareConfig", "log_fingerprint", "prepare"]

SCRATCH = ".scratch"
"""Scratch files of a preparation, inside the folder that it fills."""

_log = logging.getLogger(__name__)


def prepare(
    folder: LogFolder | str | Path,
    out: str | Path,
    config: PrepareConfig | None = None,
    *,
    specification: Specification | None = None,
    progress: Callable[[str], None] | None = None,
) -> PreparedLog:
    """Prepare a log, or reuse what is in ``out`` if it was made of the same files and configuration.

    Args:
        folder: a log in the documented format.
        out: folder to write; replaced as a whole once the new one is complete.
        config: how.
        specification: what the log's columns are; None: those that docs/data.md names, without features.
        progress: called with what is being done, and with what was left out.

    Raises:
        SidError: the log breaks the format (each way is named in docs/data.md), or ``out`` holds
            something else.
        ArtifactError: what is there was damaged: every byte is read before it is used again.
    """
    config, out = config or PrepareConfig(), Path(out)
    source = _source(folder, out, config, specification)
    found = _reusable(out, source.mark)
    if found is not None:
        return found
    with folder_lock(out):
        # Another process may have made it while this one waited.
        found = _reusable(out, source.mark)
        if found is not None:
            return found
        with whole_folder(out, KIND) as work, disk_errors(str(out)):
            manifest = _run(source.folder, config, specification, work, progress or _log.info)
            body = {
                "fingerprint": source.mark,
                **manifest,
                "config": source.recipe,
                "specification": source.recipe["specification"],
                "inputs": source.files.entries,
            }
            seal_folder(work, kind=KIND, version=LAYOUT_VERSION, config=body, files=record_tree(work))
    return PreparedLog.open(out)


def log_fingerprint(
    folder: LogFolder | str | Path,
    out: str | Path,
    config: PrepareConfig | None = None,
    *,
    specification: Specification | None = None,
) -> str:
    """The fingerprint that the log has once :func:`prepare` has filled ``out``; nothing is written.

    Raises:
        SidError: as there, for files that are missing or cannot be read.
    """
    return _source(folder, Path(out), config or PrepareConfig(), specification).mark


class _Source(NamedTuple):
    """What a preparation reads."""

    folder: LogFolder
    recipe: dict[str, Any]
    files: InputFiles
    mark: str


def _source(
    folder: LogFolder | str | Path, out: Path, config: PrepareConfig, specification: Specification | None
) -> _Source:
    if not isinstance(folder, LogFolder):
        folder = LogFolder.open(folder, item_id=specification.columns.item_id if specification else None)
    recipe = asdict(config)
    for engine_only in ("engine", "memory"):
        del recipe[engine_only]
    recipe["specification"] = specification.to_plain() if specification else None
    files = InputFiles.of(folder, _inputs_of(out))
    return _Source(folder, recipe, files, files.fingerprint(LAYOUT_VERSION, recipe, folder))


def _run(
    folder: LogFolder,
    config: PrepareConfig,
    specification: Specification | None,
    work: Path,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    # The libraries of queries are loaded where something is prepared, not where something is read.
    from torchrec_sid.data.engines import open_engine
    from torchrec_sid.data.given_histories import GivenHistories
    from torchrec_sid.data.preparation import Preparation
    from torchrec_sid.data.prepare_run import PrepareRun

    scratch = work / SCRATCH
    scratch.mkdir()
    source = ParquetTable.find(folder.path, "events")
    if not len(source):
        raise SidError(source.where, "no events", "Write one row per event.")
    groups = folder.cold_holdout() if config.holdout else None
    release = np.zeros(len(folder), np.int8) if groups is None else groups
    given = GivenHistories.of(folder, source, release > 0)
    columns = event_columns(source, specification, given.key if given else None, config.action_column)
    engine = open_engine(config.engine, scratch, config.memory)
    run = PrepareRun(
        folder,
        config,
        specification or Specification(),
        engine,
        work,
        scratch,
        progress,
        source,
        columns,
        release,
        given,
    )
    try:
        return Preparation(run).write()
    finally:
        engine.close()
        shutil.rmtree(scratch, ignore_errors=True)


def _inputs_of(out: Path) -> dict[str, Any]:
    if not has_manifest(out):
        return {}
    try:
        found: dict[str, Any] = open_prepared(out).config.get("inputs", {})
    except ArtifactError:
        return {}
    return found


def _reusable(out: Path, mark: str) -> PreparedLog | None:
    if not has_manifest(out):
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise SidError(str(out), "holds something that is not a prepared log", "Choose another folder.")
        return None
    folder = open_prepared(out)
    if folder.version != LAYOUT_VERSION or folder.config.get("fingerprint") != mark:
        return None
    _log.info("reusing the prepared log in %s", out)
    return PreparedLog.open(out, verify=True)
