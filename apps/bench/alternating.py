"""Alternating timings and peak memory of functions that do the same thing."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

Work = Callable[[], object]


def alternate(
    works: Mapping[str, Work],
    rounds: int,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median milliseconds of each work, run in turn so that the machine's moods meet all alike.

    Args:
        works: name -> function.
        rounds: timed runs of each, after one that is not.
        device: a GPU is waited for before and after each run.
        clock: in seconds; ``time.process_time`` leaves out what other processes took, on a busy machine.
    """
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        work()
    for _ in range(rounds):
        for name, work in works.items():
            _wait(device)
            began = clock()
            work()
            _wait(device)
            seconds[name].append(clock() - began)
    return {name: 1000 * statistics.median(values) for name, values in seconds.items()}


def peak_mb(work: Work, device: torch.device) -> float:
    """Largest memory (10^6 bytes) that tensors made by one run hold at any moment."""
    if device.type == "cuda":
        _wait(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        _wait(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        work()
    # The profiler's own tables lose the order of allocations; its raw events keep it.
    events = profile.profiler.kineto_results.events()
    held = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / 1e6


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
