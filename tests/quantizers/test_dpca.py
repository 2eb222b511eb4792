"""Discrete PCA: the family it contains, its invariants, its fit, and bad input."""

import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.quantizers.general_form import (
    Stage,
    codebook_stage,
    pca_stage,
    product_stage,
    run_stages,
    stages_of,
    tied_stage,
)
from torchrec_sid.artifact import tensor_file
from torchrec_sid.errors import ArtifactError, SidError
from torchrec_sid.quantizers import (
    DiscretePca,
    DiscretePcaConfig,
    ResidualKMeans,
    ResidualKMeansConfig,
    load_quantizer,
)
from torchrec_sid.quantizers.digits import RoundDigits
from torchrec_sid.quantizers.dpca_fit import lloyd_max_scale, top_directions


def clusters(rows: int, dim: int = 16, seed: int = 0, centres: int = 12) -> torch.Tensor:
    """Clustered points with an uneven spectrum, away from the origin."""
    generator = torch.Generator().manual_seed(seed)
    middle = torch.randn(centres, dim, generator=torch.Generator().manual_seed(99)) * 2
    spread = torch.linspace(1.5, 0.2, dim)
    which = torch.randint(centres, (rows,), generator=generator)
    return middle[which] + torch.randn(rows, dim, generator=generator) * spread + 3.0


def fvu(quantizer: DiscretePca, x: torch.Tensor, depth: int | None = None, beam: int = 1) -> float:
    left = x - quantizer.decode(quantizer.encode(x, beam=beam)[:, :depth])
    return float(left.square().sum() / (x - x.mean(0)).square().sum())


def fitted(x: torch.Tensor, config: DiscretePcaConfig | None = None) -> DiscretePca:
    quantizer = DiscretePca(x.shape[1], config)
    quantizer.fit(x)
    return quantizer


# ---- the family


def test_residual_kmeans_is_a_special_case() -> None:
    x = clusters(600)
    kmeans = ResidualKMeans(16, ResidualKMeansConfig(cardinalities=(8, 8, 8)))
    kmeans.fit(x)
    stages = [codebook_stage(kmeans.codebook(i), kmeans.counts(i) > 0) for i in range(3)]
    out = run_stages(x, kmeans.mean, stages)
    codes = kmeans.encode(x)
    assert torch.equal(torch.stack([q.argmax(1) for q in out.digits], dim=1), codes)
    torch.testing.assert_close(out.reconstruction, kmeans.decode(codes))


def test_pca_is_a_special_case() -> None:
    x = clusters(500)
    centred = x - x.mean(0)
    _, _, vectors = torch.linalg.svd(centred, full_matrices=False)
    directions = top_directions((centred.T @ centred).double(), 4).float()
    out = run_stages(x, x.mean(0), [pca_stage(directions[:2]), pca_stage(directions[2:])])
    expected = x.mean(0) + centred @ vectors[:4].T @ vectors[:4]
    torch.testing.assert_close(out.reconstruction, expected, rtol=1e-4, atol=1e-4)


def test_fsq_is_a_special_case() -> None:
    fsq = pytest.importorskip("vector_quantize_pytorch").FSQ(levels=[5, 5, 5])
    z = torch.randn(200, 3)
    reference = fsq(z[None])[0][0]

    def bounded(t: torch.Tensor) -> torch.Tensor:
        return (t.tanh() * (1 + 1e-3) * 2).round() + 0.0

    stage = Stage(torch.eye(3), torch.zeros(3), torch.eye(3) / 2, bounded)
    torch.testing.assert_close(run_stages(z, torch.zeros(3), [stage]).reconstruction, reference)


def test_product_quantization_is_a_special_case() -> None:
    faiss = pytest.importorskip("faiss")
    x = clusters(2000, dim=8)
    pq = faiss.ProductQuantizer(8, 2, 4)
    pq.train(x.numpy())
    books = torch.from_numpy(faiss.vector_to_array(pq.centroids).reshape(2, 16, 4))
    out = run_stages(x, torch.zeros(8), [product_stage(list(books))])
    expected = torch.from_numpy(pq.decode(pq.compute_codes(x.numpy())))
    torch.testing.assert_close(out.reconstruction, expected, rtol=1e-4, atol=1e-4)
    assert bool((out.digits[0].sum(1) == 2).all())  # one codeword in each of the two blocks


