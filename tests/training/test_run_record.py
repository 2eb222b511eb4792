"""The record of a run: its inputs are checked first, one process trains, what was altered is refused."""

import json
import multiprocessing
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist

from apps.evaluate import EvaluateConfig, evaluate
from apps.export import ExportConfig
from apps.export import open_run as open_trained
from apps.train import train
from tests.logs import small_log
from torchrec_sid.artifact.sealed import KEY_VARIABLE
from torchrec_sid.errors import ArtifactError, SidError
from torchrec_sid.models.build import RankingConfig
from torchrec_sid.parallel.checkpoint import CheckpointManager
from torchrec_sid.training.run import open_run
from torchrec_sid.training.run_record import is_finished, seal_run, trained_config
from torchrec_sid.training.train_config import TrainConfig

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    folder = tmp_path_factory.mktemp("record")
    small_log(folder)
    file = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    config = TrainConfig(
        str(folder / "log"),
        str(folder / "run"),
        model=RankingConfig("dense", dim=8, heads=2, history_length=8),
        batch_size=256,
        max_steps=2,
    )
    train(config, CPU)
    yield config
    dist.destroy_process_group()


@pytest.fixture
def run(trained: TrainConfig, tmp_path: Path) -> TrainConfig:
    """A copy of it, with a log of its own."""
    shutil.copytree(trained.output, tmp_path / "run")
    shutil.copytree(trained.data, tmp_path / "log")
    return replace(trained, data=str(tmp_path / "log"), output=str(tmp_path / "run"))


def contents(folder: Path) -> dict[str, bytes]:
    """Of every file but locks, which say who held them last."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {str(path): path.read_bytes() for path in files}


def test_a_run_of_other_events_is_refused_before_anything_is_written(run: TrainConfig) -> None:
    log, output = Path(run.data), Path(run.output)
    before = contents(output)
    events = log / "events.parquet"
    kept = events.read_bytes()
    table = pq.read_table(events)
    pq.write_table(table.slice(0, len(table) - 100), events)
    with pytest.raises(SidError, match="was trained with log .* this run has log"):
        train(run, CPU)
    assert contents(output) == before
    events.write_bytes(kept)
    assert train(replace(run, max_steps=3), CPU)["steps"] == 3


def test_content_of_items_is_part_of_the_identity(run: TrainConfig) -> None:
    output = Path(run.output)
    seal_run(output, run, {})  # its data has moved
    file = next(Path(run.data).glob("item_emb*.npy"))
    np.save(file, np.load(file)[::-1])
    before = contents(output)
    for command in (
        lambda: train(replace(run, max_steps=3), CPU),
        lambda: evaluate(EvaluateConfig(run.output), CPU),
        lambda: open_trained(ExportConfig(run.output)),
    ):
        with pytest.raises(SidError, match="was trained with content"):
            command()
    assert contents(output) == before


def test_a_damaged_prepared_log_is_not_trained_on_nor_exported(run: TrainConfig) -> None:
    seal_run(Path(run.output), run, {})
    file = Path(run.output) / "prepared" / "items" / "id.npy"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    for command in (
        lambda: train(replace(run, max_steps=3), CPU),
        lambda: evaluate(EvaluateConfig(run.output), CPU),
        lambda: open_trained(ExportConfig(run.output)),
    ):
        with pytest.raises(ArtifactError, match="id.npy: its contents do not match"):
            command()


def _hold(folder: Path, ready) -> None:
    held = CheckpointManager(folder / "checkpoints")
    held.claim()
    ready.set()
    signal.pause()


def test_two_trainings_do_not_share_a_run_directory(run: TrainConfig) -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    other = context.Process(target=_hold, args=(Path(run.output), ready))
    other.start()
    try:
        assert ready.wait(60)
        before = contents(Path(run.output))
        with pytest.raises(SidError, match=f"is in use by process {other.pid} of "):
            train(replace(run, max_steps=3), CPU)
        assert contents(Path(run.output)) == before
        seal_run(Path(run.output), run, {})
        assert evaluate(EvaluateConfig(run.output), CPU)["step"] == 2, "evaluation reads only"
    finally:
        os.kill(other.pid, signal.SIGKILL)
        other.join()
    assert train(replace(run, max_steps=3), CPU)["steps"] == 3, "the lock of a dead process is free"


def test_a_training_holds_its_directory_and_gives_it_back(run: TrainConfig) -> None:
    mine = open_run(run, CPU, claim=True)
    with pytest.raises(SidError, match=f"is in use by process {os.getpid()} of "):
        train(run, CPU)
    mine.close()
    with pytest.raises(SidError, match="seed"):
        train(replace(run, seed=3), CPU)
    assert train(replace(run, max_steps=3), CPU)["steps"] == 3


def test_the_record_says_what_was_trained(run: TrainConfig, trained: TrainConfig) -> None:
    output = Path(run.output)
    assert trained_config(output) == trained
    body = json.loads((output / "run.json").read_text())
    assert set(body["config"]["identity"]) == {"log", "seed", "content"}
    assert list(body["files"]) == ["metrics.json"] and is_finished(output)
    (output / "metrics.json").write_text((output / "metrics.json").read_text() + " ")
    assert not is_finished(output)


def test_every_byte_of_the_record_counts(run: TrainConfig) -> None:
    output = Path(run.output)
    file = output / "run.json"
    good = file.read_bytes()
    for at in range(0, len(good), 7):
        file.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        with pytest.raises(SidError):
            trained_config(output)
    file.write_bytes(good)
    seal_run(output, replace(run, seed=5), {})
    assert trained_config(output).seed == 5


def test_a_run_of_an_earlier_release_has_a_configuration_alone(
    run: TrainConfig, trained: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = Path(run.output)
    (output / "run.json").unlink()
    assert trained_config(output) == trained
    monkeypatch.setenv(KEY_VARIABLE, "k" * 32)
    with pytest.raises(ArtifactError, match="is not signed"):
        trained_config(output)
    seal_run(output, run, {})
    assert trained_config(output) == run
    monkeypatch.setenv(KEY_VARIABLE, "other" * 8)
    with pytest.raises(ArtifactError, match="signed with another key"):
        trained_config(output)
