"""Times of code-space attention on a card, against its floors and against dense attention.

Two floors are counted. Bytes: packed events, queries and results, each moved once, over the measured copy
rate. Operations: the digit products of the padded tiles that the kernel issues to tensor cores, over the
measured rate of a large bfloat16 product.
"""

# ruff: noqa: T201

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from apps.bench.attention_systems import (
    Shape,
    System,
    Workload,
    code_space,
    dense_absorbed,
    dense_bf16_sdpa,
    inference,
    lookup_mha,
    train_step,
)
from torchrec_sid.side.kernels import triton_attention
from torchrec_sid.side.kernels.attention_problem import AttentionProblem, checked_problem
from torchrec_sid.side.kernels.triton_attention import Tiles, choose_tiles

Work = Callable[[], object]


def milliseconds(work: Work, device: torch.device, repeats: int = 20) -> float:
    """Median time on the device, after three runs that do not count."""
    if device.type != "cuda":
        repeats = 1
    times = []
    for i in range(repeats + 3 if device.type == "cuda" else 1):
        begin, end = (
            (torch.cuda.Event(enable_timing=True) for _ in range(2)) if device.type == "cuda" else (0, 0)
        )
        if device.type == "cuda":
            begin.record()
        work()
        if device.type == "cuda":
            end.record()
            end.synchronize()
            if i >= 3:
                times.append(begin.elapsed_time(end))
    return statistics.median(times) if times else float("nan")


