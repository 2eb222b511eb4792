"""Compiling the CPU kernels, doing without them, and their threads."""

import logging
from pathlib import Path

import pytest
import torch

from tests.side.attention_cases import make_case
from torchrec_sid import SidError
from torchrec_sid.side.kernels import attention_cpu
from torchrec_sid.side.kernels import compiler as build
from torchrec_sid.side.kernels.attention_problem import AttentionProblem

# What a process that has not called it yet would do.
load = build.load_library.__wrapped__


def test_the_library_is_compiled_once_into_the_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(build.CACHE_VARIABLE, str(tmp_path / "cache"))
    built = load()
    assert built.library is not None
    assert built.reason == ""
    (file,) = (tmp_path / "cache").iterdir()
    before = file.stat()
    assert load().library is not None
    assert file.stat() == before


def test_without_a_compiler_plain_pytorch_computes_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    case = make_case(lengths=(30, 0, 5), backend="auto")
    expected, _ = case.measured()
    for variable, value, message in [
        (build.DISABLE_VARIABLE, "1", "is set"),
        ("CXX", "/nowhere/g++", "No such file"),
        ("CXX", "false", "false failed"),
        ("PATH", "", "no C\\+\\+ compiler"),
    ]:
        with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
            patch.setenv(variable, value)
            built = load()
            assert built.library is None
            patch.setattr(attention_cpu, "load_library", lambda built=built: built)
            found, _ = case.measured()
            with pytest.raises(SidError, match=f"'cpu' cannot be used: .*{message}"):
                make_case(backend="cpu").measured()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert "runs in plain PyTorch: false failed" in caplog.text


def test_threads_change_no_bit() -> None:
    """4,201 events of 3 bytes, three blocks of rows: enough work for several threads."""
    case = make_case(lengths=(2_000, 0, 100, 2_100, 1), bias=2)
    generator = torch.Generator().manual_seed(0)
    query, grad_z = torch.randn(2, 5, 40, case.attention.layout.num_features, generator=generator)
    events, bias = case.basis.spec.pack_bytes(case.codes), case.extra["bias"]
    problem = AttentionProblem(query, events, case.lengths, None, bias, case.attention.layout, 2, True)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            out = attention_cpu.forward(problem)
            results.append((*out, *attention_cpu.backward(grad_z, torch.zeros(5, 40), problem, out)))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
