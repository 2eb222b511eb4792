"""Training on a log with ids of requests: histories are read once, and the numbers stay."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist

from apps.train import train
from tests.data.logs import write_log
from torchrec_sid.data.prepared import PreparedLog
from torchrec_sid.models.build import RankingConfig
from torchrec_sid.training.recorder import StepRecorder
from torchrec_sid.training.run import open_run
from torchrec_sid.training.train_config import TrainConfig

CPU = torch.device("cpu")
REQUESTS, SHOWN, USERS = 400, 5, 30


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 requests of five impressions; the ids of requests are no order of time."""
    random = np.random.default_rng(0)
    user = random.integers(0, USERS, REQUESTS).repeat(SHOWN)
    ts = (1_000 + 60 * np.arange(REQUESTS)).repeat(SHOWN)
    events = {
        "user": user.tolist(),
        "item": (100 + random.integers(0, 20, REQUESTS * SHOWN)).tolist(),
        "ts": ts.tolist(),
        "label": random.integers(0, 2, REQUESTS * SHOWN).tolist(),
        "impression": random.permutation(REQUESTS).repeat(SHOWN).tolist(),
    }
    folder = tmp_path_factory.mktemp("by_request")
    write_log(folder / "log", events)
    return folder


@pytest.fixture(autouse=True, scope="module")
def group(tmp_path_factory: pytest.TempPathFactory):
    file = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def config(data: Path, output: Path, arm: str = "full_id", **changes) -> TrainConfig:
    model = RankingConfig(arm, dim=8, heads=2, history_length=64, recent=16)
    return TrainConfig(
        str(data / "log"),
        str(output),
        prepared=str(data / "prepared"),
        model=model,
        batch_size=64,
        max_steps=12,
        **changes,
    )


def losses(data: Path, output: Path, monkeypatch, **changes) -> list[float]:
    found: list[float] = []
    call = StepRecorder.__call__

    def record(self, step, out):
        found.append(float(out.loss))
        call(self, step, out)

    with monkeypatch.context() as patch:
        patch.setattr(StepRecorder, "__call__", record)
        train(config(data, output, **changes), CPU)
    return found


@pytest.mark.parametrize("arm", ["full_id", "none"])
def test_the_losses_are_those_of_rows(arm: str, data: Path, tmp_path: Path, monkeypatch) -> None:
    by_row, by_request, default = (
        losses(data, tmp_path / f"{how}", monkeypatch, arm=arm, by_request=how)
        for how in (False, True, None)
    )
    assert by_request == default
    np.testing.assert_allclose(by_request, by_row, atol=1e-5)
    assert np.std(by_row) > 1e-4


@pytest.mark.parametrize(
    ("changes", "shares"),
    [
        ({}, True),
        ({"by_request": False}, False),
        ({"arm": "known_id"}, False),
        ({"arm": "known_id", "id_dropout": 0.0}, True),
        ({"arm": "known_id", "by_request": True}, True),
    ],
)
def test_where_a_history_is_shared(changes: dict, shares: bool, data: Path, tmp_path: Path) -> None:
    run = open_run(config(data, tmp_path / "run", **changes), CPU)
    batch = next(iter(run.read("train")))
    assert ("request" in batch.rows) == shares
    if shares:
        # A request is cut by the end of a block or of a batch at most.
        assert len(batch.rows["request_row"]) < len(batch.labels) / 3
    run.close()


def test_rows_of_a_request_stay_together_when_training_rows_are_shuffled(
    data: Path, tmp_path: Path
) -> None:
    open_run(config(data, tmp_path / "run"), CPU).close()
    log = PreparedLog.open(data / "prepared")
    assert log.has_requests
    file = pq.ParquetFile(log.path / "train" / "00000" / "part-00000.parquet").read()
    request = file.column("request").to_numpy()
    changes = int((np.diff(request) != 0).sum()) + 1
    assert changes == len(np.unique(request)), "each request is one run of rows"
    assert (np.diff(file.column("ts").to_numpy()) < 0).any(), "requests are shuffled"
