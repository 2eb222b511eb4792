"""Users with several candidates each, against every row on its own in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.side.attention_cases import make_case
from tests.side.request_cases import LAYOUTS, RequestCase
from torchrec_sid import SidError
from torchrec_sid.side import EventTermsConfig, SimilarityFeatures
from torchrec_sid.side.kernels import attention_cpu, attention_torch
from torchrec_sid.side.kernels.attention_problem import checked_problem

BACKENDS = ["torch", "cpu"]
SIZES = st.lists(
    st.tuples(
        st.one_of(st.integers(0, 3), st.integers(0, 700)), st.one_of(st.integers(0, 3), st.integers(0, 30))
    ),
    min_size=1,
    max_size=4,
)


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    layout=st.sampled_from(sorted(LAYOUTS)),
    sizes=SIZES,
    heads=st.sampled_from([1, 2, 4]),
    values=st.sampled_from([1, 3, 256]),
    limits=st.booleans(),
    multiplicity=st.booleans(),
    activation=st.sampled_from(["softmax", "softmax", "sigmoid"]),
    bias=st.sampled_from([0, 0, 1]),
    small_tiles=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_equals_every_row_on_its_own(backend, layout, sizes, small_tiles, **rest) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if small_tiles:
            patch.setattr(attention_torch, "_TILE_FLOATS", 1 << 10)
        lengths, counts = zip(*sizes, strict=True)
        RequestCase(LAYOUTS[layout], lengths, counts, **rest).check(backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("spread", [0.0, 1.0, 4.0])
def test_one_request_of_many_candidates(backend: str, spread: float) -> None:
    """Wide scores leave the products of exponentials for the running softmax."""
    case = RequestCase(LAYOUTS["terms"], (3_000,), (40,), heads=4, spread=spread)
    case.check(backend, 1e-5 if spread < 2 else 4e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("counts", [(1,), (2,), (4,), (30,)])
def test_a_long_history_is_cut_into_parts(backend: str, counts: tuple[int, ...]) -> None:
    RequestCase(LAYOUTS["trits"], (9_000,), counts, limits=True).check(backend)
    RequestCase(LAYOUTS["trits"], (9_000,), counts, heads=1, activation="sigmoid").check(backend)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "sigmoid_mean"])
def test_modules_answer_requests_as_row_by_row(activation: str) -> None:
    """A candidate with its counts and limit equals one with a history of its own, gradients too."""
    terms = EventTermsConfig(num_actions=3, age_buckets=4)
    case = make_case(lengths=(60, 0, 40), terms=terms, activation=activation)
    similarity = SimilarityFeatures(case.basis)
    counts, limits = torch.tensor([14, 1, 3]), torch.tensor([*range(47, 61), 0, 0, 40, 13])
    candidates = torch.randn(18, 10, generator=torch.Generator().manual_seed(0), requires_grad=True)
    data, labels = case.basis.spec.pack_bytes(case.codes), torch.arange(100.0) % 3 - 1
    wanted = data[torch.arange(18) * 5]
    out = case.attention(candidates, data, case.lengths, **case.extra, counts=counts, limits=limits)
    pooled = similarity(wanted, data, case.lengths, labels, counts=counts, limits=limits)
    first = torch.repeat_interleave(torch.tensor([0, 60, 60]), counts).tolist()
    index = torch.cat([torch.arange(b, b + n) for b, n in zip(first, limits.tolist(), strict=True)])
    extra = {name: values[index] for name, values in case.extra.items()}
    rows = case.attention(candidates.unsqueeze(1), data[index], limits, **extra).squeeze(1)
    torch.testing.assert_close(out, rows, rtol=1e-5, atol=1e-5)
    grads = [torch.autograd.grad(o.square().sum(), candidates)[0] for o in (out, rows)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5 * float(grads[1].abs().max()))
    expected = similarity(wanted, data[index], limits, labels[index])
    torch.testing.assert_close(pooled, expected, rtol=2e-5, atol=2e-5)
    with pytest.raises(SidError, match="limits: given without counts"):
        case.attention(candidates.unsqueeze(1), data, limits, **case.extra, limits=limits)
    newest = make_case(lengths=(3,), terms=EventTermsConfig(position_buckets=3))
    with pytest.raises(SidError, match="count from the newest event"):
        newest.run(torch.zeros(1, 10), counts=torch.tensor([1]), limits=torch.tensor([2]))


def test_sums_that_underflow_take_the_running_softmax() -> None:
    """The best event lies far below the sum of the columns' maxima."""
    layout = "#2,#2,#2"
    events = torch.tensor([[0, 0, 1], [0, 1, 0], [1, 0, 0], [0, 0, 0]] * 50, dtype=torch.uint8)
    query = torch.zeros(16, 6)
    query[:, 1::2] = 60.0  # 1 in every column would score 180; no event has it twice
    query[8:] *= 0.1
    arguments = (events, torch.tensor([200]), None, None, layout, 1, "softmax", torch.tensor([16]))
    problem = checked_problem(query, *arguments, None, None)
    found, exact = attention_cpu.forward(problem), attention_torch.forward(problem)
    torch.testing.assert_close(found.z, exact.z, rtol=1e-5, atol=1e-6)
    assert (found.z[:8, 1::2] - 1 / 3).abs().max() < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_equal_terms_do_not_drift(backend: str) -> None:
    """20,000 equal weights of .1 added one by one in float32 would be off by 1e-4."""
    layout = "#2,3x3x3x3x3,3x3x3x3x3"
    case = RequestCase(layout, (20_000,), (8,), heads=2, spread=0.01, values=2)
    case.events[:, 0] = 0
    case.check(backend)


def test_merged_events_equal_multiplicities() -> None:
    case = RequestCase(LAYOUTS["one byte"], (4_000,), (20,), values=9)
    merged, inverse, times = torch.unique(case.events, dim=0, return_inverse=True, return_counts=True)
    assert len(merged) < 200 and len(inverse) == 4_000
    few = RequestCase(LAYOUTS["one byte"], (len(merged),), (20,))
    few.query, few.offset, few.upstream = case.query, case.offset, case.upstream
    few.events, few.times = merged, times.double()
    for backend in BACKENDS:
        found, expected = few.run(backend), case.run(backend)
        for name in ("z", "grad_query"):
            scale = float(expected[name].abs().max())
            torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5 * scale)


def test_threads_change_no_bit() -> None:
    case = RequestCase(LAYOUTS["terms"], (3_000, 2_500, 10), (40, 1, 3), limits=True, multiplicity=True)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(case.run("cpu"))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(result[name], results[0][name]) for name in ("z", "grad_query"))
