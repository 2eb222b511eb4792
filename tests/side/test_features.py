from typing import NoReturn

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrec_sid import SidError, SidSpec
from torchrec_sid.quantizers import (
    CategorySource,
    DiscretePca,
    DiscretePcaConfig,
    EmbeddingSource,
    Quantizer,
    ResidualKMeans,
    ResidualKMeansConfig,
    RqVae,
    RqVaeConfig,
    VqFusion,
    VqFusionConfig,
)
from torchrec_sid.side import FrozenBasis, SideFeatures, SideFeaturesConfig, as_bytes
from torchrec_sid.side.event_layout import event_columns

SPECS = [
    (3,) * 7,
    (3,) * 25,
    (5, 3, 7, 3),
    (256, 256, 3, 3, 3),
    (16, 16, 16),
    (2048, 2048),
    (300, 3),
    (32, 32, 32),
    (2048,) * 8,
]


def random_codes(spec: SidSpec, n: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randint(k, (n,), generator=generator) for k in spec.cardinalities], 1)


def random_basis(spec: SidSpec, dim: int = 12, seed: int = 1) -> FrozenBasis:
    generator = torch.Generator().manual_seed(seed)
    tables = [torch.randn(1 if k < 16 else k, dim, generator=generator) for k in spec.cardinalities]
    return FrozenBasis(spec, tuple(tables), torch.randn(dim, generator=generator))


@pytest.mark.parametrize("cardinalities", SPECS)
def test_layout_expands_to_the_decoded_vector(cardinalities: tuple[int, ...]) -> None:
    spec = SidSpec(cardinalities)
    basis, codes = random_basis(spec), random_codes(spec, 50)
    layout = basis.layout
    events = event_columns(spec, spec.pack_bytes(codes))
    assert events.dtype == layout.event_dtype
    decoded = layout.expand(events) @ basis.rows() + basis.mean
    torch.testing.assert_close(decoded, basis.decode(codes), rtol=1e-5, atol=1e-5)
    assert type(layout).parse(layout.text) == layout


