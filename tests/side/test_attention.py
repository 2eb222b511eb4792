import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.side.attention_cases import SPECS, Case, assert_equal, make_case
from torchrec_sid import SidError, SidSpec
from torchrec_sid.side import CodeSpaceAttention, CodeSpaceAttentionConfig, EventTermsConfig, FrozenBasis
from torchrec_sid.side.kernels import attention_torch
from torchrec_sid.side.kernels.compiler import load_library

BACKENDS = ["torch", "cpu"]
TERMS = [
    EventTermsConfig(),
    EventTermsConfig(num_actions=3),
    EventTermsConfig(age_boundaries=(1.0, 5.0, 60.0), recency_bias=True),
    EventTermsConfig(
        num_actions=4, age_boundaries=(2.0,), position_buckets=5, recency_bias=True, alibi=True
    ),
    EventTermsConfig(position_buckets=3, recency_bias=True),
    EventTermsConfig(num_actions=2, age_buckets=7, recency_bias=True),
    EventTermsConfig(alibi=True),
]


@pytest.fixture(autouse=True, scope="module")
def compiled() -> None:
    """Without a compiler the tests of the compiled kernel must fail, not pass by fallback."""
    assert load_library().reason == ""


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    spec=st.sampled_from(sorted(SPECS)),
    lengths=st.lists(st.one_of(st.integers(0, 3), st.integers(0, 700)), min_size=1, max_size=5),
    candidates=st.integers(0, 9),
    heads=st.sampled_from([1, 2, 3, 4]),
    activation=st.sampled_from(["softmax", "softmax", "sigmoid", "sigmoid_mean"]),
    terms=st.sampled_from(TERMS),
    bias=st.integers(0, 2),
    mask=st.booleans(),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_equals_decode_then_attend(backend, spec, lengths, candidates, heads, activation, **rest) -> None:
    if backend == "cpu" and spec == "wide":
        backend = "auto"
    case = make_case(
        spec, tuple(lengths), candidates, heads, activation=activation, backend=backend, **rest
    )
    assert_equal(case)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [(0,), (1,), (0, 0), (1, 1, 1), (10_000, 0, 1, 2_500)])
