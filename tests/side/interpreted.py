"""The Triton kernels in Triton's interpreter; run by test_triton.py in a process of their own."""

import os

import pytest
import torch

from tests.side.attention_cases import SPECS, assert_equal, make_case
from tests.side.request_cases import LAYOUTS, RequestCase
from torchrec_sid import SidError
from torchrec_sid.side import EventTermsConfig
from torchrec_sid.side.kernels.attention_problem import checked_problem

# The whole of Triton has to be imported under the variable.
assert os.environ["TRITON_INTERPRET"] == "1"
from torchrec_sid.side.kernels import triton_attention  # noqa: E402

TERMS = EventTermsConfig(num_actions=3, age_boundaries=(5.0, 50.0), recency_bias=True, alibi=True)


@pytest.mark.parametrize(
    "arguments",
    [
        {"lengths": (3, 0, 300, 1)},
        {"lengths": (0,)},
        {"lengths": (1,), "heads": 1, "candidates": 1},
        {"lengths": (0, 2, 0), "candidates": 0},
        {"lengths": (70, 5), "bias": 1, "candidates": 9},
        {"lengths": (70, 5), "bias": 2, "heads": 3, "mask": True},
        {"lengths": (40, 0, 9), "terms": TERMS},
        {"lengths": (40, 0, 9), "terms": TERMS, "activation": "sigmoid"},
        {"lengths": (40, 300), "activation": "sigmoid_mean", "bias": 2},
        {"lengths": (30, 7), "spec": "odd"},
        {"lengths": (30, 7), "spec": "mixed", "candidates": 20, "heads": 4},
        {"lengths": (30, 7), "spec": "rq"},
    ],
)
def test_equals_decode_then_attend(arguments: dict) -> None:
    assert_equal(make_case(backend="triton", **arguments))


def test_eighty_trits_and_every_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SPECS, "long", (3,) * 80)
    assert_equal(make_case("long", (40, 3), candidates=9, backend="triton"))
    monkeypatch.setitem(SPECS, "half", (3,) * 40)
    assert_equal(make_case("half", (40, 3), candidates=9, backend="triton"))
    monkeypatch.setitem(SPECS, "longest", (3,) * 150)
    assert_equal(make_case("longest", (20, 3), backend="triton"))


def test_work_items_of_one_history_are_merged() -> None:
    """More events than a work item holds, by histories long and short, and large scores."""
    assert_equal(make_case(lengths=(1400, 2, 700), candidates=1, backend="triton"))
    assert_equal(make_case(lengths=(600, 300), spread=3.0, backend="triton"), extreme=True)


def test_bfloat16_is_near_and_not_the_same() -> None:
    case = make_case(lengths=(100, 40), backend="triton_bf16")
    out, grads = case.measured()
    expected, expected_grads = case.reference()
    error = float((out - expected).abs().max() / expected.abs().max())
    assert 1e-6 < error < 2e-2
    name = "candidates"
    error = float((grads[name] - expected_grads[name]).abs().max() / expected_grads[name].abs().max())
    assert 1e-6 < error < 5e-2


def _raw(case, **changes):
    layout = case.attention.layout
    users = len(case.lengths)
    query = torch.randn(users, 4, layout.num_features, generator=torch.Generator().manual_seed(0))
    events = case.basis.spec.pack_bytes(case.codes)
    problem = checked_problem(
        query, events, case.lengths, None, None, layout.text, 2, "softmax", None, None, None
    )
    return triton_attention.forward(problem._replace(**changes))


@pytest.mark.parametrize("lengths", [[3, 5], [3, 3], [9, -2], [0, 0], [7_000, -6_993], [2**40, 0]])
def test_lengths_that_do_not_sum_give_nan_and_read_nothing_else(lengths) -> None:
    case = make_case(lengths=(3, 4))
    out = _raw(case, lengths=torch.tensor(lengths))
    assert out.z.isnan().all()
    assert torch.isfinite(_raw(case).z).all()


@pytest.mark.parametrize("spec", ["trits", "odd", "mixed"])
def test_corrupt_bytes_give_nan_to_their_user_alone(spec) -> None:
    case = make_case(spec, lengths=(3, 4))
    events = case.basis.spec.pack_bytes(case.codes)
    events[1, 1] = 250
    out = _raw(case, events=events)
    assert out.z[:4].isnan().any(dim=-1).all()
    assert torch.isfinite(out.z[4:]).all()


@pytest.mark.parametrize(
    "arguments",
    [
        {"counts": (3, 0, 1), "limits": True, "multiplicity": True, "heads": 4},
        {"counts": (20, 1, 5), "limits": True, "bias": 1},
        {"counts": (2, 3, 0), "multiplicity": True, "activation": "sigmoid"},
    ],
)
def test_requests_equal_every_row_on_its_own(arguments: dict) -> None:
    RequestCase(LAYOUTS["terms"], (300, 40, 0), **arguments).check("triton")


def test_what_it_cannot_do_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SidError, match="needs more than a byte"):
        make_case("wide", backend="triton").measured()
    monkeypatch.setitem(SPECS, "books", (256, 256))
    with pytest.raises(SidError, match="512 features exceed its 256"):
        make_case("books", backend="triton").measured()
