"""A training in this process: every field changes it, early stopping keeps the best, kills are harmless."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from apps.evaluate import EvaluateConfig, evaluate
from apps.train import train
from tests.logs import small_log
from torchrec_sid.errors import SidError
from torchrec_sid.models.build import RankingConfig
from torchrec_sid.parallel.checkpoint import CheckpointManager
from torchrec_sid.training.early_stopping import EarlyStopping
from torchrec_sid.training.recorder import StepRecorder
from torchrec_sid.training.train_config import TrainConfig

CPU = torch.device("cpu")
MODEL = RankingConfig("full_id", dim=8, heads=2, history_length=8)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    small_log(folder)
    return folder


@pytest.fixture(autouse=True, scope="module")
def group(tmp_path_factory: pytest.TempPathFactory):
    file = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def config(data: Path, output: Path, **changes) -> TrainConfig:
    base = TrainConfig(
        str(data / "log"),
        str(output),
        prepared=str(data / "prepared"),
        model=MODEL,
        batch_size=256,
        max_steps=12,
    )
    return replace(base, **changes)


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


CHANGES = {
    "dense_optimizer": {"dense_optimizer": "SGD"},
    "dense_options": {"dense_options": {"weight_decay": 0.5}},
    "dense_lr": {"dense_lr": 1e-2},
    "schedule": {"schedule": "CosineAnnealingLR"},
    "schedule_options": {"schedule_options": {"final": 0.9}},
    "warmup_steps": {"warmup_steps": 6},
    "schedule_tables": {"schedule_tables": True},
    "clip_norm": {"clip_norm": 1e-3, "dense_optimizer": "SGD", "dense_lr": 0.1},
    "precision": {"precision": "bfloat16"},
    "positive_weight": {"positive_weight": 3.0},
}


def test_every_field_changes_the_training(data: Path, tmp_path: Path, monkeypatch) -> None:
    base = losses(data, tmp_path / "base", monkeypatch)
    assert len(base) == 12
    assert losses(data, tmp_path / "again", monkeypatch) == base
    unclipped = losses(data, tmp_path / "sgd", monkeypatch, dense_optimizer="SGD", dense_lr=0.1)
    for name, changes in CHANGES.items():
        found = losses(data, tmp_path / name, monkeypatch, **changes)
        assert all(map(torch.isfinite, map(torch.tensor, found)))
        assert found != (unclipped if name == "clip_norm" else base), name
    for name in ("precision", "schedule_tables"):
        near = losses(data, tmp_path / f"{name}-near", monkeypatch, **CHANGES[name])
        assert near == pytest.approx(base, abs=0.02), "another model, not another precision or rate"


@pytest.mark.parametrize("arm", ["none", "full_id", "random_hash"])
@pytest.mark.parametrize("layers", [0, 1])
def test_bfloat16_trains_every_backbone(
    arm: str, layers: int, data: Path, tmp_path: Path, monkeypatch
) -> None:
    model = replace(MODEL, arm=arm, encoder_layers=layers, interaction="dcn" if layers else "dot")
    how = {"model": model, "max_steps": 4}
    exact = losses(data, tmp_path / "float32", monkeypatch, **how)
    rounded = losses(data, tmp_path / "bfloat16", monkeypatch, precision="bfloat16", **how)
    assert rounded == pytest.approx(exact, abs=0.02) and rounded != exact


STOPPING = {"max_steps": None, "epochs": 40, "evaluate_every": 10, "patience": 2, "dense_lr": 0.02}


class KilledError(Exception):
    """Stands for kill -9: nothing is cleaned up."""


def test_training_stops_early_with_the_best_state_and_resumes_exactly(
    data: Path, tmp_path: Path, monkeypatch
) -> None:
    whole = train(config(data, tmp_path / "whole", **STOPPING), CPU)
    board = EventAccumulator(str(tmp_path / "whole" / "tensorboard"))
    board.Reload()
    validated = {event.step: event.value for event in board.Scalars("valid/ne")}
    best = min(validated, key=validated.__getitem__)
    assert list(validated) == [10 * (i + 1) for i in range(len(validated))]
    assert whole["steps"] == max(validated) == best + 20, "it stops two evaluations after the best"
    on_valid = evaluate(EvaluateConfig(str(tmp_path / "whole"), "valid"), CPU)
    assert on_valid["step"] == best
    assert on_valid["slices"]["all"]["ne"] == pytest.approx(validated[best], rel=1e-6)
    on_test = evaluate(EvaluateConfig(str(tmp_path / "whole"), "test"), CPU)
    assert on_test["slices"] == whole["slices"], "the report is not that of the best state"
    # Started again, it has nothing to do and says the same.
    assert train(config(data, tmp_path / "whole", **STOPPING), CPU)["slices"] == whole["slices"]

    call = StepRecorder.__call__
    for kill in (best, best + 5):
        output = tmp_path / f"killed-{kill}"

        def stop(self, step, out, kill=kill):
            if step == kill + 1:
                raise KilledError
            call(self, step, out)

        with monkeypatch.context() as patch:
            patch.setattr(StepRecorder, "__call__", stop)
            with pytest.raises(KilledError):
                train(config(data, output, checkpoint_every=5, **STOPPING), CPU)
        killed = train(config(data, output, checkpoint_every=5, **STOPPING), CPU)
        assert killed["slices"] == whole["slices"] and killed["steps"] == whole["steps"], kill
        with CheckpointManager(output / "best") as manager:
            info = manager.latest()
            assert info is not None and info.step == best


def test_epochs_are_evaluated_and_patience_zero_trains_to_the_end(data: Path, tmp_path: Path) -> None:
    changes = {"max_steps": None, "epochs": 3, "evaluate_every": "epoch", "dense_lr": 0.02}
    report = train(config(data, tmp_path / "run", **changes), CPU)
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    board.Reload()
    each = report["steps"] // 3
    assert [event.step for event in board.Scalars("valid/ne")] == [each, 2 * each, 3 * each]


def test_tensorboard_says_how_the_training_goes(data: Path, tmp_path: Path) -> None:
    train(config(data, tmp_path, max_steps=20, evaluate_every=20), CPU)
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert set(board.Tags()["scalars"]) == {
        *("train/loss", "train/ne", "train/examples_per_second"),
        *("learning_rate/dense", "learning_rate/tables", "valid/ne", "valid/auc", "valid/calibration"),
    }
    value = {name: board.Scalars(name)[0].value for name in board.Tags()["scalars"]}
    assert 0.8 < value["train/ne"] < 1.2 and value["train/examples_per_second"] > 0
    assert value["learning_rate/dense"] == pytest.approx(2e-3 * 0.05, rel=1e-5)
    assert value["learning_rate/tables"] == pytest.approx(0.02)


def test_a_tracker_of_torchx_hears_of_the_run(data: Path, tmp_path: Path, monkeypatch) -> None:
    tracker = "torchx.tracker.backend.fsspec:create"
    (tmp_path / "tracker.conf").write_text("protocol=file\n")
    monkeypatch.setenv("TORCHX_TRACKERS", tracker)
    monkeypatch.setenv("TORCHX_JOB_ID", "local://session/job")
    monkeypatch.setenv(f"TORCHX_TRACKER_{tracker.upper()}_CONFIG", str(tmp_path / "tracker.conf"))
    from torchrec_sid.training.recorder import track_run

    heard = {}

    class Heard:
        def add_artifact(self, run_id, name, path, metadata=None):
            heard[name] = path

        def add_metadata(self, run_id, **numbers):
            heard.update(numbers)

    monkeypatch.setattr("torchx.tracker.backend.fsspec.create", lambda _: Heard())
    report = train(config(data, tmp_path / "run", max_steps=2), CPU)
    assert heard["run"] == str(tmp_path / "run") and heard["ne"] == report["slices"]["all"]["ne"]
    monkeypatch.delenv("TORCHX_TRACKERS")
    heard.clear()
    track_run(tmp_path, {"ne": 1.0})
    assert not heard


def test_what_cannot_be_validated_is_named(data: Path, tmp_path: Path) -> None:
    for changes, message in (
        ({"patience": 2}, "patience: 2 without evaluations"),
        ({"evaluate_every": 0}, "evaluate_every: 0"),
    ):
        with pytest.raises(SidError, match=message):
            config(data, tmp_path, **changes)
    with pytest.raises(SidError, match="NE None after 3 steps"):
        EarlyStopping(1).observe(3, None)
    with pytest.raises(SidError, match="patience: -1"):
        EarlyStopping(-1)


def test_a_refused_run_leaves_the_one_that_is_there(data: Path, tmp_path: Path) -> None:
    train(config(data, tmp_path, max_steps=2), CPU)
    before = (tmp_path / "config.json").read_text()
    with pytest.raises(SidError, match="seed"):
        train(config(data, tmp_path, max_steps=2, seed=5), CPU)
    assert (tmp_path / "config.json").read_text() == before
    assert json.loads((tmp_path / "metrics.json").read_text())["steps"] == 2
