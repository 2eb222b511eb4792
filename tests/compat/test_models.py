"""Models as people train them, in every way to embed their items: sharded and pipelined equal neither."""

import itertools

import pytest
import torch
import torch.distributed as dist
from torchrec.distributed.train_pipeline import (
    EvalPipelineSparseDist,
    TrainPipelineBase,
    TrainPipelineSparseDist,
)
from torchrec.distributed.train_pipeline.train_pipelines import TrainPipelineSparseDistLite

from tests.compat.models import MODELS, WAYS, left_out, make_batch, make_model
from tests.distributed.launch import run_ranks
from torchrec_sid.collections import SidCollection
from torchrec_sid.parallel.optimizer import TableOptimizer
from torchrec_sid.parallel.planner_config import PlannerConfig
from torchrec_sid.parallel.sharding import shard_model

STEPS, LR = 4, 0.5
PIPELINES = {
    "none": None,
    "base": TrainPipelineBase,
    "sparse_dist": TrainPipelineSparseDist,
    "lite": TrainPipelineSparseDistLite,
    "eval": EvalPipelineSparseDist,
}
AHEAD = {"execute_all_batches": True, "pipeline_postproc": True}
OPTIONS = {"sparse_dist": AHEAD, "eval": {"pipeline_postproc": True}}
SAMPLE = {("dlrm", "stock"), ("dlrm", "catalog"), ("hstu", "prefix"), ("two_tower", "hashed")}


def cells():
    for model, way in itertools.product(MODELS, WAYS):
        reason = left_out(model, way)
        marks = [pytest.mark.skip(reason=reason)] if reason else []
        if (model, way) not in SAMPLE:
            marks.append(pytest.mark.slow)
        yield pytest.param(model, way, marks=marks, id=f"{model}-{way}")


def train_plain(name, way, lr=LR):
    """Losses of one process on whole batches."""
    model = make_model(name, way)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss, _ = model(make_batch(step))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def train_sharded(name, way, pipeline):
    """Losses of this rank's parts under a pipeline; without training for ``eval``."""
    device = torch.device("cpu")
    sharded = shard_model(
        make_model(name, way),
        PlannerConfig(),
        device=device,
        table_optimizer=TableOptimizer("sgd", LR),
        seed=None,
    )
    model, optimizer = sharded.model, sharded.make_optimizer(lambda p: torch.optim.SGD(p, lr=LR))
    batches = iter([make_batch(step, dist.get_rank(), dist.get_world_size()) for step in range(STEPS)])
    losses = []
    model.module.register_forward_hook(lambda _, __, out: losses.append(out[0].item()))
    if pipeline == "none":
        for batch in batches:
            optimizer.zero_grad()
            model(batch)[0].backward()
            optimizer.step()
        return losses
    options = OPTIONS.get(pipeline, {})
    if pipeline == "eval":
        model.eval()
    running = PIPELINES[pipeline](model, optimizer, device, **options)
    for _ in range(STEPS):
        running.progress(batches)
    return losses


def on_each_rank(name, way):
    return {pipeline: train_sharded(name, way, pipeline) for pipeline in PIPELINES}


@pytest.mark.parametrize(("name", "way"), cells())
def test_sharded_and_pipelined_equal_one_process(name, way):
    expected = train_plain(name, way)
    still = train_plain(name, way, lr=0.0)
    assert max(abs(a - b) for a, b in zip(expected, still, strict=True)) > 1e-3, "training must move"
    first, second = run_ranks(on_each_rank, 2, name, way)
    for pipeline in PIPELINES:
        found = [(a + b) / 2 for a, b in zip(first[pipeline], second[pipeline], strict=True)]
        wanted = still if pipeline == "eval" else expected
        assert found == pytest.approx(wanted, abs=1e-6), pipeline


@pytest.mark.parametrize("way", [way for way in WAYS if way != "stock"])
def test_our_collections_stand_in_every_model(way):
    for name in MODELS:
        if not left_out(name, way):
            assert any(isinstance(m, SidCollection) for m in make_model(name, way).modules()), name
