"""TrainPipelineSparseDist runs the transforms a batch ahead: same losses, every table pipelined."""

import pytest
import torch
import torch.distributed as dist
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from tests.distributed.launch import run_ranks
from tests.distributed.tables_model import Model, make_batch, mean_over_ranks, part, shard, train_sharded

STEPS = 6
WAY = ("row_wise", "table_wise")


def model():
    torch.manual_seed(1)
    return Model()


def count_calls(module):
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


def on_each_rank():
    plain, optimizer = shard(model(), WAY, 2)
    expected = train_sharded(plain, optimizer, STEPS)
    unknown = int(plain.module.bags.transform.lookups[2].unknown_count)

    sharded, optimizer = shard(model(), WAY, 2)
    names = sorted(sharded.state_dict())
    calls = [count_calls(m) for m in (sharded.module.bags.transform, sharded.module.events.transform)]
    pipeline = TrainPipelineSparseDist(
        sharded, optimizer, torch.device("cpu"), execute_all_batches=True, pipeline_postproc=True
    )
    # The pipeline steps the optimizer itself and returns what the model does, without the loss.
    losses = []
    hook = sharded.module.register_forward_hook(
        lambda m, i, out: losses.append(mean_over_ranks(out[0].item()))
    )
    batches = iter([part(make_batch(step), dist.get_rank(), 2) for step in range(STEPS)])
    for _ in range(STEPS):
        pipeline.progress(batches)
    hook.remove()
    found = {
        "expected": expected,
        "losses": losses,
        "pipelined": sorted(
            m._fqn if hasattr(m, "_fqn") else type(m).__name__ for m in pipeline._pipelined_modules
        ),
        "postprocs": len(pipeline._pipelined_postprocs),
        "calls": [len(c) for c in calls],
        "unknown": (unknown, int(_original(sharded.module.bags.transform).lookups[2].unknown_count)),
        "same_names": sorted(sharded.state_dict()) == names,
    }
    pipeline.detach()
    found["restored"] = type(sharded.module.bags.transform).__name__
    return found


def _original(module):
    return getattr(module, "postproc_module", module)


def test_pipelined_equals_not_pipelined():
    for found in run_ranks(on_each_rank, 2):
        assert found["losses"] == pytest.approx(found["expected"], abs=1e-6)
        assert len(found["pipelined"]) == 4, "all collections run ahead, those of event bags too"
        assert found["postprocs"] == 2
        assert found["calls"] == [STEPS, STEPS], "once per batch and transform"
        assert found["unknown"][0] == found["unknown"][1] > 0
        assert found["same_names"]
        assert found["restored"] == "BagTransform"
