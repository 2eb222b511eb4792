"""Attention over long histories: `python -m apps.bench.attention [--quick] --json FILE`.

Times forward and forward + backward of code-space attention against the ways it replaces, in one run and in
turn, with their peak memory and their error against float64. Rows that a rival cannot finish within the
memory limit are left out, and said so.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchrec_sid.artifact import write_json
from torchrec_sid.progress import track
from torchrec_sid.side.kernels import attention_cpu, attention_torch
from torchrec_sid.side.kernels.attention_problem import checked_problem
from torchrec_sid.side.kernels.compiler import load_library

from .alternating import alternate, peak_mb
from .attention_systems import (
    Shape,
    System,
    Workload,
    code_space,
    decode_sdpa,
    dense_absorbed,
    dense_bf16_sdpa,
    inference,
    lookup_mha,
    project_and_attend,
    train_step,
)

PASSES = ("forward", "forward+backward")
GROUPS = ("main", "lengths", "long", "users", "candidates", "dims", "digits", "ragged", "kernel")


@dataclass(frozen=True)
class BenchConfig:
    """What to run."""

    quick: bool = False
    """The main shape and a short one, few rounds (under a minute)."""
    json: str | None = None
    """File for the rows."""
    device: str = "cpu"
    """Or cuda."""
    rounds: int = 7
    """Timed runs of each system; 3 with --quick."""
    memory_gb: float = 6.0
    """Largest history a rival may decode, times the copies it makes."""
    groups: tuple[str, ...] = GROUPS
    """Which shapes; --quick has its own."""
    seed: int = 0
    """Of items, histories and weights."""


def shapes(config: BenchConfig) -> Iterator[Shape]:
    """The main shape, then one thing changed at a time."""
    base = Shape()
    if config.quick:
        yield from (base, replace(base, length=256))
        return
    groups = {
        "main": [base],
        "lengths": [replace(base, length=length) for length in (256, 1024, 16_384)],
        "long": [Shape(users=64, length=10_000)],
        "users": [replace(base, users=users, length=1024) for users in (64, 256)],
        "candidates": [replace(base, candidates=m) for m in (16, 64, 256)],
        "dims": [replace(base, dims=dims) for dims in (64, 128, 256, 512)],
        "digits": [replace(base, digits=80)],
        "ragged": [],
        "kernel": [],
    }
    for name in config.groups:
        yield from groups[name]


def systems(w: Workload, config: BenchConfig) -> list[System]:
    """All systems that run here and fit into memory."""
    found = [code_space(w, "torch")]
    if w.device.type == "cuda":
        found.append(code_space(w, "triton"))
    elif not load_library().reason:
        found.append(code_space(w, "cpu"))
    # Embeddings, keys, values, and gradients of the three.
    if 6 * len(w.ids) * w.shape.dims * 4 > config.memory_gb * 1e9:
        print(
            f"{w.shape}: left out the rivals that decode {len(w.ids)} events (--memory-gb)", file=sys.stderr
        )
        return found
    absorbed = [dense_absorbed(w, dtype) for dtype in (torch.float32, torch.bfloat16)]
    times = alternate({str(i): inference(s, w.candidates) for i, s in enumerate(absorbed)}, 3, w.device)
    faster = min(times, key=lambda name: times[name])
    return [*found, lookup_mha(w), dense_bf16_sdpa(w), absorbed[int(faster)], decode_sdpa(w)]


def reference(w: Workload, users: int) -> tuple[Tensor, Tensor]:
    """Output and gradient of the candidates for the first users: decode, project, SDPA, all in float64."""
    shape = w.shape
    vectors = w.basis.decode(w.codes[: users * shape.length]).double().view(users, shape.length, -1)
    projections = tuple(layer.cpu().double() for layer in w.projections())
    candidates = w.candidates[:users].cpu().double().requires_grad_()
    out = project_and_attend(candidates, vectors, projections, shape.heads)
    upstream = torch.ones_like(out)
    upstream[..., ::2] = -1
    return out.detach(), torch.autograd.grad(out, candidates, upstream)[0]


def measure(shape: Shape, config: BenchConfig) -> list[dict[str, Any]]:
    """The rows of one shape."""
    w = Workload(shape, torch.device(config.device), config.seed)
    found = systems(w, config)
    checked = max(1, min(shape.users, 4096 // shape.length))
    truth = reference(w, checked)
    rounds, rows = 3 if config.quick else config.rounds, []
    for name in PASSES:
        if name == "forward":
            works = {s.name: inference(s, w.candidates) for s in found}
        else:
            works = {s.name: train_step(s, w.candidates) for s in found}
        expected = truth[PASSES.index(name)]
        times = alternate(works, rounds, w.device)
        for system in found:
            result = works[system.name]()[0][:checked].cpu().double()
            rows.append(
                {
                    "device": config.device,
                    "users": shape.users,
                    "length": shape.length,
                    "dims": shape.dims,
                    "heads": shape.heads,
                    "candidates": shape.candidates,
                    "digits": shape.digits,
                    "system": system.name,
                    "pass": name,
                    "ms": times[system.name],
                    "peak_mb": peak_mb(works[system.name], w.device),
                    "bytes_per_event": system.bytes_per_event,
                    "max_error": float((result - expected).abs().max() / expected.abs().max()),
                }
            )
    return rows


def measure_ragged(config: BenchConfig) -> list[dict[str, Any]]:
    """Log-normal lengths 0 .. 10^4 against equal ones with as many events: the cost of raggedness."""
    generator = torch.Generator().manual_seed(config.seed)
    ragged = torch.empty(64).log_normal_(7.5, 1.5, generator=generator).clamp_(0, 10_000).long()
    ragged[:2] = torch.tensor([0, 10_000])
    equal = torch.full_like(ragged, int(ragged.sum()) // len(ragged))
    equal[0] += ragged.sum() - equal.sum()
    shape = Shape(users=64, length=10_000)
    device, rows = torch.device(config.device), []
    loads = {
        name: Workload(shape, device, config.seed, n) for name, n in (("ragged", ragged), ("equal", equal))
    }
    backends = ["torch"] + (["triton"] if config.device == "cuda" else [])
    backends += ["cpu"] if config.device == "cpu" and not load_library().reason else []
    for backend in backends:
        found = {name: code_space(w, backend) for name, w in loads.items()}
        for name in PASSES:
            make = inference if name == "forward" else train_step
            works = {key: make(system, loads[key].candidates) for key, system in found.items()}
            times = alternate(works, 3 if config.quick else config.rounds, device)
            rows.append(
                {
                    "device": config.device,
                    "users": 64,
                    "events": int(ragged.sum()),
                    "longest": 10_000,
                    "system": f"code_space_{backend}",
                    "pass": name,
                    "ms": times["ragged"],
                    "ms_equal_lengths": times["equal"],
                }
            )
    return rows


def measure_kernel(config: BenchConfig) -> list[dict[str, Any]]:
    """The operator alone on the CPU: the compiled kernel and plain PyTorch, on one thread and on all."""
    rows, threads = [], torch.get_num_threads()
    for shape in (Shape(), Shape(users=64, length=10_000)):
        w = Workload(shape, torch.device("cpu"), config.seed)
        layout = w.attention.layout
        query = torch.randn(shape.users, shape.heads, layout.num_features)
        problem = checked_problem(
            query, w.history, w.lengths, None, None, layout.text, shape.heads, "softmax", None, None, None
        )
        out = attention_cpu.forward(problem)
        grad, none = torch.randn_like(out.z), torch.zeros_like(out.total)
        works: dict[tuple[str, str], Callable[[], object]] = {
            ("cpu", "forward"): partial(attention_cpu.forward, problem),
            ("torch", "forward"): partial(attention_torch.forward, problem),
            ("cpu", "backward"): partial(attention_cpu.backward, grad, none, none, problem, out),
            ("torch", "backward"): partial(attention_torch.backward, grad, none, none, problem, out),
        }
        for count in sorted({1, threads}):
            torch.set_num_threads(count)
            times = alternate({" ".join(key): work for key, work in works.items()}, config.rounds, w.device)
            for name, step in works:
                rows.append(
                    {
                        "users": shape.users,
                        "length": shape.length,
                        "threads": count,
                        "kernel": name,
                        "pass": step,
                        "ms": times[f"{name} {step}"],
                    }
                )
    torch.set_num_threads(threads)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Print the rows of one shape, with how many times slower each system is than the fastest of ours."""
    first = rows[0]
    print(
        f"\n{first['users']} users x {first['length']} events, {first['dims']} dims, "
        f"{first['heads']} heads, {first['candidates']} candidates, {first['digits']} trits "
        f"({first['device']})"
    )
    print(f"{'system':18}{'pass':18}{'ms':>10}{'x ours':>9}{'peak MB':>10}{'B/event':>9}{'error':>10}")
    for name in PASSES:
        group = [row for row in rows if row["pass"] == name]
        ours = min(row["ms"] for row in group if row["system"].startswith("code_space"))
        for row in group:
            print(
                f"{row['system']:18}{name:18}{row['ms']:10.2f}{row['ms'] / ours:9.1f}{row['peak_mb']:10.1f}"
                f"{row['bytes_per_event']:9d}{row['max_error']:10.1e}"
            )