@given(
    trits=st.integers(1, 90),
    kind=st.sampled_from(["digits", "one_hot", "basis"]),
    n=st.integers(0, 9),
    keep=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_features_equal_the_definition_from_every_packed_form(
    trits: int, kind: str, n: int, keep: bool, seed: int
) -> None:
    spec = SidSpec((3,) * trits)
    basis, codes = random_basis(spec, seed=seed), random_codes(spec, n, seed)
    side = SideFeatures(spec, SideFeaturesConfig(kind=kind, keep_centre=keep), basis=basis)
    q = codes.double() - 1
    if kind == "digits":
        raw = q * torch.cat(basis.tables).double().norm(dim=1)
    elif kind == "one_hot":
        parts = [torch.stack([codes == k for k in range(3)] if keep else [q > 0, q < 0], 2)]
        raw = torch.cat(parts).flatten(1).double() - 1 / 3
    else:
        raw = q @ torch.cat(basis.tables).double()
    expected = raw * side.scale
    torch.testing.assert_close(side(codes).double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(side(spec.pack_bytes(codes)), side(codes), rtol=0, atol=0)
    if spec.fits_int64:
        torch.testing.assert_close(side(spec.pack(codes)), side(codes), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["digits", "one_hot", "basis"])
@pytest.mark.parametrize("cardinalities", [(3,) * 25, (5, 3, 7, 3)])
def test_mean_is_zero_and_mean_square_is_dim(kind: str, cardinalities: tuple[int, ...]) -> None:
    spec = SidSpec(cardinalities)
    side = SideFeatures(spec, SideFeaturesConfig(kind=kind), basis=random_basis(spec))
    phi = side(random_codes(spec, 20_000))
    assert phi.mean(0).abs().max() < 0.05 * phi.std(0).max() + 1e-6
    assert phi.square().sum(1).mean() == pytest.approx(side.dim, rel=0.02)


def test_calibrate_centres_on_the_codes_that_occur() -> None:
    spec = SidSpec((3,) * 10)
    skewed = (torch.rand(4000, 10, generator=torch.Generator().manual_seed(0)) > 0.7).long() + 1
    side = SideFeatures(spec)
    assert side(skewed).mean() > 0.2
    for _ in range(3):
        phi = side.calibrate(skewed)(skewed)
        assert phi.mean(0).abs().max() < 1e-4
        assert phi.square().sum(1).mean() == pytest.approx(10, rel=1e-4)
    torch.testing.assert_close(phi / side.scale + side.center, (skewed - 1).float())


def test_one_hot_spans_per_digit_tables() -> None:
    """linear(phi) + bias reproduces any sum of one learned row per (digit, code)."""
    spec = SidSpec((3,) * 4)
    codes = torch.cartesian_prod(*[torch.arange(3)] * 4)
    table = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    target = table[torch.arange(4), codes].sum(1)
    phi = SideFeatures(spec, SideFeaturesConfig(kind="one_hot"))(codes).double()
    design = torch.cat([phi, torch.ones(len(phi), 1).double()], 1)
    fitted = design @ torch.linalg.lstsq(design, target.unsqueeze(1)).solution
    torch.testing.assert_close(fitted.squeeze(1), target, rtol=1e-4, atol=1e-5)


def test_config_fields_change_the_result() -> None:
    spec, codes = SidSpec((3,) * 6), random_codes(SidSpec((3,) * 6), 5)
    default = SideFeatures(spec, SideFeaturesConfig(kind="one_hot"))(codes)
    assert SideFeatures(spec, SideFeaturesConfig(kind="one_hot", keep_centre=True))(codes).shape == (5, 18)
    uncentred = SideFeatures(spec, SideFeaturesConfig(kind="one_hot", centred=False))(codes)
    assert not torch.equal(default, uncentred)
    assert uncentred.min() == 0
    assert SideFeatures(spec)(codes).shape == (5, 6)


def test_rq_codes_one_hot_and_summed_codebooks() -> None:
    books = [torch.randn(64, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    basis = FrozenBasis.from_codebooks(books)
    codes = random_codes(basis.spec, 30)
    summed = SideFeatures(basis.spec, SideFeaturesConfig("basis", centred=False), basis=basis)
    expected = sum(book[codes[:, i]] for i, book in enumerate(books))
    torch.testing.assert_close(summed(codes), expected * summed.scale)
    one_hot = SideFeatures(basis.spec, SideFeaturesConfig("one_hot", centred=False))(codes)
    assert one_hot.shape == (30, 192)
    assert (one_hot > 0).sum() == 90


@given(
    lengths=st.lists(st.integers(0, 5), max_size=6),
    weighted=st.booleans(),
    mode=st.sampled_from(["sum", "mean"]),
)
@settings(max_examples=30, deadline=None)
def test_pool_equals_a_loop(lengths: list[int], weighted: bool, mode: str) -> None:
    spec = SidSpec((3,) * 6)
    side, codes = SideFeatures(spec), random_codes(spec, sum(lengths))
    weights = torch.rand(sum(lengths)) if weighted else None
    pooled = side.pool(spec.pack_bytes(codes), torch.tensor(lengths, dtype=torch.int64), weights, mode)
    phi = side(codes) if weights is None else side(codes) * weights[:, None]
    rows = [block.sum(0) / (max(len(block), 1) if mode == "mean" else 1) for block in phi.split(lengths)]
    expected = torch.stack(rows) if rows else torch.zeros(0, side.dim)
    torch.testing.assert_close(pooled, expected)


@given(groups=st.lists(st.integers(0, 4), max_size=12), cardinalities=st.sampled_from([(3,) * 6, (300, 3)]))
@settings(max_examples=30, deadline=None)
def test_group_sum_equals_a_loop(groups: list[int], cardinalities: tuple[int, ...]) -> None:
    spec = SidSpec(cardinalities)
    side = SideFeatures(spec, SideFeaturesConfig("one_hot"))
    codes, of = random_codes(spec, len(groups)), torch.tensor(groups, dtype=torch.int64)
    found = side.group_sum(spec.pack_bytes(codes), of, 5)
    expected = torch.stack([side(codes)[of == group].sum(0) for group in range(5)])
    torch.testing.assert_close(found, expected)


def test_dense_histories_are_flat_ones_reshaped() -> None:
    spec = SidSpec((3,) * 25)
    side, data = SideFeatures(spec), spec.pack_bytes(random_codes(spec, 24))
    assert torch.equal(side(data.view(2, 3, 4, 5)), side(data).view(2, 3, 4, 25))
    with pytest.raises(SidError, match=r"\[N, 5\] uint8"):
        side(data.view(2, 15, 4))


@pytest.mark.parametrize("kind", ["digits", "one_hot", "basis"])
@pytest.mark.parametrize("cardinalities", [(3,) * 25, (5, 3, 7, 3), (300, 3)])
def test_compiled_features_are_the_same(kind: str, cardinalities: tuple[int, ...]) -> None:
    spec = SidSpec(cardinalities)
    if kind == "digits" and any(k % 2 == 0 for k in cardinalities):
        pytest.skip("even alphabets have no digits")
    side = SideFeatures(spec, SideFeaturesConfig(kind), basis=random_basis(spec))
    data = spec.pack_bytes(random_codes(spec, 24))
    torch.compiler.reset()  # each case is a graph of its own
    compiled = torch.compile(side, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(data), side(data))
    torch.testing.assert_close(compiled(data[:7]), side(data[:7]))


def test_state_is_buffers_only_and_travels() -> None:
    spec = SidSpec((3,) * 6)
    side = SideFeatures(spec).calibrate(random_codes(spec, 100))
    assert not list(side.parameters())
    other = SideFeatures(spec, device="cpu")
    other.load_state_dict(side.state_dict())
    codes = random_codes(spec, 9, 3)
    assert torch.equal(other(codes), side(codes))
    exported = torch.export.export(side, (spec.pack_bytes(codes),)).module()
    assert torch.equal(exported(spec.pack_bytes(codes)), side(codes))


def test_bad_input_is_refused() -> None:
    spec = SidSpec((3,) * 25)
    side = SideFeatures(spec)
    with pytest.raises(SidError, match="value 250 in column 2 of SID 1"):
        data = spec.pack_bytes(random_codes(spec, 3))
        data[1, 2] = 250
        side(data)
    with pytest.raises(SidError, match="value 250 in column 2 of SID 1"):
        side.group_sum(data, torch.tensor([1, 1, 0]), 2)
    with pytest.raises(SidError, match=r"\[N, 5\] uint8"):
        side(torch.zeros(3, 4, dtype=torch.uint8))
    with pytest.raises(SidError, match="code 3 at row 0"):
        side(torch.full((2, 25), 3))
    with pytest.raises(SidError, match="lengths: sum 3 for 2 SIDs"):
        side.pool(random_codes(spec, 2), torch.tensor([3]))
    with pytest.raises(SidError, match="no centre code"):
        SideFeatures(SidSpec((4, 3)))
    with pytest.raises(SidError, match="without a basis"):
        SideFeatures(spec, SideFeaturesConfig("basis"))
    with pytest.raises(SidError, match="another spec"):
        SideFeatures(spec, basis=random_basis(SidSpec((3,) * 24)))
    with pytest.raises(SidError, match="Choose digits"):
        SideFeaturesConfig("bytes")
    with pytest.raises(SidError, match="all equal"):
        side.calibrate(torch.zeros(4, 25, dtype=torch.int64))
    with pytest.raises(SidError, match="no SIDs"):
        side.calibrate(torch.zeros(0, 25, dtype=torch.int64))


def test_basis_refuses_what_is_not_frozen_or_does_not_fit() -> None:
    spec = SidSpec((3,) * 4)
    with pytest.raises(SidError, match="requires grad"):
        FrozenBasis.from_digits(spec, torch.randn(4, 8, requires_grad=True))
    with pytest.raises(SidError, match=r"Pass \[4, d\]"):
        FrozenBasis.from_digits(spec, torch.randn(5, 8))
    with pytest.raises(SidError, match="NaN or inf"):
        FrozenBasis.from_digits(spec, torch.full((4, 8), torch.nan))
    with pytest.raises(SidError, match="one space"):
        FrozenBasis.from_digits(spec, torch.randn(4, 8), torch.zeros(9))
    with pytest.raises(SidError, match="2 tables for 4 levels"):
        FrozenBasis(spec, (torch.randn(1, 8), torch.randn(1, 8)))
    with pytest.raises(SidError, match="at level 2"):
        FrozenBasis(spec, (torch.randn(1, 8), torch.randn(2, 8), torch.randn(1, 8), torch.randn(1, 8)))


class _Additive(Quantizer):
    """A quantizer of someone else's, which says nothing of its decoder."""

    def __init__(self, basis: FrozenBasis, bend: float = 0.0) -> None:
        super().__init__(basis.dim, None)
        self.basis, self.bend = basis, bend
        self.fitted.fill_(True)

    @property
    def spec(self) -> SidSpec:
        return self.basis.spec

    def fit(self, data: object, *, progress: bool = False) -> NoReturn:
        raise NotImplementedError

    def _encode(self, x: torch.Tensor, beam: int) -> NoReturn:
        raise NotImplementedError

    def _decode(self, codes: torch.Tensor) -> torch.Tensor:
        x = self.basis.decode(codes)
        return x + self.bend * x.square()


@pytest.mark.parametrize("cardinalities", [(3,) * 9, (32, 3, 5), (16, 16)])
def test_basis_read_off_a_quantizer(cardinalities: tuple[int, ...]) -> None:
    truth = random_basis(SidSpec(cardinalities))
    basis = FrozenBasis.from_quantizer(_Additive(truth))
    codes = random_codes(truth.spec, 40)
    torch.testing.assert_close(basis.decode(codes), truth.decode(codes), rtol=1e-4, atol=1e-4)
    assert [len(t) for t in basis.tables] == [len(t) for t in truth.tables]
    with pytest.raises(SidError, match="not a sum over levels"):
        FrozenBasis.from_quantizer(_Additive(truth, bend=0.3))


def test_as_bytes_names_the_forms_it_takes() -> None:
    with pytest.raises(SidError, match=r"codes \[N, 25\]"):
        as_bytes(SidSpec((3,) * 25), torch.zeros(3))


def test_basis_of_the_quantizers_of_this_package() -> None:
    x = torch.randn(400, 16, generator=torch.Generator().manual_seed(0)) * torch.linspace(2, 0.1, 16)
    dpca = DiscretePca(16, DiscretePcaConfig.trits(10))
    kmeans = ResidualKMeans(16, ResidualKMeansConfig((8, 8)))
    for quantizer, features in ((dpca, 10), (kmeans, 64)):
        quantizer.fit(x)
        basis = FrozenBasis.from_quantizer(quantizer)
        assert basis.layout.num_features == features
        codes = quantizer.encode(x)
        torch.testing.assert_close(basis.decode(codes), quantizer.decode(codes), rtol=1e-4, atol=1e-5)
    linear = RqVae(16, RqVaeConfig(cardinalities=(8, 8), epochs=1, hidden=()))
    linear.fit(x)
    codes = linear.encode(x)
    decoded = FrozenBasis.from_quantizer(linear).decode(codes)
    torch.testing.assert_close(decoded, linear.decode(codes), rtol=1e-4, atol=1e-5)


def test_basis_of_a_latent_behind_networks() -> None:
    x = torch.randn(400, 16, generator=torch.Generator().manual_seed(0)) * torch.linspace(2, 0.1, 16)
    vae = RqVae(16, RqVaeConfig(cardinalities=(8, 8), epochs=1, hidden=(12,), latent_dim=10))
    vae.fit(x)
    config = VqFusionConfig(codebooks=(8,), stages=((3, 3), (1, 5)), epochs=1, hidden=(12,))
    fusion = VqFusion({"a": EmbeddingSource(16), "b": CategorySource(3)}, config)
    content = {"a": x, "b": torch.arange(400) % 3}
    fusion.fit(content)
    for quantizer, codes in ((vae, vae.encode(x)), (fusion, fusion.encode(content))):
        basis = FrozenBasis.from_quantizer(quantizer)
        latents = quantizer.bottleneck.decode(codes).detach()
        torch.testing.assert_close(basis.decode(codes), latents, rtol=1e-4, atol=1e-5)
    assert [len(table) for table in basis.tables] == [8, 1, 1, 1, 1], "digits are directions"
    with pytest.raises(SidError, match="not fitted"):
        FrozenBasis.from_quantizer(VqFusion({"a": EmbeddingSource(16)}, config))
