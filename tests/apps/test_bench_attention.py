"""The benchmark's systems compute one function, and its rows have the published form."""

from pathlib import Path

import pytest
import torch

from apps.bench import attention
from apps.bench.alternating import peak_mb
from apps.bench.attention_systems import (
    Shape,
    Workload,
    code_space,
    decode_sdpa,
    dense_absorbed,
    dense_bf16_sdpa,
    lookup_mha,
    train_step,
)

SMALL = Shape(users=3, length=20, dims=16, heads=2, candidates=2, digits=8)


def test_all_systems_compute_the_same_function_and_gradient() -> None:
    w = Workload(SMALL, torch.device("cpu"))
    out, grad = attention.reference(w, SMALL.users)
    exact = [code_space(w, "torch"), code_space(w, "cpu"), lookup_mha(w), decode_sdpa(w)]
    exact.append(dense_absorbed(w, torch.float32))
    for system in exact:
        torch.testing.assert_close(system.forward(w.candidates).double(), out, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            train_step(system, w.candidates)()[0].double(), grad, rtol=1e-4, atol=1e-5
        )
    for system in (dense_bf16_sdpa(w), dense_absorbed(w, torch.bfloat16)):
        torch.testing.assert_close(system.forward(w.candidates).double(), out, rtol=0.1, atol=0.1)


def test_backward_reaches_every_weight_of_every_system() -> None:
    w = Workload(SMALL, torch.device("cpu"))
    for system in (code_space(w, "cpu"), lookup_mha(w), decode_sdpa(w), dense_bf16_sdpa(w)):
        grads = train_step(system, w.candidates)()
        used = [g is not None and bool((g != 0).any()) for g in grads if g is None or g.numel()]
        assert all(used), system.name


def test_rows_have_the_published_fields(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(attention, "shapes", lambda config: [SMALL])
    monkeypatch.setattr(attention, "measure_ragged", lambda config: [])
    monkeypatch.setattr("sys.argv", ["attention", "--quick", "--json", str(tmp_path / "rows.json")])
    attention.main()
    import json

    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert {row["system"] for row in rows} == {
        "lookup_mha",
        "dense_bf16_sdpa",
        "dense_absorbed",
        "decode_sdpa",
        "code_space_torch",
        "code_space_cpu",
    }
    assert {row["pass"] for row in rows} == {"forward", "forward+backward"}
    fields = (
        "device users length dims heads candidates digits system pass ms peak_mb bytes_per_event max_error"
    )
    assert all(list(row) == fields.split() for row in rows)
    for row in rows:
        exact = row["system"] in ("lookup_mha", "decode_sdpa", "code_space_torch", "code_space_cpu")
        assert row["max_error"] < (1e-5 if exact else 0.1)


def test_peak_memory_counts_what_is_held_at_once() -> None:
    def work() -> None:
        first = torch.zeros(250_000)  # 1 MB
        second = first + 1
        del first
        third = second + 1
        del second, third

    assert peak_mb(work, torch.device("cpu")) == pytest.approx(2, abs=0.1)


def test_kernels_are_timed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "Shape", lambda **changes: SMALL)
    rows = attention.measure_kernel(attention.BenchConfig(rounds=1))
    assert {(row["kernel"], row["pass"]) for row in rows} == {
        (kernel, step) for kernel in ("cpu", "torch") for step in ("forward", "backward")
    }
    assert all(row["ms"] > 0 for row in rows)
