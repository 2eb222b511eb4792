"""Operators given hostile arguments end in a named error or the right answer, forward and backward."""

import os
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.side.attention_cases import make_basis
from tests.side.request_cases import LAYOUTS, RequestCase
from torchrec_sid import SidError
from torchrec_sid.side import SimilarityConfig, SimilarityFeatures
from torchrec_sid.side.event_layout import FeatureLayout
from torchrec_sid.side.kernels.attention_operator import code_attention, code_attention_backward
from torchrec_sid.side.kernels.similarity_operator import similarity_features

FORWARD = (
    "query events lengths offset bias layout heads activation backend validate counts limits multiplicity"
)
UPSTREAM = "grad_z grad_total z total peak"
SIMILARITY = (
    "candidates events lengths labels table match levels values temperatures bins prefix backend "
    "counts limits multiplicity"
)


def attention_arguments(backend: str = "cpu") -> dict[str, Any]:
    """Good ones, of 2 users with 3 and 1 candidates of 2 heads; and of the backward pass."""
    case = RequestCase(LAYOUTS["terms"], (60, 5), (3, 1), limits=True, multiplicity=True, bias=2)
    arguments: dict[str, Any] = {
        "query": case.query.float(),
        "events": case.events,
        "lengths": torch.tensor(case.lengths),
        "offset": case.offset.float(),
        "bias": case.bias_values.float(),
        "layout": case.layout,
        "heads": 2,
        "activation": "softmax",
        "backend": backend,
        "validate": False,
        "counts": torch.tensor(case.counts),
        "limits": case.limit_values,
        "multiplicity": case.times.float(),
    }
    out = code_attention(*arguments.values())
    upstream = (case.upstream.float(), case.upstream_total.float())
    return {**arguments, **dict(zip(UPSTREAM.split(), (*upstream, *out), strict=True))}


def similarity_arguments(backend: str = "cpu") -> dict[str, Any]:
    basis = make_basis("mixed", 8, torch.Generator().manual_seed(0))
    side = SimilarityFeatures(basis, SimilarityConfig(agreement_bins=4))
    codes = torch.stack([torch.randint(k, (40,)) for k in basis.spec.cardinalities], 1)
    data = basis.spec.pack_bytes(codes)
    return {
        "candidates": data[:12],
        "events": data,
        "lengths": torch.tensor([33, 7]),
        "labels": torch.ones(40),
        "table": side.table,
        "match": side.match,
        "levels": side.levels,
        "values": side.values,
        "temperatures": [3.0],
        "bins": 4,
        "prefix": False,
        "backend": backend,
        "counts": torch.tensor([10, 2]),
        "limits": torch.tensor([33] * 10 + [7, 0]),
        "multiplicity": torch.ones(40),
    }


def run_attention(arguments: dict[str, Any], backward: bool) -> tuple[torch.Tensor, ...]:
    forward = [arguments[name] for name in FORWARD.split()]
    if not backward:
        return code_attention(*forward)
    del forward[FORWARD.split().index("validate")]
    return code_attention_backward(*(arguments[name] for name in UPSTREAM.split()), *forward)


def run_similarity(arguments: dict[str, Any]) -> torch.Tensor:
    return similarity_features(*(arguments[name] for name in SIMILARITY.split()))


def harm(value: Any, draw: st.DataObject) -> Any:
    """Something else of the same kind: another type, shape, layout in memory, or values."""
    if not isinstance(value, torch.Tensor):
        if isinstance(value, str):
            return draw.draw(
                st.sampled_from(["", "#", "#0", "0x3", "3x3,", "#300", "relu", "3x3x3x3x3x3x3"])
            )
        if isinstance(value, bool):
            return not value
        if isinstance(value, int):
            return draw.draw(st.sampled_from([-1, 0, 3, 7, 65, 2**40]))
        return draw.draw(st.sampled_from([[], [0] * len(value), [2**40] * len(value), value * 2]))
    way = draw.draw(st.sampled_from(["type", "shape", "short", "strides", "values"]))
    if way == "type":
        kinds = [torch.float64, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool]
        return value.to(draw.draw(st.sampled_from(kinds)))
    if way == "shape":
        return draw.draw(
            st.sampled_from([value.flatten(), value.unsqueeze(0), value[..., None], value[:0]])
        )
    if way == "short":
        return value[: max(0, len(value) - draw.draw(st.integers(1, 3)))]
    if way == "strides":
        return value[:1].expand(value.shape) if value.numel() else value
    extreme = [-1, 255, 2**31 - 1, 2**62] if value.dtype != torch.uint8 else [255, 254, 128]
    changed = value.clone()
    at = draw.draw(st.integers(0, value.numel() - 1))
    if changed.dtype.is_floating_point:
        extreme = [-1.0, 0.0, 3e38, float("inf"), float("nan")]
    changed.view(-1)[at] = draw.draw(st.sampled_from(extreme))
    return changed


