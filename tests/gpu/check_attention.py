"""Side features, similarity features and code-space attention on a card, against float64 on the CPU."""

# ruff: noqa: T201

import argparse
import dataclasses
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.side.attention_cases import SPECS, Case, make_case
from torchrec_sid import SidError, SidSpec
from torchrec_sid.side import (
    EventTermsConfig,
    FrozenBasis,
    SideFeatures,
    SimilarityConfig,
    SimilarityFeatures,
)

SPECS.update({"trits25": (3,) * 25, "trits80": (3,) * 80, "trits150": (3,) * 150})
TERMS = EventTermsConfig(num_actions=3, age_boundaries=(5.0, 50.0), recency_bias=True, alibi=True)
TOLERANCE = {"triton": 1e-5, "torch": 1e-5, "triton_bf16": 0.15}


def on(case: Case, device: torch.device) -> Case:
    """The case with its module and inputs on a device."""
    moved = dataclasses.replace(
        case,
        candidates=case.candidates.to(device),
        codes=case.codes.to(device),
        lengths=case.lengths.to(device),
        extra={name: value.to(device) for name, value in case.extra.items()},
    )
    moved.attention.to(device)
    return moved


def errors(case: Case, device: torch.device) -> dict[str, float]:
    """Relative errors of output and gradients; small gradients are measured against 5% of the largest."""
    expected, expected_grads = case.reference()
    out, grads = on(case, device).measured()
    found = {"output": _relative(out, expected, 0.0)}
    largest = max((float(g.abs().max()) for g in expected_grads.values() if g.numel()), default=0.0)
    for name, grad in grads.items():
        found[name] = _relative(grad, expected_grads[name], 0.05 * largest)
    case.attention.cpu()
    return found


def _relative(found: torch.Tensor, expected: torch.Tensor, floor: float) -> float:
    if not expected.numel():
        return 0.0
    error = float((found.cpu().double() - expected).abs().max())
    return error / max(float(expected.abs().max()), floor, 1e-12)


def cases(seed: int, count: int) -> list[dict[str, Any]]:
    """Fixed corner cases, then random ones."""
    fixed: list[dict[str, Any]] = [
        {"lengths": (0,)},
        {"lengths": (1,), "heads": 1, "candidates": 1},
        {"lengths": (0, 2, 0), "candidates": 0},
        {"lengths": (10_000, 0, 1, 2_500)},
        {"lengths": (10_000, 3), "spec": "trits25", "candidates": 64, "heads": 4},
        {"lengths": (3_000, 3), "spec": "trits80", "candidates": 64, "heads": 4, "bias": 2},
        {"lengths": (3_000, 3), "spec": "trits150", "candidates": 3, "heads": 4},
        {"lengths": (700, 40, 0, 9), "terms": TERMS, "bias": 2, "mask": True, "candidates": 30},
    ]
    choose = random.Random(seed)
    for _ in range(count):
        fixed.append(
            {
                "spec": choose.choice(["trits", "odd", "mixed", "rq", "trits25", "trits80"]),
                "lengths": tuple(choose.choice([0, 1, 2, choose.randint(0, 5000)]) for _ in range(5)),
                "candidates": choose.choice([1, 2, 5, 16, 33]),
                "heads": choose.choice([1, 2, 3, 4]),
                "activation": choose.choice(["softmax", "softmax", "sigmoid", "sigmoid_mean"]),
                "terms": choose.choice([EventTermsConfig(), TERMS]),
                "bias": choose.randint(0, 2),
                "mask": choose.random() < 0.5,
                "seed": choose.randint(0, 10_000),
            }
        )
    return fixed


def check_values(device: torch.device, quick: bool) -> dict[str, float]:
    """Worst relative error by backend over all cases; fails past the tolerance."""
    worst: dict[str, float] = {}
    chosen = cases(0, 3 if quick else 40)
    if quick:
        chosen = [c for c in chosen if sum(c["lengths"]) < 1500 and c.get("spec") != "trits150"]
    for backend, tolerance in TOLERANCE.items():
        for arguments in chosen:
            found = errors(make_case(backend=backend, **arguments), device)
            name, value = max(found.items(), key=lambda item: item[1])
            if not value <= tolerance:
                raise AssertionError(f"{backend}: {name} off by {value:.2g} in {arguments}")
            worst[backend] = max(worst.get(backend, 0.0), value)
    return worst


