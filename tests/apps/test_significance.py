"""Intervals of rows: from predictions of real evaluations, paired, by user and seed."""

from pathlib import Path

import numpy as np
import pytest
import torch

from apps.rows import Comparison, Row
from apps.significance import Predicted, intervals
from torchrec_sid.artifact import save_artifact
from torchrec_sid.errors import SidError
from torchrec_sid.metrics import SlicedMetrics
from torchrec_sid.models.build import RankingConfig
from torchrec_sid.training.run import PREDICTIONS, PREDICTIONS_VERSION

USERS, EACH = 120, 12


def _write(folder: Path, logits: torch.Tensor, labels: torch.Tensor, ranks: int = 1, **changes) -> Path:
    """A run's predictions; user by user, every fourth row cold."""
    rows = len(logits)
    tensors = {
        "logits": logits.float(),
        "labels": labels,
        "weights": torch.ones(rows),
        "segments": torch.where(torch.arange(rows) % 4 == 0, 3, 0),
        "users": torch.arange(rows) // EACH,
    }
    tensors |= changes
    for rank in range(ranks):
        part = {
            name: value[rank * rows // ranks : (rank + 1) * rows // ranks]
            for name, value in tensors.items()
        }
        save_artifact(
            folder / f"predictions-rank-{rank}.safetensors",
            kind=PREDICTIONS,
            version=PREDICTIONS_VERSION,
            config={"split": "test"},
            tensors=part,
        )
    return folder


@pytest.fixture
def trained(tmp_path: Path):
    random = torch.Generator().manual_seed(0)
    truth = torch.randn(USERS, 1, generator=random).expand(USERS, EACH).flatten()
    labels = (torch.rand(USERS * EACH, generator=random) < torch.sigmoid(truth)).float()

    def noisy(scale: float) -> torch.Tensor:
        return truth + scale * torch.randn(USERS * EACH, generator=random)

    runs: dict[str, list[Path]] = {"base": [], "good": [], "same": []}
    for seed in range(3):
        base = noisy(1.0)
        for name, logits in (("base", base), ("good", noisy(0.3)), ("same", base)):
            folder = tmp_path / f"{name}{seed}"
            folder.mkdir()
            runs[name].append(_write(folder, logits, labels, ranks=1 + (name == "good")))
    rows = tuple(Row(name, RankingConfig(arm="none")) for name in runs)
    return Comparison("t", rows, none="base"), runs


def test_gains_are_those_of_torchrecs_metrics_and_two_equal_rows_tie(trained) -> None:
    comparison, runs = trained
    found = intervals(comparison, runs, draws=400)
    ne = {name: [_ne(Predicted.read(run)) for run in mine] for name, mine in runs.items()}
    gains = [100 * (1 - a / b) for a, b in zip(ne["good"], ne["base"], strict=True)]
    good = found["good"]["gain"]["all"]
    assert good["estimate"] == pytest.approx(np.mean(gains), abs=1e-4)
    assert 0 < good["low"] < good["estimate"] < good["high"] and good["p"] < 0.02
    assert found["good"]["ne"]["all"]["estimate"] == pytest.approx(np.mean(ne["good"]), abs=1e-6)
    assert found["same"]["gain"]["all"] == {"estimate": 0, "low": 0, "high": 0, "p": 1}
    assert found["good"]["cold_over_none"]["cold"] == found["good"]["gain"]["cold"]
    assert found["good"]["cold_over_features"] == {"cold": None}


def test_an_interval_is_that_of_copying_rows_of_the_users_drawn(trained) -> None:
    comparison, runs = trained
    one = {name: mine[:1] for name, mine in runs.items()}
    draws = 1500
    found = intervals(comparison, one, draws=draws)["good"]["gain"]["cold"]
    good, base = (Predicted.read(one[name][0]) for name in ("good", "base"))
    random, drawn = np.random.default_rng(5), []
    for _ in range(draws):
        rows = (random.integers(USERS, size=USERS)[:, None] * EACH + np.arange(0, EACH, 4)).ravel()
        drawn.append(100 * (1 - _loss(good, rows) / _loss(base, rows)))
    expected = np.percentile(drawn, [2.5, 97.5])
    width = expected[1] - expected[0]
    assert [found["low"], found["high"]] == pytest.approx(expected, abs=0.08 * width)


def test_rows_of_other_examples_are_not_compared(trained, tmp_path: Path) -> None:
    comparison, runs = trained
    predicted = Predicted.read(runs["good"][1])
    users = torch.from_numpy(predicted.users).flip(0)
    _write(
        runs["good"][1], torch.from_numpy(predicted.logits), torch.from_numpy(predicted.labels), users=users
    )
    (runs["good"][1] / "predictions-rank-1.safetensors").unlink()
    with pytest.raises(SidError, match="row 'good', seed 1.*other examples"):
        intervals(comparison, runs)


def test_runs_without_predictions_or_with_those_of_0_1_have_no_intervals(trained) -> None:
    comparison, runs = trained
    file = runs["base"][0] / "predictions-rank-0.safetensors"
    save_artifact(file, kind=PREDICTIONS, version=1, config={}, tensors={"predictions": torch.ones(3)})
    assert intervals(comparison, runs) == {}
    file.unlink()
    assert Predicted.read(runs["base"][0]) is None and intervals(comparison, runs) == {}


def _loss(each: Predicted, rows: np.ndarray) -> float:
    p = 1 / (1 + np.exp(-each.logits[rows]))
    return -np.mean(np.log(np.where(each.labels[rows] > 0, p, 1 - p)))


def _ne(each: Predicted) -> float:
    rows = len(each.labels)
    metrics = SlicedMetrics(rows=rows, batch_size=rows)
    metrics.update(
        predictions=torch.from_numpy(each.logits).sigmoid(),
        labels=torch.from_numpy(each.labels),
        weights=torch.ones(rows),
        segment=torch.from_numpy(each.segments),
    )
    return metrics.compute()["all"].ne