def ceilings(device: torch.device) -> dict[str, float]:
    """Measured bytes per second of a copy, and operations per second of a bfloat16 product."""
    if device.type != "cuda":
        return {"bytes_per_s": float("nan"), "flop_per_s": float("nan")}
    source = torch.randint(256, (1 << 32,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = milliseconds(lambda: target.copy_(source), device)
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = milliseconds(lambda: a @ b, device)
    return {"bytes_per_s": 2 * (1 << 32) / copy * 1e3, "flop_per_s": 2 * 8192**3 / product * 1e3}


def floors(
    w: Workload, tiles: Tiles, splits: int, backward: bool, rates: dict[str, float]
) -> dict[str, float]:
    """Milliseconds that the bytes and the tensor-core operations of one pass need at the measured rates."""
    shape = w.shape
    rows = shape.candidates * shape.heads
    events = len(w.ids)
    features = w.attention.layout.num_features
    padded_rows = -(-rows // tiles.block_m) * tiles.block_m
    # Forward: scores and sums. Backward: scores, their gradients, and sums.
    products = 5 if backward else 2
    flop = 2.0 * products * splits * events * tiles.block_f * padded_rows
    vectors = 4.0 * shape.users * rows * features
    moved = events * w.spec.nbytes * (2 if backward else 1) + vectors * (5 if backward else 2)
    return {
        "bytes_floor_ms": moved / rates["bytes_per_s"] * 1e3,
        "operations_floor_ms": flop / rates["flop_per_s"] * 1e3,
    }


def kernel_problem(w: Workload) -> AttentionProblem:
    """The operator's own inputs, without projections."""
    layout, shape = w.attention.layout, w.shape
    query = torch.randn(shape.users, shape.candidates * shape.heads, layout.num_features, device=w.device)
    return checked_problem(
        query, w.history, w.lengths, None, None, layout.text, shape.heads, "softmax", None, None, None
    )


def graphed(work: Work, device: torch.device) -> Work:
    """The work as one replayed graph: without the gaps between launches."""
    if device.type != "cuda":
        return work
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def sweep(w: Workload, problem: AttentionProblem) -> list[dict[str, Any]]:
    """Forward and backward time of other tiles than the default ones."""
    default = choose_tiles(problem.most_rows, problem.query.shape[1])
    options = {default}
    rows = (16,) if problem.most_rows <= 16 else (32, 64, 128)
    if w.device.type == "cuda":
        options |= {
            Tiles(m, n, default.block_f, warps) for m in rows for n in (32, 64, 128) for warps in (4, 8)
        }
    found = []
    for tiles in sorted(options):
        try:
            out = triton_attention.forward(problem, 3, tiles)
            grad, none = torch.randn_like(out.z), torch.zeros_like(out.total)
            times = {
                "forward_ms": milliseconds(
                    graphed(lambda t=tiles: triton_attention.forward(problem, 3, t), w.device), w.device
                ),
                "backward_ms": milliseconds(
                    graphed(
                        lambda t=tiles, g=grad, o=out, z=none: triton_attention.backward(
                            g, z, z, problem, o, 3, t
                        ),
                        w.device,
                    ),
                    w.device,
                ),
            }
        except Exception as error:  # noqa: BLE001
            times = {"error": f"{type(error).__name__}: {str(error)[:100]}"}
        found.append({**tiles._asdict(), "default": tiles == default, **times})
    return found


def measure(shape: Shape, device: torch.device, rates: dict[str, float]) -> dict[str, Any]:
    """One shape: kernels against floors, whole modules against rivals, tiles."""
    w = Workload(shape, device)
    problem = kernel_problem(w)
    tiles = choose_tiles(problem.most_rows, problem.query.shape[1])
    kernels = []
    for splits in (3, 1):
        out = triton_attention.forward(problem, splits)
        grad, none = torch.randn_like(out.z), torch.zeros_like(out.total)
        for name, work in {
            "forward": lambda s=splits: triton_attention.forward(problem, s),
            "backward": lambda s=splits, g=grad, z=none, o=out: triton_attention.backward(
                g, z, z, problem, o, s
            ),
        }.items():
            time = milliseconds(graphed(work, device), device)
            bound = floors(w, tiles, splits, name == "backward", rates)
            fractions = {
                key.replace("_floor_ms", "_fraction"): value / time for key, value in bound.items()
            }
            kernels.append({"pass": name, "splits": splits, "ms": time, **bound, **fractions})
    systems = [code_space(w, "triton"), code_space(w, "triton_bf16"), dense_absorbed(w, torch.bfloat16)]
    systems += [dense_bf16_sdpa(w), _autocast(lookup_mha(w))]
    rows = []
    for system in systems:
        for name, make in (("forward", inference), ("forward+backward", train_step)):
            try:
                time = milliseconds(make(system, w.candidates), device)
            except torch.OutOfMemoryError:
                time = float("nan")
            if device.type == "cuda":
                torch.cuda.empty_cache()
            rows.append({"system": system.name, "pass": name, "ms": time})
    with torch.no_grad():
        replay = graphed(inference(systems[0], w.candidates), device)
        rows.append(
            {"system": "code_space_triton_graph", "pass": "forward", "ms": milliseconds(replay, device)}
        )
    return {"shape": vars(shape), "kernels": kernels, "systems": rows, "tiles": sweep(w, problem)}


def _autocast(system: System) -> System:
    def forward(candidates: torch.Tensor) -> torch.Tensor:
        with torch.autocast(candidates.device.type, dtype=torch.bfloat16):
            return system.forward(candidates).float()

    return system._replace(name="lookup_mha_bf16", forward=forward)


def show(result: dict[str, Any]) -> None:
    print("\n" + ", ".join(f"{value} {name}" for name, value in result["shape"].items()))
    for row in result["kernels"]:
        print(
            f"  kernel {row['pass']:9} {row['splits']} x bf16: {row['ms']:8.3f} ms; floors: bytes "
            f"{row['bytes_floor_ms']:.4f} ms ({row['bytes_fraction']:.1%} reached), tensor cores "
            f"{row['operations_floor_ms']:.4f} ms ({row['operations_fraction']:.1%})"
        )
    ours = {r["pass"]: r["ms"] for r in result["systems"] if r["system"] == "code_space_triton"}
    for row in result["systems"]:
        ratio = row["ms"] / ours[row["pass"]]
        print(f"  {row['system']:26} {row['pass']:17} {row['ms']:9.3f} ms  x {ratio:.1f}")
    timed = [t for t in result["tiles"] if "error" not in t]
    for tiles in sorted(timed, key=lambda t: t["forward_ms"] + t["backward_ms"])[:5]:
        print("  tiles", tiles)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    device = torch.device(options.device)
    rates = ceilings(device)
    print({"torch": torch.__version__, **rates})
    if device.type == "cuda":
        shapes = [Shape(256, 10_000, candidates=m) for m in (1, 64)]
        shapes += [Shape(256, 10_000, digits=80), Shape(16, 4096)]
    else:
        shapes = [Shape(2, 70, dims=16, candidates=2, digits=8)]
    results = []
    for shape in shapes:
        results.append(measure(shape, device, rates))
        show(results[-1])
        if options.json:
            options.json.write_text(json.dumps({"rates": rates, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