@pytest.mark.parametrize("codebooks", [(), (8,)])
def test_the_fast_encoder_is_the_definition(codebooks: tuple[int, ...]) -> None:
    config = DiscretePcaConfig(stages=((3, 3), (2, 5), (1, 9), (4, 3)), codebooks=codebooks)
    quantizer = fitted(clusters(700), config)
    x = clusters(300, seed=1)
    out = run_stages(x, quantizer.mean, stages_of(quantizer))
    codes = quantizer.encode(x)
    torch.testing.assert_close(torch.cat(out.digits[len(codebooks) :], dim=1), quantizer.digits(codes))
    torch.testing.assert_close(out.reconstruction, quantizer.decode(codes), rtol=1e-4, atol=1e-4)
    tables = quantizer.code_tables()
    summed = quantizer.mean + sum(table[codes[:, i]] for i, table in enumerate(tables))
    torch.testing.assert_close(summed, quantizer.decode(codes), rtol=1e-4, atol=1e-4)


# ---- invariants


@given(
    seed=st.integers(0, 10_000),
    alphabets=st.lists(st.sampled_from([3, 5, 7]), min_size=1, max_size=4),
    digits=st.integers(1, 6),
    spread=st.floats(0.01, 100.0),
)
def test_no_sample_gets_worse_from_stage_to_stage(
    seed: int, alphabets: list[int], digits: int, spread: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    stages = []
    for alphabet in alphabets:
        directions = torch.linalg.qr(torch.randn(6, 6, generator=generator)).Q[:digits]
        stages.append(tied_stage(directions, torch.rand(digits, generator=generator) * spread, alphabet))
    x = torch.randn(50, 6, generator=generator) * 10
    errors = run_stages(x, torch.zeros(6), stages).errors
    assert bool((errors[:, 1:] <= errors[:, :-1] * (1 + 1e-5) + 1e-5).all())


def test_every_prefix_decodes_and_no_digit_hurts() -> None:
    quantizer = fitted(clusters(800), DiscretePcaConfig(stages=((4, 3), (1, 7), (4, 3), (3, 5))))
    x = clusters(200, seed=2)
    codes = quantizer.encode(x)
    last = (x - quantizer.mean).square().sum(1)
    for depth in range(1, quantizer.spec.levels + 1):
        error = (x - quantizer.decode(codes[:, :depth])).square().sum(1)
        assert bool((error <= last * (1 + 1e-5) + 1e-4).all())
        last = error
    rows = quantizer.basis[:4] / quantizer.basis[:4].norm(dim=1, keepdim=True)
    torch.testing.assert_close(rows @ rows.T, torch.eye(4), atol=1e-5, rtol=0)


def test_the_report_gives_the_error_after_every_level() -> None:
    x = clusters(500)
    quantizer = DiscretePca(16, DiscretePcaConfig.trits(10, codebooks=(4,)))
    report = quantizer.fit(x)
    assert report.rows == 500
    assert report.fvu == pytest.approx([fvu(quantizer, x, depth) for depth in range(1, 12)], rel=1e-3)
    assert list(report.fvu) == sorted(report.fvu, reverse=True)


def test_similarity_is_that_of_the_decoded_items() -> None:
    for config in (DiscretePcaConfig.trits(30), DiscretePcaConfig.trits(10, codebooks=(8,))):
        quantizer = fitted(clusters(600), config)
        codes = quantizer.encode(clusters(40, seed=3))
        decoded = quantizer.decode(codes) - quantizer.mean
        torch.testing.assert_close(
            quantizer.similarity(codes[:10], codes, cosine=False),
            decoded[:10] @ decoded.T,
            rtol=1e-3,
            atol=1e-2,
        )
        unit = torch.nn.functional.normalize(decoded)
        torch.testing.assert_close(quantizer.similarity(codes, codes), unit @ unit.T, rtol=0, atol=1e-3)
    # Directions repeat with 30 digits in 16 dimensions, so that counting equal digits orders otherwise.
    trits = fitted(clusters(600), DiscretePcaConfig.trits(30))
    digits = trits.digits(trits.encode(clusters(40, seed=3)))
    equal = (digits[:, None] == digits[None]).float().mean(2)
    exact = trits.similarity(*[trits.encode(clusters(40, seed=3))] * 2)
    assert not torch.equal(equal.argsort(dim=1), exact.argsort(dim=1))


# ---- scales


@pytest.mark.parametrize(
    ("alphabet", "scale", "error"),
    [(3, 1.224, 0.190), (5, 0.843, 0.0822), (7, 0.651, 0.0469), (9, 0.534, 0.0308)],
)
def test_scales_of_a_gaussian_are_those_of_the_tables(alphabet: int, scale: float, error: float) -> None:
    # Uniform quantizers of minimum error for a Gaussian (Max 1960, table II).
    quantiles = torch.distributions.Normal(0.0, 2.0).icdf((torch.arange(200_000) + 0.5) / 200_000)
    found = lloyd_max_scale(quantiles, alphabet)
    assert found.scale == pytest.approx(2 * scale, rel=5e-3)
    assert found.error == pytest.approx(error, rel=1e-2)


@given(st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=30), st.sampled_from([3, 5]))
def test_no_step_on_a_grid_beats_the_scale(values: list[float], alphabet: int) -> None:
    t = torch.tensor(values, dtype=torch.float64)
    found = lloyd_max_scale(t, alphabet)
    if not bool(t.any()):
        assert found == (0.0, 0.0)
        return
    steps = torch.linspace(0.02, 1.0, 50, dtype=torch.float64)[:, None] * t.abs().max()
    q = (t / steps).round().clamp(-(alphabet // 2), alphabet // 2)
    best = float((t - steps * q).square().mean(1).min() / t.square().mean())
    # Trits: exact. Longer alphabets: the best of several fixed points, each at least near-optimal.
    assert found.error <= best * (1 + 1e-9) + 1e-12 if alphabet == 3 else found.error <= best * 1.5 + 0.05


# ---- the fit


def test_a_stage_of_five_is_as_good_as_five_stages_of_one() -> None:
    x, held_out = clusters(3000, 48), clusters(1000, 48, seed=5)
    five = fitted(x, DiscretePcaConfig(stages=((5, 3),) * 4))
    one = fitted(x, DiscretePcaConfig(stages=((1, 3),) * 20))
    assert fvu(five, held_out) <= fvu(one, held_out) * 1.04


def test_every_field_changes_the_fit() -> None:
    x = clusters(900)
    base = DiscretePcaConfig.trits(8)
    codes = fitted(x, base).encode(x)
    assert torch.equal(codes, fitted(x, base).encode(x))
    assert fitted(x, dataclasses.replace(base, stages=((8, 3),))).encode(x).ne(codes).any()
    assert fitted(x, dataclasses.replace(base, codebooks=(4,))).spec.cardinalities == (4, *(3,) * 8)
    unrefined = fitted(x, dataclasses.replace(base, refine=0))
    assert fvu(fitted(x, base), x) < fvu(unrefined, x)
    sampled = dataclasses.replace(base, sample_rows=100)
    assert fitted(x, sampled).encode(x).ne(codes).any()
    other = dataclasses.replace(sampled, seed=1)
    assert not torch.equal(fitted(x, sampled).basis, fitted(x, other).basis)


def test_a_stream_of_any_batching_gives_the_fit_of_the_tensor() -> None:
    x = clusters(1000)
    config = DiscretePcaConfig.trits(15, sample_rows=None)
    whole = fitted(x, config)
    streamed = DiscretePca(16, config)
    report = streamed.fit(lambda: iter(x.split(77)))
    assert report.rows == 1000
    # 1000 rows fit the sample, so that fitting in memory is the same as fitting on the stream.
    in_memory = fitted(x, DiscretePcaConfig.trits(15))
    for other in (streamed, in_memory):
        # Sums in another order may flip a digit on the edge, which later stages pass on.
        torch.testing.assert_close(other.basis[:5], whole.basis[:5], rtol=1e-2, atol=1e-2)
        assert fvu(other, x) == pytest.approx(fvu(whole, x), rel=1e-2)


def test_a_sample_is_nearly_as_good_as_all_rows() -> None:
    x, held_out = clusters(20_000), clusters(2000, seed=7)
    everything = fitted(x, DiscretePcaConfig.trits(20, sample_rows=None))
    sample = fitted(x, DiscretePcaConfig.trits(20, sample_rows=4000))
    assert fvu(sample, held_out) <= fvu(everything, held_out) * 1.04


def test_a_first_codebook_helps_clusters_and_a_beam_helps_more() -> None:
    generator = torch.Generator().manual_seed(1)
    centres = torch.randn(24, 32, generator=generator) * 5
    x = centres.repeat(40, 1) + torch.randn(960, 32, generator=generator)
    digits = fitted(x, DiscretePcaConfig.trits(12))
    mixed = fitted(x, DiscretePcaConfig.trits(8, codebooks=(32,)))
    assert mixed.spec.bits <= digits.spec.bits
    assert fvu(mixed, x) < 0.5 * fvu(digits, x)
    deep = fitted(clusters(800), DiscretePcaConfig.trits(30, codebooks=(8,)))
    assert fvu(deep, clusters(800), beam=4) < fvu(deep, clusters(800))


def test_high_dimensions_find_the_same_subspace() -> None:
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.linspace(3, 0.1, 520) ** 3
    x = torch.randn(800, 520, generator=generator) * spectrum
    covariance = (x.T @ x).double()
    found = top_directions(covariance, 6)
    exact = torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, :6].T
    assert float((found @ exact.T).square().sum()) > 5.9


# ---- bad input


def test_constant_dimensions_and_duplicates_are_defined() -> None:
    x = clusters(300)
    x[:, 3] = 7.0
    quantizer = fitted(x)
    torch.testing.assert_close(quantizer.decode(quantizer.encode(x))[:, 3], x[:, 3], atol=1e-3, rtol=0)
    same = torch.full((50, 8), 2.5)
    for codebooks in ((), (4,)):
        quantizer = DiscretePca(8, DiscretePcaConfig.trits(10, codebooks=codebooks))
        report = quantizer.fit(same)
        assert report.fvu == (0.0,) * (10 + len(codebooks))
        assert len(quantizer.encode(same).unique(dim=0)) == 1
        torch.testing.assert_close(quantizer.decode(quantizer.encode(same)), same)


def test_fewer_items_than_digits_or_codes_is_defined() -> None:
    x = clusters(3)
    quantizer = fitted(x, DiscretePcaConfig.trits(40, codebooks=(8,)))
    assert fvu(quantizer, x) < 1e-6
    one = fitted(x[:1])
    torch.testing.assert_close(one.decode(one.encode(x[:1])), x[:1])


def test_bad_data_is_refused_by_name() -> None:
    x = clusters(100)
    broken = x.clone()
    broken[41, 2] = torch.nan
    with pytest.raises(SidError, match="row 41 holds a NaN"):
        DiscretePca(16).fit(broken)
    with pytest.raises(SidError, match="16 dimensions.*made for 12"):
        DiscretePca(12).fit(x)
    quantizer = fitted(x)
    with pytest.raises(SidError, match="8 dimensions.*made for 16"):
        quantizer.encode(x[:, :8])
    with pytest.raises(SidError, match="row 41"):
        quantizer.encode(broken)
    with pytest.raises(SidError, match="not fitted"):
        DiscretePca(16).encode(x)
    with pytest.raises(SidError, match="beam 0"):
        quantizer.encode(x, beam=0)
    for codes in (torch.zeros(2, 26, dtype=torch.int64), torch.zeros(2, 0, dtype=torch.int64)):
        with pytest.raises(SidError, match="1 to 25 levels"):
            quantizer.decode(codes)
    with pytest.raises(SidError, match="code 3"):
        quantizer.decode(torch.full((1, 4), 3))
    assert quantizer.encode(x[:0]).shape == (0, 25)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("stages", ()),
        ("stages", ((1, 4),)),
        ("stages", ((0, 3),)),
        ("codebooks", (1,)),
        ("refine", -1),
        ("sample_rows", 0),
    ],
)
def test_bad_configurations_are_refused(field: str, value: object) -> None:
    with pytest.raises(SidError):
        DiscretePcaConfig(**{field: value})  # type: ignore[arg-type]


