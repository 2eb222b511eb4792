"""Two processes train a ranker over features as one does."""

from dataclasses import replace
from pathlib import Path

import torch

from tests.data.test_example_features import write
from tests.distributed.launch import run_ranks
from tests.models.test_features import config
from torchrec_sid.training.run import open_run
from torchrec_sid.training.train_config import TrainConfig


def _train(settings: TrainConfig, output: str) -> list[tuple[float, float]]:
    run = open_run(replace(settings, output=output), torch.device("cpu"))
    parts: list[tuple[float, float]] = []

    def on_step(step, out):
        weight = float(out.weights.sum())
        parts.append((float(out.loss) * weight, weight))

    run.loop.train(lambda epoch, start: run.read("train", epoch, start), 1, on_step=on_step)
    run.close()
    return parts


def test_two_processes_train_like_one(tmp_path: Path) -> None:
    log = write(tmp_path, 1)
    # Without weights of examples: ranks average their means.
    spec = (config(tmp_path).specification or "", "columns:\n  weight: importance\n")
    Path(spec[0]).write_text(Path(spec[0]).read_text().replace(spec[1], ""))
    settings = replace(config(tmp_path), prepared=str(log.path.parent / "plain"), slices=())
    Path(spec[0]).write_text(Path(spec[0]).read_text().replace(spec[1], ""))
    (alone,) = run_ranks(_train, 1, settings, str(tmp_path / "one"))
    both = run_ranks(_train, 2, settings, str(tmp_path / "two"))
    one = torch.tensor([loss / weight for loss, weight in alone])
    two = torch.tensor(
        [
            sum(loss for loss, _ in parts) / sum(weight for _, weight in parts)
            for parts in zip(*both, strict=True)
        ]
    )
    assert len(one) > 5
    torch.testing.assert_close(two, one, atol=1e-5, rtol=0)
