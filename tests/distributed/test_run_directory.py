"""What a run leaves behind, and that it follows the plan that apps.plan made for it."""

import json
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from apps.plan import PlanConfig, plan
from apps.rundir import open_rank_log
from apps.train import train
from tests.distributed.kill_matrix import STEPS, metrics_of, prepare_case
from tests.distributed.launch import run_ranks
from torchrec_sid.parallel.checkpoint_files import list_checkpoints, read_checkpoint
from torchrec_sid.parallel.optimizer import TableOptimizer
from torchrec_sid.parallel.plan_file import load_plan
from torchrec_sid.training.train_config import TrainConfig


def _train(config: TrainConfig) -> None:
    open_rank_log(config.output, dist.get_rank())
    train(config, torch.device("cpu"))


def test_a_run_directory_says_what_happened_and_its_plan_can_be_made_beforehand(tmp_path: Path) -> None:
    config = replace(prepare_case(tmp_path), profile=4, workers=1)
    run_ranks(_train, 2, config)
    run = Path(config.output)
    files = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    assert {"config.json", "environment.json", "plan.json", "plan.txt", "metrics.json"} <= files
    assert {f"profile/{kind}-rank{rank}.json" for kind in ("parts", "trace") for rank in (0, 1)} <= files
    for rank in (0, 1):
        text = (run / "logs" / f"rank-{rank}.log").read_text()
        assert f"{STEPS} steps in" in text
        assert "examples/s of this rank" in text
        parts = json.loads((run / "profile" / f"parts-rank{rank}.json").read_text())
        assert parts["steps"] == 4
        assert {"forward", "backward", "all-to-all", "read batch", "optimizer"} <= set(parts["ms_per_step"])
    environment = json.loads((run / "environment.json").read_text())
    assert environment["world_size"] == 2
    assert environment["versions"]["torch"]
    metrics = json.loads((run / "metrics.json").read_text())
    assert len(metrics["ranks"]) == 2
    assert all(rank["examples_per_second"] > 0 and rank["peak_rss_mb"] > 0 for rank in metrics["ranks"])
    saved = read_checkpoint(list_checkpoints(run / "checkpoints")[-1])
    assert set(saved.identity) == {"log", "seed", "catalog"}
    assert set(saved.metadata) == {"config", "plan", "position", "metrics", "world_size"}
    assert 0.3 < saved.metadata["metrics"]["loss"] < 1

    report = plan(
        PlanConfig(
            output=str(tmp_path / "plan"),
            world_size=2,
            device="cpu",
            model=config.model,
            tables=config.tables,
            prepared=str(run / "prepared"),
            catalog=config.catalog,
            batch_size=config.batch_size // 2,
            compare_items=(),
        )
    )
    assert len(report["summary"]["tables"]) == 2
    planned = replace(config, output=str(tmp_path / "planned"), plan=str(tmp_path / "plan/plan.json"))
    run_ranks(_train, 2, replace(planned, profile=0, workers=0))
    followed = load_plan(tmp_path / "planned" / "plan.json")
    assert followed.plan == load_plan(tmp_path / "plan" / "plan.json").plan
    # The same function, whatever the plan: the last digits may differ.
    both = [json.loads('{"slices"' + metrics_of(c))["slices"]["all"]["ne"] for c in (config, planned)]
    assert abs(both[0] - both[1]) < 1e-6


def test_two_replicas_of_two_processes_train_like_one_process(tmp_path: Path) -> None:
    sgd = TableOptimizer("sgd", lr=0.1)
    one = replace(prepare_case(tmp_path), tables=sgd, max_steps=9, dense_lr=1e-4)
    two = replace(one, output=str(tmp_path / "2d"), replicas=2)
    run_ranks(_train, 1, one)
    run_ranks(_train, 4, two)
    # Adam makes a step of the rounding of a gradient near zero.
    both = [json.loads('{"slices"' + metrics_of(c))["slices"]["all"]["ne"] for c in (one, two)]
    assert abs(both[0] - both[1]) < 1e-4
    # Started again in one group, from what the first of the two has saved.
    run_ranks(_train, 2, replace(two, replicas=1, max_steps=12))
    assert json.loads((tmp_path / "2d" / "metrics.json").read_text())["steps"] == 12