def test_a_stage_wider_than_the_embedding_is_refused() -> None:
    with pytest.raises(SidError, match="orthonormal"):
        DiscretePca(4, DiscretePcaConfig(stages=((5, 3),)))


# ---- artefacts


def test_round_trip_and_interrupted_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = clusters(400)
    quantizer = fitted(x, DiscretePcaConfig(stages=((3, 3), (2, 5)), codebooks=(8,)))
    path = tmp_path / "dpca.safetensors"
    mark = quantizer.save(path)
    loaded = load_quantizer(path)
    assert isinstance(loaded, DiscretePca)
    assert loaded.fingerprint == mark
    assert loaded.config == quantizer.config
    assert torch.equal(loaded.encode(x), quantizer.encode(x))

    def torn(tensors: object, file: Path, metadata: object) -> None:
        file.write_bytes(b"half a fi")
        raise OSError("disk full")

    monkeypatch.setattr(tensor_file, "save_file", torn)
    with pytest.raises(OSError, match="disk full"):
        fitted(x).save(path)
    assert DiscretePca.load(path).fingerprint == mark
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    with pytest.raises(ArtifactError, match="not a 'residual_kmeans'"):
        ResidualKMeans.load(path)


def test_alphabets_are_odd() -> None:
    assert RoundDigits(5)(torch.tensor([[-9.0, -0.4, 1.4, 3.0]])).tolist() == [[-2.0, 0.0, 1.0, 2.0]]
    with pytest.raises(SidError, match="4 levels"):
        RoundDigits(4)
