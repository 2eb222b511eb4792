"""The parts of a profiled step."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from torchrec_sid.errors import SidError
from torchrec_sid.training.profile import StepProfiler, split_time


def test_ranges_are_added_up_per_step() -> None:
    events = [
        SimpleNamespace(key="## forward 3 ##", cpu_time_total=3000.0),
        SimpleNamespace(key="## forward 4 ##", cpu_time_total=1000.0),
        SimpleNamespace(key="## all2all_data:kjt splits ##", cpu_time_total=500.0),
        SimpleNamespace(key="aten::mm", cpu_time_total=9000.0),
    ]
    assert split_time(events, steps=2) == {"forward": 2.0, "all-to-all": 0.25}


@pytest.mark.parametrize("steps", [3, 100])
def test_the_steps_asked_for_are_profiled_after_the_warm_up(tmp_path: Path, steps: int) -> None:
    profiler = StepProfiler(tmp_path, steps=steps, rank=1, warmup=2)
    for _ in range(8):
        with torch.profiler.record_function("## forward 0 ##"):
            torch.ones(10).sum()
        profiler.step()
    profiler.close()
    parts = json.loads((tmp_path / "parts-rank1.json").read_text())
    assert parts["steps"] == min(steps, 6)
    assert parts["ms_per_step"]["forward"] > 0
    trace = json.loads((tmp_path / "trace-rank1.json").read_text())
    names = [event.get("name") for event in trace["traceEvents"]]
    assert names.count("## forward 0 ##") == parts["steps"]


def test_profiling_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SidError, match="profile"):
        StepProfiler(tmp_path, steps=0)
