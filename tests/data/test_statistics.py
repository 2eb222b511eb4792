"""What is measured of a log comes from its training rows, and reaches the model."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.data.logs import random_events, read_examples, write_log
from tests.logs import small_log
from torchrec_sid.ages import HISTORY_AGES
from torchrec_sid.data.prepare import PrepareConfig, prepare
from torchrec_sid.data.prepared import PreparedLog
from torchrec_sid.data.statistics import action_values, mean_history, measure_log
from torchrec_sid.models.build import RankingConfig
from torchrec_sid.models.stores import SideStore
from torchrec_sid.side.basis import FrozenBasis
from torchrec_sid.side.features import SideFeatures, SideFeaturesConfig
from torchrec_sid.spec import SidSpec
from torchrec_sid.training.run import build_run, log_sizes
from torchrec_sid.training.train_config import TrainConfig

SIDE = SidSpec((3,) * 10)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> PreparedLog:
    return small_log(tmp_path_factory.mktemp("statistics"))


def test_dense_statistics_are_those_of_the_first_training_rows(log: PreparedLog) -> None:
    rows = read_examples(log, "train")[:16_384]
    dense = np.array([[row[name] for name in log.dense_names] for row in rows])
    found = measure_log(log).dense.double().numpy()
    np.testing.assert_allclose(found, [dense.mean(0), dense.std(0)], rtol=1e-4, atol=1e-5)
    later = np.array([[row[name] for name in log.dense_names] for row in read_examples(log, "valid")])
    assert np.abs(found[0] - later.mean(0)).max() > 0.01, "validation would look the same"


def test_mean_history_is_that_of_the_first_training_rows(log: PreparedLog) -> None:
    lengths = [len(row["history"]) for row in read_examples(log, "train")[:4096]]
    for most in (1, 5, 50):
        assert mean_history(log, most) == pytest.approx(np.minimum(lengths, most).mean())
    assert mean_history(log, 0) == 0


def test_action_values_are_those_of_the_histories(tmp_path: Path) -> None:
    events = random_events(600)
    events["rating"] = np.random.default_rng(0).choice([1, 4, 5], 600).tolist()
    log = prepare(write_log(tmp_path / "log", events), tmp_path / "out", PrepareConfig(block_rows=8))
    seen = [h[2] for row in read_examples(log, "train") for h in row["history"][-64:]]
    expected = np.arange(log.actions) - np.mean(seen)
    largest = np.abs(expected[sorted(set(seen))]).max()
    found = measure_log(log).action_values
    np.testing.assert_allclose(found, np.clip(expected / largest, -1, 1), rtol=1e-5)
    assert action_values(torch.ones(4, dtype=torch.int64), 2).tolist() == [1, 1]


def test_what_was_measured_reaches_the_model(log: PreparedLog) -> None:
    digits = torch.randint(0, 3, (log.items, 10), generator=torch.Generator().manual_seed(2))
    packed = SIDE.pack_bytes(digits)
    store = SideStore(FrozenBasis.from_digits(SIDE, torch.randn(10, 6)), values={"bytes": packed})
    config = TrainConfig("log", "run", model=RankingConfig("side", dim=8, heads=2, history_length=8))
    measured = measure_log(log)
    model = build_run(config, log, (store,)).module.model
    mean, deviation = measured.dense
    torch.testing.assert_close(
        model.standardise.statistics, torch.stack([mean, torch.where(deviation > 0, deviation, 1.0)])
    )
    channel = model.channels["side"]
    torch.testing.assert_close(channel.action_values, measured.action_values)
    assert not torch.equal(channel.action_values, torch.ones(log.actions))
    features = SideFeatures(SIDE, SideFeaturesConfig(kind="one_hot"))
    assert not torch.equal(channel.features(packed), features(packed))
    torch.testing.assert_close(channel.features(packed), features.calibrate(packed)(packed))
    stream = replace(config, model=replace(config.model, encoder_layers=1))
    (part,) = build_run(stream, log, (store,)).module.model.channels["stream"].embedder.parts
    torch.testing.assert_close(part.features(packed), features.calibrate(packed)(packed))
    assert log_sizes(log, 8).ages == HISTORY_AGES