def check_bits(device: torch.device) -> None:
    """The same input gives the same bits at every run."""
    case = on(make_case("trits25", (900, 0, 1300, 5), 20, 4, bias=2, backend="triton"), device)
    first, second = case.measured(), case.measured()
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1].values(), second[1].values(), strict=True))


def check_corrupt(device: torch.device) -> None:
    """Corrupt bytes and lengths give NaN, or with ``validate`` an error; never a plausible number."""
    for validate in (False, True):
        case = on(make_case(lengths=(3, 4), backend="triton", validate=validate), device)
        data = case.basis.spec.pack_bytes(case.codes)
        bad = data.clone()
        bad[1, 1] = 250
        for history, lengths in ((bad, case.lengths), (data, case.lengths + 1)):
            try:
                out = case.attention(case.candidates, history, lengths)
            except SidError:
                assert validate or device.type == "cpu"
            else:
                assert not validate
                assert bool(out[0].isnan().all())


def check_graph_and_compile(device: torch.device) -> None:
    """Calls can be captured in a CUDA graph, and compiled as a whole."""
    case = on(make_case("trits25", (900, 0, 1300, 5), 20, 4, backend="triton"), device)
    data = case.basis.spec.pack_bytes(case.codes)
    with torch.no_grad():
        expected = case.attention(case.candidates, data, case.lengths)
        compiled = torch.compile(case.attention, fullgraph=True)(case.candidates, data, case.lengths)
        torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-5)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = case.attention(case.candidates, data, case.lengths)
        case.candidates.mul_(0.5)
        graph.replay()
        torch.testing.assert_close(captured, case.attention(case.candidates, data, case.lengths))


def check_features(device: torch.device) -> None:
    """Side and similarity features equal the CPU's."""
    for cardinalities in ((3,) * 25, (64, 3, 3, 3), (300, 5)):
        spec = SidSpec(cardinalities)
        generator = torch.Generator().manual_seed(0)
        tables = [torch.randn(1 if k < 16 else k, 24, generator=generator) for k in cardinalities]
        basis = FrozenBasis(spec, tuple(tables))
        codes = torch.stack([torch.randint(k, (500,), generator=generator) for k in cardinalities], 1)
        data, lengths = spec.pack_bytes(codes), torch.tensor([0, 300, 1, 199])
        side = SideFeatures(spec, basis=basis) if all(k % 2 for k in cardinalities) else None
        if side is not None:
            torch.testing.assert_close(side.to(device)(data.to(device)).cpu(), side.cpu()(data))
        similarity = SimilarityFeatures(basis, SimilarityConfig(agreement_bins=4))
        arguments = (data[:4], data, lengths, torch.randint(-1, 2, (500,), generator=generator).float())
        expected = similarity(*arguments)
        found = similarity.to(device)(*(a.to(device) for a in arguments))
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    device = torch.device(options.device)
    report: dict[str, Any] = {"torch": torch.__version__, "device": str(device)}
    if device.type == "cuda":
        report["card"] = torch.cuda.get_device_name()
        # TF32 in the dense projections would hide behind the kernels' own error.
        torch.backends.cuda.matmul.allow_tf32 = False
    report["worst_error"] = check_values(device, quick=device.type == "cpu")
    checks: list[Callable[[torch.device], None]] = [check_bits, check_corrupt, check_features]
    if device.type == "cuda":
        checks.append(check_graph_and_compile)
    for check in checks:
        check(device)
    report["checks"] = ["check_values", *(check.__name__ for check in checks)]
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    print("all checks passed:", json.dumps(report), file=sys.stderr)


if __name__ == "__main__":
    main()
