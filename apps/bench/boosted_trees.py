"""LightGBM on the features of a log, without ids and content: an outside reference for NE.

    python -m apps.bench.boosted_trees --data FOLDER --specification FILE.yaml --against RUN --json FILE

Trees see what a ranker sees of every example beside items and histories: the dense features and counters,
each categorical feature by its row, and lists of categories as indicators. They are grown on train, stopped
on valid, and read on test; NE, AUC and slices are computed as those of a ranker. ``--against`` is a run
directory of `torchrec-sid train`, or of a table, with predictions on the same split: the difference gets an
interval.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from apps.cli import parse_config, plain_errors
from apps.rows import Comparison, Row
from apps.significance import intervals
from torchrec_sid.artifact import save_artifact, write_json
from torchrec_sid.data.batch import BatchConfig
from torchrec_sid.data.example_features import dense_names, log_features, looks_up
from torchrec_sid.data.prepare import PrepareConfig, prepare
from torchrec_sid.data.prepared import PreparedLog
from torchrec_sid.data.reader import BatchReader
from torchrec_sid.data.schema import find_specification
from torchrec_sid.data.specification import CategoricalFeature, ItemIdFeature
from torchrec_sid.errors import SidError
from torchrec_sid.metrics import SlicedMetrics
from torchrec_sid.models.build import RankingConfig
from torchrec_sid.training.run import PREDICTIONS, PREDICTIONS_VERSION

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class BoostedTreesConfig:
    """One reference."""

    data: str
    """Folder of the log."""
    specification: str | None = None
    """What its columns are (YAML, or the name of one that comes with the package)."""
    prepared: str | None = None
    """Folder of the prepared log, made there if it is not up to date; default: a temporary one."""
    against: str | None = None
    """Run directory whose predictions of the test period it is compared with."""
    json: str | None = None
    """File for the figures."""
    leaves: int = 63
    """Of each tree."""
    rate: float = 0.05
    """Shrinkage."""
    trees: int = 2000
    """At most."""
    patience: int = 50
    """Trees without a better validation loss after which growing stops."""
    threads: int = 1
    """Of LightGBM."""
    seed: int = 0
    """Of the draws of rows and columns."""


class Examples(NamedTuple):
    """A split as a matrix."""

    features: Array
    """``[rows, columns]`` float32."""
    labels: Array
    weights: Array
    segments: Array
    users: Array
    categorical: list[int]
    """Columns whose numbers are names."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """What predictions keep of the rows."""
        names = ("labels", "weights", "segments", "users")
        return {name: torch.from_numpy(getattr(self, name)) for name in names}


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    with plain_errors():
        config = parse_config(BoostedTreesConfig, __doc__, argv)
        found = boosted_trees(config)
    whole, cold = found["slices"]["all"], found["slices"]["cold"]
    print(f"LightGBM, {found['trees']} trees over {found['columns']} columns:", end=" ")
    print(f"NE {whole['ne']:.4f}, AUC {whole['auc']:.4f}, cold items {cold['ne'] or float('nan'):.4f}")
    for piece, gain in found.get("gain", {}).items():
        if gain is not None:
            print(f"{config.against} over it, {piece}: {gain['estimate']:+.2f}%", end=" ")
            print(f"[{gain['low']:+.2f}, {gain['high']:+.2f}], p {gain['p']:.4f}")


def boosted_trees(config: BoostedTreesConfig) -> dict[str, Any]:
    """Grow, read on test, and compare.

    Returns:
        ``slices`` of metrics, ``trees``, ``columns``, and with ``against`` the ``gain`` of that run over
        the trees: slice -> interval.

    Raises:
        SidError: LightGBM is not installed, bad data, or a run that was read on other examples.
    """
    try:
        import lightgbm
    except ImportError as error:
        raise SidError("lightgbm", "is not installed", "pip install torchrec-sid[bench]") from error
    with tempfile.TemporaryDirectory() as folder:
        described = find_specification(config.data, config.specification)
        place = Path(config.prepared or f"{folder}/prepared")
        log = prepare(config.data, place, PrepareConfig(), specification=described)
        train, valid, test = (read_examples(log, split) for split in ("train", "valid", "test"))
        model = lightgbm.LGBMClassifier(
            num_leaves=config.leaves,
            learning_rate=config.rate,
            n_estimators=config.trees,
            min_child_samples=100,
            subsample=0.8,
            subsample_freq=1,
            colsample_bytree=0.8,
            n_jobs=config.threads,
            random_state=config.seed,
            verbose=-1,
        )
        model.fit(
            train.features,
            train.labels,
            sample_weight=train.weights,
            eval_set=[(valid.features, valid.labels)],
            eval_sample_weight=[valid.weights],
            categorical_feature=train.categorical,
            callbacks=[lightgbm.early_stopping(config.patience, verbose=False)],
        )
        logits = torch.from_numpy(np.asarray(model.predict(test.features, raw_score=True), np.float32))
        found: dict[str, Any] = {
            "slices": _slices(logits, test),
            "trees": int(model.best_iteration_ or config.trees),
            "columns": train.features.shape[1],
        }
        if config.against is not None:
            found["gain"] = _gain(logits, test, Path(folder), Path(config.against))
    if config.json is not None:
        write_json(Path(config.json), {"config": asdict(config), **found})
    return found


def read_examples(log: PreparedLog, split: str) -> Examples:
    """Everything of a split but items and histories.

    Args:
        log: prepared.
        split: ``train``, ``valid`` or ``test``.
    """
    features = {
        key: feature
        for key, feature in log_features(log).items()
        if looks_up(feature) and feature.source != "history" and not isinstance(feature, ItemIdFeature)
    }
    config = BatchConfig(4096, 1, ("item", *features))
    reader = BatchReader(log, split, config, drop_last=False)
    names = list(dense_names(log))
    columns: list[list[Array]] = []
    kept: list[tuple[Array, Array, Array]] = []
    for batch in reader:
        own = batch.weights > 0
        parts = [batch.dense.numpy()]
        for key, feature in features.items():
            bag = batch.features[key]
            if isinstance(feature, CategoricalFeature) and feature.multi:
                shown = np.zeros((len(own), log.table_rows(feature)), np.float32)
                row = torch.repeat_interleave(torch.arange(len(own)), bag.lengths())
                shown[row.numpy(), bag.values().numpy()] = 1
                parts.append(shown)
            else:
                parts.append(bag.values().numpy().astype(np.float32)[:, None])
        columns.append([part[own.numpy()] for part in parts])
        labels = batch.labels if batch.labels.dim() == 1 else batch.labels[:, 0]
        kept.append((labels[own].numpy(), batch.weights[own].numpy(), batch.segment[own].numpy()))
    at, categorical = len(names), []
    for (_, feature), part in zip(features.items(), columns[0][1:], strict=True):
        if part.shape[1] == 1 and isinstance(feature, CategoricalFeature):
            categorical.append(at)
        at += part.shape[1]
    users = reader.users()
    matrix = np.concatenate([np.concatenate(parts, axis=1) for parts in columns])
    whole = [np.concatenate(parts) for parts in zip(*kept, strict=True)]
    labels_of, weights_of, segments_of = whole
    own_users: Array = users[users >= 0].numpy()
    return Examples(matrix, labels_of, weights_of, segments_of, own_users, categorical)


def _slices(logits: torch.Tensor, test: Examples) -> dict[str, Any]:
    rows = len(logits)
    metrics = SlicedMetrics(rows, rows)
    metrics.update(
        predictions=logits.double().sigmoid(),
        labels=torch.from_numpy(test.labels),
        weights=torch.from_numpy(test.weights),
        segment=torch.from_numpy(test.segments),
    )
    return {name: asdict(found) for name, found in metrics.compute().items()}


def _gain(logits: torch.Tensor, test: Examples, folder: Path, against: Path) -> dict[str, Any]:
    save_artifact(
        folder / "predictions-rank-0.safetensors",
        kind=PREDICTIONS,
        version=PREDICTIONS_VERSION,
        config={"split": "test"},
        tensors={"logits": logits, **test.tensors()},
    )
    rows = tuple(Row(name, RankingConfig(arm="none")) for name in ("trees", "run"))
    found = intervals(Comparison("trees", rows), {"trees": [folder], "run": [against]})
    if not found:
        raise SidError(str(against), "holds no predictions", "Train it with --predictions true.")
    gains: dict[str, Any] = found["run"]["gain"]
    return gains


if __name__ == "__main__":
    main()