def test_lengths_from_none_to_ten_thousand(backend: str, lengths: tuple[int, ...]) -> None:
    assert_equal(make_case(lengths=lengths, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_users_at_all(backend: str) -> None:
    case = make_case(lengths=(), terms=TERMS[3], backend=backend)
    out = case.run(case.candidates)
    assert out.shape == (0, 2, 10)
    out.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [1, 4, 5, 8, 9, 16, 17, 40])
def test_every_number_of_rows(backend: str, rows: int) -> None:
    """Rows are handled 4, 8 or 16 at a time by the compiled kernel."""
    assert_equal(make_case(lengths=(70, 3), candidates=rows, heads=1, bias=2, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_columns(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """80 trits are 16 columns, two rounds of the compiled kernel, and more with event terms."""
    monkeypatch.setitem(SPECS, "long", (3,) * 83)
    terms = EventTermsConfig(num_actions=200, position_buckets=9)
    assert_equal(make_case("long", (50, 300), 3, terms=terms, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("lengths", "tile_floats", "bias"),
    [
        ((250, 200), 1 << 19, 1),
        ((250, 200), 1 << 12, 1),
        ((250, 200), 1 << 12, 0),
        ((1_500, 700), 1 << 19, 0),
    ],
)
def test_ties_share_the_weight_and_extreme_scores_pick_the_winner(
    backend: str, lengths: tuple[int, int], tile_floats: int, bias: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one tile of events and in several: a gradient that is 0 by cancellation stays near it."""
    monkeypatch.setattr(attention_torch, "_TILE_FLOATS", tile_floats)
    case = make_case(lengths=lengths, spread=40.0, bias=bias, backend=backend)
    if bias:
        case.extra["bias"] = torch.zeros(sum(lengths))
    case.codes[100:200] = case.codes[:100]  # exact ties
    assert_equal(case, extreme=True)
    out, _ = case.measured()
    assert torch.isfinite(out).all()
    huge = copy.deepcopy(case)
    huge.candidates = huge.candidates * 1e15
    out, grads = huge.measured()
    assert torch.isfinite(out).all()
    expected, _ = huge.reference()
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_events_masked_is_an_empty_history(backend: str) -> None:
    case = make_case(lengths=(5, 4), mask=True, backend=backend)
    case.extra["mask"] = torch.tensor([False] * 5 + [True] * 4)
    out, grads = case.measured()
    torch.testing.assert_close(out[0], case.attention.output.bias.detach().expand(2, -1))
    assert all(torch.isfinite(g).all() for g in grads.values())
    assert_equal(case)


def test_ragged_batch_equals_users_one_by_one() -> None:
    case = make_case(lengths=(90, 0, 1, 33, 60), bias=2, terms=TERMS[3])
    out, _ = case.measured()
    data, at = case.basis.spec.pack_bytes(case.codes), 0
    for user, length in enumerate(case.lengths.tolist()):
        part = slice(at, at + length)
        single = case.attention(
            case.candidates[user : user + 1],
            data[part],
            case.lengths[user : user + 1],
            **{name: value[part] for name, value in case.extra.items()},
        )
        torch.testing.assert_close(single[0], out[user], rtol=1e-5, atol=1e-6)
        at += length


def _output(case: Case) -> torch.Tensor:
    return case.run(case.candidates).detach()


@pytest.mark.parametrize(
    "changes",
    [
        {"num_heads": 4},
        {"head_dim": 5},
        {"output_dim": 7},
        {"bias": False},
        {"activation": "sigmoid"},
        {"activation": "sigmoid_mean"},
        {"scale": 3.0},
    ],
)
def test_every_field_changes_the_result(changes: dict) -> None:
    basis = FrozenBasis.from_digits(SidSpec((3,) * 12), torch.randn(12, 16))
    outputs = []
    for config in (
        CodeSpaceAttentionConfig(query_dim=10, num_heads=2),
        CodeSpaceAttentionConfig(**{"query_dim": 10, "num_heads": 2, **changes}),
    ):
        torch.manual_seed(0)
        attention = CodeSpaceAttention(basis, config)
        for parameter in attention.parameters():
            torch.nn.init.normal_(parameter)
        codes = torch.randint(3, (9, 12))
        outputs.append(attention(torch.randn(2, 3, 10), basis.spec.pack_bytes(codes), torch.tensor([4, 5])))
    assert outputs[0].shape != outputs[1].shape or not torch.allclose(outputs[0], outputs[1])


@pytest.mark.parametrize("terms", TERMS[1:])
def test_every_term_changes_the_result(terms: EventTermsConfig) -> None:
    case = make_case(lengths=(20, 30), terms=terms)
    before = _output(case)
    if case.attention.terms.embedding is not None:
        torch.nn.init.zeros_(case.attention.terms.embedding)
    case.attention.terms.slopes.zero_()
    if case.attention.terms.recency is not None:
        torch.nn.init.zeros_(case.attention.terms.recency)
    assert not torch.allclose(before, _output(case))


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("terms", TERMS)
def test_every_parameter_gets_a_gradient(terms: EventTermsConfig, activation: str) -> None:
    """DistributedDataParallel waits for each of them."""
    case = make_case(lengths=(5, 4), terms=terms, activation=activation)
    case.run(case.candidates).square().sum().backward()
    for name, parameter in case.attention.named_parameters():
        assert parameter.grad is not None, name
        assert bool((parameter.grad != 0).any()), name


def test_mask_and_bias_change_the_result() -> None:
    case = make_case(lengths=(20, 30), bias=1)
    biased = _output(case)
    case.extra["bias"] = torch.zeros(50)
    plain = _output(case)
    assert not torch.allclose(biased, plain)
    assert not torch.allclose(case.run(case.candidates, mask=torch.arange(50) % 2 == 0).detach(), plain)


def test_compile_and_export_keep_one_operator_and_the_result() -> None:
    case = make_case(lengths=(20, 0, 30), terms=TERMS[3], bias=1)
    args = (case.candidates, case.basis.spec.pack_bytes(case.codes), case.lengths)
    expected = case.attention(*args, **case.extra)
    torch.compiler.reset()
    compiled = torch.compile(case.attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args, **case.extra), expected)
    grads = torch.autograd.grad(compiled(*args, **case.extra).sum(), case.attention.query.weight)
    torch.testing.assert_close(
        grads, torch.autograd.grad(case.attention(*args, **case.extra).sum(), case.attention.query.weight)
    )
    users, events = torch.export.Dim("users"), torch.export.Dim("events")
    program = torch.export.export(
        case.attention,
        args,
        case.extra,
        dynamic_shapes={
            "candidates": {0: users},
            "history_bytes": {0: events},
            "lengths": {0: users},
            **{name: {0: events} for name in case.extra},
        },
    )
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert sum("torchrec_sid.code_attention" in name for name in names) == 1
    other = make_case(lengths=(5, 0, 7, 2), terms=TERMS[3], bias=1, seed=5)
    args = (other.candidates, other.basis.spec.pack_bytes(other.codes), other.lengths)
    torch.testing.assert_close(program.module()(*args, **other.extra), case.attention(*args, **other.extra))


def test_operator_passes_the_library_checks() -> None:
    from torchrec_sid.side.kernels.attention_operator import code_attention

    case = make_case(lengths=(4, 0, 6), bias=2)
    layout = case.attention.layout
    query = torch.randn(3, 4, layout.num_features, requires_grad=True)
    bias = torch.randn(10, 2, requires_grad=True)
    for name in ("torch", "cpu"):
        torch.library.opcheck(
            code_attention,
            (
                query,
                case.basis.spec.pack_bytes(case.codes),
                case.lengths,
                None,
                bias,
                layout.text,
                2,
                "softmax",
                name,
                False,
            ),
        )


def test_half_precision_neither_overflows_nor_loses_scores() -> None:
    case = make_case(lengths=(30, 0, 40), spread=1.0)
    large = case.candidates * 6e4 / case.candidates.abs().max()
    expected = case.run(large.half().float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(case.run(large.half().float()), expected)
    half = case.run(large.half())
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), expected, rtol=2e-3, atol=1e-2)
    assert torch.isfinite(half).all()


def test_meta_parameters_leave_the_frozen_state_real() -> None:
    basis = make_case().basis
    attention = CodeSpaceAttention(basis, CodeSpaceAttentionConfig(10, 2), device="meta")
    assert attention.query.weight.is_meta
    torch.testing.assert_close(attention.rows, basis.rows())
    assert {name for name, _ in attention.named_buffers()} >= {"rows", "mean"}
    assert not any("rows" in name or "mean" in name for name, _ in attention.named_parameters())


@pytest.mark.parametrize("backend", BACKENDS)
def test_corrupt_codes_are_named(backend: str) -> None:
    case = make_case(lengths=(3, 4), backend=backend, terms=EventTermsConfig(num_actions=3))
    data = case.basis.spec.pack_bytes(case.codes)
    bad = data.clone()
    bad[5, 1] = 251
    with pytest.raises(SidError, match="value 251 in column 1 of row 5, outside 0..242"):
        case.attention(case.candidates, bad, case.lengths, **case.extra)
    for action in (3, -1, 300):
        actions = case.extra["actions"].clone()
        actions[2] = action
        with pytest.raises(SidError, match="in column 3 of row 2, outside 0..2"):
            case.attention(case.candidates, data, case.lengths, actions=actions)


def test_bad_input_is_refused() -> None:
    case = make_case(lengths=(3, 4), terms=EventTermsConfig(num_actions=3))
    data, attention = case.basis.spec.pack_bytes(case.codes), case.attention
    for lengths, message in [
        (torch.tensor([3, 5]), "sum 8 for 7 events"),
        (torch.tensor([-1, 8]), "length -1"),
        (torch.tensor([7]), "for 2 users"),
    ]:
        with pytest.raises(SidError, match=message):
            attention(case.candidates, data, lengths, **case.extra)
    for history in (data[:, :2], data.to(torch.int64), case.codes):
        with pytest.raises(SidError, match=r"packs into \[events, 3\] uint8"):
            attention(case.candidates, history, case.lengths, **case.extra)
    with pytest.raises(SidError, match=r"Pass \[B, m, 10\]"):
        attention(case.candidates[0], data, case.lengths, **case.extra)
    with pytest.raises(SidError, match="actions: missing"):
        attention(case.candidates, data, case.lengths)
    with pytest.raises(SidError, match="ages: given"):
        attention(case.candidates, data, case.lengths, ages=torch.zeros(7), **case.extra)
    with pytest.raises(SidError, match="actions: shape"):
        attention(case.candidates, data, case.lengths, actions=torch.zeros(6, dtype=torch.int64))
    with pytest.raises(SidError, match="bias: .*shape"):
        attention(case.candidates, data, case.lengths, bias=torch.zeros(7, 3), **case.extra)
    with pytest.raises(SidError, match="mask: torch.float32"):
        attention(case.candidates, data, case.lengths, mask=torch.ones(7), **case.extra)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"query_dim": 0}, "query_dim"),
        ({"activation": "relu"}, "Choose softmax"),
        ({"backend": "cuda"}, "Choose one of auto"),
    ],
)
def test_bad_configuration_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(SidError, match=message):
        CodeSpaceAttentionConfig(**{"query_dim": 4, **fields})


def test_bad_terms_and_heads_are_refused() -> None:
    for fields, message in [
        ({"num_actions": 256}, "num_actions"),
        ({"age_boundaries": (2.0, 1.0)}, "ascending"),
        ({"position_buckets": 63}, "position_buckets"),
        ({"recency_bias": True}, "no buckets"),
    ]:
        with pytest.raises(SidError, match=message):
            EventTermsConfig(**fields)
    with pytest.raises(SidError, match="3 heads for a basis of 16"):
        CodeSpaceAttention(make_case().basis, CodeSpaceAttentionConfig(10, 3))


def test_an_impossible_backend_says_why() -> None:
    with pytest.raises(SidError, match="'triton' cannot be used"):
        make_case(backend="triton").measured()
    with pytest.raises(SidError, match="'cpu' cannot be used: a column"):
        make_case("wide", backend="cpu").measured()


def test_validate_checks_before_the_kernel() -> None:
    """On a CPU codes are checked with and without it; the field travels into the operator."""
    case = make_case(validate=True)
    program = torch.export.export(
        case.attention, (case.candidates, case.basis.spec.pack_bytes(case.codes), case.lengths)
    )
    call = next(n for n in program.graph.nodes if "torchrec_sid.code_attention" in str(n.target))
    assert call.args[-1] is True