def same_or_refused(run: Any, arguments: dict[str, Any]) -> None:
    """Refused by name, or what plain PyTorch answers to the same arguments."""
    try:
        found = run(arguments)
    except SidError:
        return
    if arguments["backend"] == "cpu":
        try:
            expected = run({**arguments, "backend": "torch"})
        except SidError as error:
            raise AssertionError("answered what plain PyTorch refuses") from error
        for a, b in zip(found, expected, strict=True):
            # Where the numbers themselves leave float32, one may overflow earlier than the other.
            if bool(torch.isfinite(b).all()) and b.numel() and float(b.abs().max()) < 1e30:
                scale = max(float(b.abs().max()), 1e-3)
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.parametrize("backward", [False, True])
@given(data=st.data())
@settings(
    max_examples=int(os.environ.get("HOSTILE_CASES", "150")),
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
def test_hostile_attention_arguments(backward: bool, data: st.DataObject) -> None:
    arguments = attention_arguments()
    names = [*FORWARD.split(), *(UPSTREAM.split() if backward else ())]
    for name in data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=2, unique=True)):
        if name not in ("backend", "validate"):
            arguments[name] = harm(arguments[name], data)
    same_or_refused(lambda chosen: run_attention(chosen, backward), arguments)


@given(data=st.data())
@settings(
    max_examples=int(os.environ.get("HOSTILE_CASES", "150")),
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
def test_hostile_similarity_arguments(data: st.DataObject) -> None:
    arguments = similarity_arguments()
    for name in data.draw(
        st.lists(st.sampled_from(SIMILARITY.split()), min_size=1, max_size=2, unique=True)
    ):
        if name != "backend":
            arguments[name] = harm(arguments[name], data)
    same_or_refused(lambda chosen: (run_similarity(chosen),), arguments)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"match": lambda t: torch.full_like(t, 255)}, "match: 255 in column 0"),
        ({"lengths": lambda t: t + 10**6}, "lengths: sum"),
        ({"lengths": lambda t: t.float()}, "lengths: torch.float32"),
        ({"events": lambda t: torch.full_like(t, 255)}, "history_bytes: value 255"),
        ({"candidates": lambda t: torch.full_like(t, 255)}, "candidate_bytes: value 255"),
        ({"labels": lambda t: t.double()}, "labels: torch.float64"),
        ({"labels": lambda t: t[:3]}, "labels: .*shape"),
        ({"table": lambda t: t[:-1]}, "table: .*shape"),
        ({"table": lambda t: t[:, :0]}, "rank of the table: 0"),
        ({"levels": lambda t: t[:-1]}, "levels: "),
        ({"bins": lambda t: -1}, "bins: -1"),
        ({"temperatures": lambda t: [float("nan")]}, "temperatures: nan"),
        ({"limits": lambda t: t + 1}, "limits: 34 of candidate 0"),
        ({"counts": lambda t: t * 2}, "counts: sum 24 for 12"),
        ({"multiplicity": lambda t: -t}, "multiplicity: -1 of event 0"),
    ],
)
def test_what_similarity_refuses(backend: str, change: dict, message: str) -> None:
    arguments = similarity_arguments(backend)
    arguments.update({name: make(arguments[name]) for name, make in change.items()})
    with pytest.raises(SidError, match=message):
        run_similarity(arguments)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offset": lambda t: t.double()}, "offset: torch.float64"),
        ({"bias": lambda t: t.double()}, "bias: torch.float64"),
        ({"lengths": lambda t: t * 10**6}, "lengths: sum"),
        ({"lengths": lambda t: torch.tensor([-1, 66])}, "lengths: length -1"),
        ({"events": lambda t: torch.full_like(t, 255)}, "history_bytes: value 255 in column 0 of row 0"),
        ({"heads": lambda t: 0}, "heads: 0"),
        ({"heads": lambda t: 3}, "query: 8 rows"),
        ({"layout": lambda t: "3x3x3x3x3x3,#2"}, "layout: '3x3x3x3x3x3'"),
        ({"layout": lambda t: ""}, "layout: ''"),
        ({"counts": lambda t: torch.tensor([2**40, -(2**40) + 4])}, "counts: "),
        ({"limits": lambda t: t * 0 + 61}, "limits: 61 of candidate 0"),
        ({"multiplicity": lambda t: t * float("nan")}, "multiplicity: nan of event 0"),
        ({"activation": lambda t: "relu"}, "activation: 'relu'"),
    ],
)
def test_what_attention_refuses(backend: str, backward: bool, change: dict, message: str) -> None:
    arguments = attention_arguments(backend)
    arguments.update({name: make(arguments[name]) for name, make in change.items()})
    with pytest.raises(SidError, match=message):
        run_attention(arguments, backward)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("backward", [False, True])
def test_an_event_that_no_candidate_sees_is_checked_too(backend: str, backward: bool) -> None:
    arguments = attention_arguments(backend)
    arguments["limits"] = torch.zeros(4, dtype=torch.int64)
    arguments["events"] = arguments["events"].clone()
    arguments["events"][17, 0] = 255
    with pytest.raises(SidError, match="value 255 in column 0 of row 17"):
        run_attention(arguments, backward)


@pytest.mark.parametrize("name", UPSTREAM.split())
def test_a_short_gradient_is_refused(name: str) -> None:
    arguments = attention_arguments()
    for other in (arguments[name][:-1], arguments[name].double(), arguments[name].unsqueeze(0)):
        with pytest.raises(SidError, match=f"{name}: "):
            run_attention({**arguments, name: other}, backward=True)


def test_layouts_that_no_spec_has_are_refused() -> None:
    for text in ("", "#", "#0", "#-1", "3x", "1x3", "257", "2x2x2x2x2x2x2x2x2", "#99999999999", "٣x3"):
        with pytest.raises(SidError, match="layout"):
            FeatureLayout.parse(text)
    assert FeatureLayout.parse("16x16,#70000").num_features == 2 + 70_000
