"""Where the time of a step goes: a trace for a viewer, and a table of its parts."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from torchrec_sid.artifact import write_json
from torchrec_sid.errors import SidError

# The ranges that TorchRec's pipelines and collectives record, by what they are for.
_PARTS = {
    "read batch": r"## (load_batch|next_batch|copy_batch_to_gpu|inplace_copy_batch_to_gpu)",
    "wait for batch": r"## wait_for_batch",
    "forward": r"## forward",
    "backward": r"## backward",
    "optimizer": r"## optimizer",
    "all-to-all": r"## (all2all|variable_batch_all2all)",
    "reduce-scatter and all-gather": r"## (ReduceScatter|AllGather)",
}


class StepProfiler:
    """Profiles a number of steps after a warm-up, then writes its files and stops.

    Writes ``trace-rankR.json``, for Perfetto or chrome://tracing, and ``parts-rankR.json``, milliseconds
    per step of each part. Parts overlap: an all-to-all runs within forward, backward or beside them.

    Args:
        folder: where the files go.
        steps: how many to profile.
        rank: of this process.
        warmup: steps before the first one profiled: the pipeline traces the model in its first.

    Raises:
        SidError: no step to profile.
    """

    def __init__(self, folder: str | Path, steps: int, rank: int = 0, warmup: int = 5) -> None:
        if steps < 1 or warmup < 1:
            raise SidError(
                "profile", f"{steps} steps after {warmup}", "Profile at least one step, after one."
            )
        self.folder = Path(folder)
        self.steps = steps
        self.rank = rank
        self.warmup = warmup
        self._seen = 0
        self._profile: Any = None

    def step(self) -> None:
        """Call it after each training step."""
        self._seen += 1
        if self._seen == self.warmup:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self._profile = profile(activities=activities)
            self._profile.start()
        elif self._seen == self.warmup + self.steps:
            self.close()

    def close(self) -> None:
        """Write the files, also where training ended before all steps were profiled."""
        if self._profile is None:
            return
        done = self._seen - self.warmup
        self._profile.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._profile.export_chrome_trace(str(self.folder / f"trace-rank{self.rank}.json"))
        parts = split_time(self._profile.key_averages(), max(1, done))
        write_json(self.folder / f"parts-rank{self.rank}.json", {"steps": done, "ms_per_step": parts})
        self._profile = None


def split_time(events: Iterable[Any], steps: int) -> dict[str, float]:
    """Milliseconds per step of each part that was recorded, by name.

    Args:
        events: ``torch.profiler`` averages, with ``key`` and ``cpu_time_total`` in microseconds.
        steps: number of steps they cover.
    """
    totals: dict[str, float] = {}
    for event in events:
        for part, pattern in _PARTS.items():
            if re.match(pattern, event.key):
                totals[part] = totals.get(part, 0.0) + event.cpu_time_total / 1000 / steps
    return totals
