import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.side.attention_cases import SPECS, make_basis
from torchrec_sid import SidError, SidSpec
from torchrec_sid.side import FrozenBasis, SimilarityConfig, SimilarityFeatures
from torchrec_sid.side.kernels import similarity_operator


def expected_features(
    basis: FrozenBasis,
    config: SimilarityConfig,
    candidate: torch.Tensor,
    history: torch.Tensor,
    labels: torch.Tensor,
) -> list[float]:
    """The definitions in `SimilarityConfig.names`, for one candidate and its history."""
    shift = 0 if basis.mean is None or not config.centred else basis.mean.double()
    x = basis.decode(candidate[None])[0].double() - shift
    y = basis.decode(history).double() - shift
    scale = x.norm() * y.norm(dim=1)
    cos = (y @ x) / torch.where(scale > 1e-6, scale, torch.inf)
    n = len(history)

    def largest(values: torch.Tensor) -> float:
        return float(values.max()) if len(values) else -1.0

    out = [largest(cos), float(cos.mean()) if n else 0.0]
    for t in config.temperatures:
        out.append(1 + float(torch.log((t * (cos - 1)).exp().mean())) / t if n else -1.0)
    if config.labels:
        for t in config.temperatures:
            out.append(float((torch.softmax(t * cos, 0) * labels).sum()))
        out.append(float((cos * labels).mean()) if n else 0.0)
        out += [largest(cos[labels > 0]), largest(cos[labels < 0])]
    counts = [0] * config.agreement_bins
    for event in history:
        same = (event == candidate).tolist()
        agree = same.index(False) if config.agreement == "prefix" and False in same else sum(same)
        if config.agreement_bins:
            counts[min(config.agreement_bins - 1, config.agreement_bins * agree // len(same))] += 1
    return out + [count / max(n, 1) for count in counts]


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@given(
    spec=st.sampled_from(sorted(SPECS)),
    lengths=st.lists(st.one_of(st.integers(0, 3), st.integers(0, 600)), min_size=1, max_size=4),
    candidates=st.integers(1, 20),
    small_tiles=st.booleans(),
    hot=st.sampled_from([(), (10.0,), (3.0, 10.0, 30.0), (43.0, 0.1)]),
    labels=st.booleans(),
    bins=st.sampled_from([0, 1, 5, 40]),
    agreement=st.sampled_from(["count", "prefix"]),
    centred=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_equals_the_definitions(
    backend, spec, lengths, candidates, small_tiles, hot, labels, bins, agreement, centred, seed
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(similarity_operator, "_TILE_FLOATS", 1 << 10 if small_tiles else 1 << 19)
        check_definitions(backend, spec, lengths, candidates, hot, labels, bins, agreement, centred, seed)


def check_definitions(
    backend, spec, lengths, candidates, hot, labels, bins, agreement, centred, seed
) -> None:
    generator = torch.Generator().manual_seed(seed)
    basis = make_basis(spec, 8, generator)
    config = SimilarityConfig(hot, labels, bins, agreement, centred)
    side = SimilarityFeatures(basis, config)
    events, users = sum(lengths), len(lengths)
    codes = torch.stack(
        [torch.randint(k, (events,), generator=generator) for k in basis.spec.cardinalities], 1
    )
    wanted = torch.stack(
        [torch.randint(k, (users * candidates,), generator=generator) for k in basis.spec.cardinalities], 1
    )
    if events:
        wanted[0] = codes[0]  # an exact repeat
    label = torch.randint(-1, 2, (events,), generator=generator).float()
    backend = "auto" if spec == "wide" else backend
    side.backend = backend
    out = side(
        basis.spec.pack_bytes(wanted).unflatten(0, (users, candidates)),
        basis.spec.pack_bytes(codes),
        torch.tensor(lengths),
        label if labels else None,
    )
    assert out.shape == (users, candidates, len(side.names))
    at = 0
    for user, length in enumerate(lengths):
        for c in range(candidates):
            expected = expected_features(
                basis,
                config,
                wanted[user * candidates + c],
                codes[at : at + length],
                label[at : at + length],
            )
            torch.testing.assert_close(out[user, c].tolist(), expected, rtol=2e-5, atol=2e-5)
        at += length


def test_repeated_directions_count_for_what_they_are() -> None:
    """Two digits along one direction cancel: equal vectors have cosine 1 though no digit agrees."""
    direction = torch.randn(1, 6)
    basis = FrozenBasis.from_digits(SidSpec((3, 3)), torch.cat([direction, -direction]))
    side = SimilarityFeatures(basis, SimilarityConfig((), labels=False, agreement_bins=3))
    a, b = torch.tensor([[2, 1]]), torch.tensor([[1, 0]])
    features = dict(
        zip(
            side.names,
            side(basis.spec.pack_bytes(a), basis.spec.pack_bytes(b), torch.tensor([1]))[0].tolist(),
            strict=True,
        )
    )
    assert features["max"] == pytest.approx(1, abs=1e-5)
    assert features["agreement_0"] == 1


def test_small_directions_count_where_nothing_else_does() -> None:
    """Two items that differ along a direction of a hundredth of the largest alone are opposites."""
    basis = FrozenBasis.from_digits(SidSpec((3, 3)), torch.tensor([[1.0, 0.0], [0.0, 0.01]]))
    side = SimilarityFeatures(basis, SimilarityConfig((), labels=False))
    data = basis.spec.pack_bytes(torch.tensor([[1, 2], [1, 0], [2, 2]]))
    out = side(data[:1], data, torch.tensor([3]))[0]
    assert out[side.names.index("max")] == pytest.approx(1, abs=1e-5)
    assert out[side.names.index("mean")] == pytest.approx((1 - 1 + 0.01) / 3, abs=1e-4)


def test_labels_move_the_pools_towards_similar_events() -> None:
    basis = FrozenBasis.from_digits(SidSpec((3,) * 6), torch.eye(6))
    side = SimilarityFeatures(basis)
    near, far = [2, 2, 2, 0, 1, 1], [0, 0, 0, 2, 1, 1]
    data = basis.spec.pack_bytes(torch.tensor([near, far]))
    features = dict(
        zip(
            side.names,
            side(data[:1], data, torch.tensor([2]), torch.tensor([1.0, -1.0]))[0].tolist(),
            strict=True,
        )
    )
    assert features["max_liked"] == pytest.approx(1, abs=1e-5)
    assert features["max_disliked"] == pytest.approx(-1, abs=1e-5)
    assert features["label@3"] < features["label@10"] <= 1
    assert features["signed_mean"] == pytest.approx(1, abs=1e-5)


def test_state_is_buffers_only_and_exports() -> None:
    basis = make_basis("trits", 8, torch.Generator().manual_seed(0))
    side = SimilarityFeatures(basis, SimilarityConfig(agreement_bins=4), device="meta")
    assert not list(side.parameters())
    assert not side.table.is_meta
    codes = torch.randint(3, (9, 12))
    data = basis.spec.pack_bytes(codes)
    args = (data[:2], data, torch.tensor([4, 5]), torch.ones(9))
    users, events = torch.export.Dim("users"), torch.export.Dim("events")
    program = torch.export.export(
        side, args, dynamic_shapes=({0: users}, {0: events}, {0: users}, {0: events})
    )
    torch.testing.assert_close(program.module()(*args), side(*args))
    args = (data[:3], data, torch.tensor([4, 0, 5]), torch.ones(9))
    torch.testing.assert_close(program.module()(*args), side(*args))
    one = side(*args)
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(side, fullgraph=True, backend="aot_eager")(*args), one)
    torch.testing.assert_close(side(data[:3].unsqueeze(1), *args[1:]).squeeze(1), one)


def test_operator_passes_the_library_checks() -> None:
    basis = make_basis("mixed", 8, torch.Generator().manual_seed(0))
    side = SimilarityFeatures(basis)
    codes = torch.stack([torch.randint(k, (5,)) for k in basis.spec.cardinalities], 1)
    data = basis.spec.pack_bytes(codes)
    for backend in ("torch", "cpu"):
        torch.library.opcheck(
            similarity_operator.similarity_features,
            (
                data[:2].unsqueeze(1),
                data,
                torch.tensor([3, 2]),
                torch.ones(5),
                side.table,
                side.match,
                side.levels,
                side.values,
                [3.0],
                4,
                False,
                backend,
            ),
        )


def test_bad_input_is_refused() -> None:
    basis = make_basis("trits", 8, torch.Generator().manual_seed(0))
    side, bare = SimilarityFeatures(basis), SimilarityFeatures(basis, SimilarityConfig(labels=False))
    data = basis.spec.pack_bytes(torch.randint(3, (7, 12)))
    lengths, labels = torch.tensor([3, 4]), torch.ones(7)
    for name, args, message in [
        ("lengths", (data[:2], data, torch.tensor([3, 3]), labels), "sum 6 for 7 events"),
        ("lengths", (data[:2], data, torch.tensor([7]), labels), "for 2 users"),
        ("candidates", (data[:2, :2], data, lengths, labels), "candidate_bytes"),
        ("history", (data[:2], data.long(), lengths, labels), "history_bytes"),
        ("labels", (data[:2], data, lengths), "labels: missing"),
        ("labels", (data[:2], data, lengths, labels[:5]), "labels: shape"),
    ]:
        with pytest.raises(SidError, match=message):
            side(*args)
        assert name
    with pytest.raises(SidError, match="labels is off"):
        bare(data[:2], data, lengths, labels)
    for where in ("candidate_bytes", "history_bytes"):
        wanted, history = data[:2].clone(), data.clone()
        (wanted if where == "candidate_bytes" else history)[1, 2] = 244
        for backend in ("torch", "cpu"):
            side.backend = backend
            with pytest.raises(SidError, match=f"{where}: value 244 in column 2 of row 1"):
                side(wanted, history, lengths, labels)


@pytest.mark.parametrize(
    "fields",
    [{"temperatures": (0.0,)}, {"temperatures": (44.0,)}, {"agreement_bins": 65}, {"agreement": "equal"}],
)
def test_bad_configuration_is_refused(fields: dict) -> None:
    with pytest.raises(SidError, match="SimilarityConfig"):
        SimilarityConfig(**fields)
