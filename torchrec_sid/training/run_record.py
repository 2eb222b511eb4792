"""``run.json``: what a run depends on and how it was configured, sealed; what evaluate and export go by.

``config.json`` beside it says the same to people, and to ``train --config``. Once training has ended, the
record lists ``metrics.json`` too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

from torchrec_sid.artifact import (
    Contents,
    SealedFolder,
    has_manifest,
    open_folder,
    record_file,
    seal_folder,
)
from torchrec_sid.data.prepared import PreparedLog
from torchrec_sid.errors import ArtifactError
from torchrec_sid.models.stores import ItemStore
from torchrec_sid.options import load_options, make_options
from torchrec_sid.training.train_config import TrainConfig

KIND = "training_run"
VERSION = 1
RECORD = "run.json"
METRICS = "metrics.json"
_EARLIER = "config.json"


def run_identity(config: TrainConfig, log: PreparedLog, stores: Iterable[ItemStore]) -> dict[str, str]:
    """Fingerprints of everything that the weights of a run depend on, beside its configuration.

    Returns:
        ``log`` and ``seed``; ``specification`` where the log has one; what the stores of the arm read:
        catalogs (whose fingerprints bind their quantizers'), vocabularies, content.
    """
    identity = {"log": log.fingerprint, "seed": str(config.seed)}
    plain = log.manifest["specification"]
    if plain is not None:
        text = json.dumps(plain, sort_keys=True)
        identity["specification"] = hashlib.sha256(text.encode()).hexdigest()
    for store in stores:
        identity |= store.identity
    if config.shuffle_sids:
        identity["SIDs"] = "shuffled"
    return identity


def seal_run(
    output: Path, config: TrainConfig, identity: Mapping[str, str], *, finished: bool = False
) -> None:
    """Write the record of a run.

    Args:
        output: its directory.
        config: as it was given.
        identity: of :func:`run_identity`.
        finished: metrics.json is there.

    Raises:
        SidError: the disk is full, read-only or not ours.
    """
    files = {METRICS: record_file(output, METRICS, flush=True)} if finished else {}
    body = {"identity": dict(identity), "config": asdict(config)}
    seal_folder(output, kind=KIND, version=VERSION, config=body, files=files, manifest=RECORD)


def is_finished(output: Path) -> bool:
    """Whether a training ended here and its metrics are as it wrote them."""
    try:
        record = _open(output)
        record.verify()
    except ArtifactError:
        return False
    return METRICS in record.files


def trained_config(output: Path) -> TrainConfig:
    """How the run in a directory was configured; runs of earlier releases have no record of it.

    Raises:
        ArtifactError: no run is there, or its record was altered.
    """
    if not has_manifest(output, RECORD) and not (output / _EARLIER).is_file():
        raise ArtifactError(
            f"{output}/{RECORD}", "no such file", "Pass a run directory of torchrec-sid train."
        )
    record = _open(output)
    if not record.seal:
        return load_options(TrainConfig, output / _EARLIER)
    return make_options(TrainConfig, record.config.get("config"), f"{output}/{RECORD}")


def _open(output: Path) -> SealedFolder:
    manifest = RECORD if has_manifest(output, RECORD) else _EARLIER
    # Without a seal it is refused where the environment has a key.
    earlier = None if manifest == RECORD else (lambda body, _: Contents(1, body, {}))
    return open_folder(output, kind=KIND, version=VERSION, earlier=earlier, manifest=manifest)
