"""`kill -9` of every process in mid-training; started again, the run ends with the same weights."""

import multiprocessing
import os
import random
import signal
import socket
import time
from pathlib import Path

import torch

from apps.session import TrainConfig, start_processes
from apps.train import train
from tests.logs import SMALL
from torchrec_sid.catalog import SidCatalog
from torchrec_sid.data.schema import LogFolder
from torchrec_sid.data.synthetic import write_synthetic
from torchrec_sid.models.build import RankingConfig
from torchrec_sid.parallel.checkpoint import CheckpointManager
from torchrec_sid.spec import SidSpec


def _config(folder: Path, name: str) -> TrainConfig:
    return TrainConfig(
        data=str(folder / "log"),
        output=str(folder / name),
        prepared=str(folder / "prepared"),
        catalog=str(folder / "catalog"),
        model=RankingConfig(dim=16, history_length=20, table_rows=100),
        batch_size=512,
        epochs=4,
        checkpoint_every=3,
    )


def _rank(config: TrainConfig, rank: int, port: int) -> None:
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    torch.set_num_threads(1)
    train(config, start_processes())


def _start(config: TrainConfig) -> list:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_rank, args=(config, rank, port)) for rank in range(2)]
    for process in ranks:
        process.start()
    return ranks


def _finish(ranks: list) -> None:
    for process in ranks:
        process.join(120)
        assert process.exitcode == 0


def _weights(config: TrainConfig) -> tuple[int, dict[str, bytes]]:
    """The last checkpoint: its step, and the content of each shard file."""
    info = CheckpointManager(Path(config.output) / "checkpoints").latest()
    assert info is not None
    shards = {path.name: path.read_bytes() for path in info.path.glob("*.distcp")}
    return info.step, shards


def test_killed_runs_end_with_the_same_weights(tmp_path: Path) -> None:
    write_synthetic(tmp_path / "log", SMALL)
    items = LogFolder.open(tmp_path / "log").item_ids
    codes = torch.randint(0, 8, (len(items), 3), generator=torch.Generator().manual_seed(7))
    SidCatalog.create(tmp_path / "catalog", SidSpec((8, 8, 8)), items, codes, "0" * 64)

    whole = _config(tmp_path, "whole")
    _finish(_start(whole))

    killed = _config(tmp_path, "killed")
    checkpoints = Path(killed.output) / "checkpoints"
    ranks = _start(killed)
    deadline = time.monotonic() + 60
    while not (checkpoints.is_dir() and CheckpointManager(checkpoints).latest()):
        assert time.monotonic() < deadline and all(process.is_alive() for process in ranks)
        time.sleep(0.02)
    # Anywhere between two checkpoints, or while one is written.
    time.sleep(random.uniform(0, 0.3))
    for process in ranks:
        os.kill(process.pid, signal.SIGKILL)
    for process in ranks:
        process.join()
    info = CheckpointManager(checkpoints).latest()
    assert info is not None and 0 < info.step < _weights(whole)[0], "it was not killed in mid-training"

    _finish(_start(killed))
    assert _weights(killed) == _weights(whole)
    metrics = [(Path(c.output) / "metrics.json").read_text() for c in (whole, killed)]
    assert [text.split('"slices"')[1] for text in metrics][0] == metrics[1].split('"slices"')[1]
