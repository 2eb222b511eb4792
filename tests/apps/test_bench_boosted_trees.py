"""The outside reference: trees see the features that rankers see, and nothing of items."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from apps.bench.boosted_trees import BoostedTreesConfig, boosted_trees, read_examples
from tests.logs import small_log
from torchrec_sid.artifact import save_artifact
from torchrec_sid.data.example_features import dense_names
from torchrec_sid.data.prepare import PrepareConfig, prepare
from torchrec_sid.data.specification import Specification
from torchrec_sid.errors import SidError
from torchrec_sid.training.run import PREDICTIONS, PREDICTIONS_VERSION

pytest.importorskip("lightgbm", reason="needs the extra bench")
PLAIN = {"features": {"item": {"category": {}}}, "counters": {"keys": ["item", "user"]}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trees")
    small_log(folder)
    (folder / "specification.yaml").write_text(json.dumps(PLAIN))
    return folder


def test_trees_are_read_like_a_ranker_and_compared_with_one(folder: Path, tmp_path: Path) -> None:
    described = Specification.from_plain(PLAIN)
    log = prepare(folder / "log", folder / "features", PrepareConfig(), specification=described)
    test = read_examples(log, "test")
    assert test.features.shape == (log.rows("test"), len(dense_names(log)) + 1)
    assert test.categorical == [len(dense_names(log))] and len(set(test.users.tolist())) > 10
    train = read_examples(log, "train")
    assert len(train.labels) == log.rows("train"), "the last rows of training count here"

    guess = torch.full((len(test.labels),), float(np.log(train.labels.mean() / (1 - train.labels.mean()))))
    save_artifact(
        tmp_path / "predictions-rank-0.safetensors",
        kind=PREDICTIONS,
        version=PREDICTIONS_VERSION,
        config={},
        tensors={"logits": guess, **test.tensors()},
    )
    config = BoostedTreesConfig(
        str(folder / "log"),
        str(folder / "specification.yaml"),
        prepared=str(folder / "features"),
        against=str(tmp_path),
        json=str(tmp_path / "found.json"),
        trees=60,
    )
    found = boosted_trees(config)
    assert 0.5 < found["slices"]["all"]["ne"] < 1 and found["slices"]["all"]["auc"] > 0.55
    gain = found["gain"]["all"]
    # What knows the rate alone is behind, by as much as its NE is above that of the trees.
    expected = 100 * (1 - 1 / found["slices"]["all"]["ne"])
    assert gain["high"] < 0 and gain["estimate"] == pytest.approx(expected, abs=1)
    assert json.loads((tmp_path / "found.json").read_text())["trees"] == found["trees"] <= 60
    (tmp_path / "predictions-rank-0.safetensors").unlink()
    with pytest.raises(SidError, match="holds no predictions"):
        boosted_trees(config)