def main() -> None:
    """Run, print, and write the rows."""
    from ..cli import parse_config

    config = parse_config(BenchConfig, __doc__)
    print(f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.2f}, torch {torch.__version__}")
    rows: list[dict[str, Any]] = []
    for shape in track(list(shapes(config)), "shapes", show=sys.stderr.isatty()):
        measured = measure(shape, config)
        show(measured)
        rows += measured
    ragged = measure_ragged(config) if config.quick or "ragged" in config.groups else []
    if ragged:
        print("\n64 users, log-normal lengths 0 .. 10,000, against equal lengths with as many events")
    for row in ragged:
        print(
            f"{row['system']:18}{row['pass']:18}{row['ms']:10.2f} ms ragged, "
            f"{row['ms_equal_lengths']:.2f} ms equal ({row['events']} events)"
        )
    kernel = measure_kernel(config) if "kernel" in config.groups and _compiled_here(config) else []
    for row in kernel:
        print(
            f"{row['users']} x {row['length']}, {row['threads']} threads, "
            f"{row['kernel']:6}{row['pass']:9}{row['ms']:8.2f} ms"
        )
    if config.json:
        write_json(Path(config.json), {"rows": rows, "ragged": ragged, "kernel": kernel})


def _compiled_here(config: BenchConfig) -> bool:
    return config.device == "cpu" and not config.quick and not load_library().reason


if __name__ == "__main__":
    main()
