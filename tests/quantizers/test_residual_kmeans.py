"""ResidualKMeans: against Lloyd by hand, over streams, and on data that has too little to learn."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from torchrec_sid.errors import SidError
from torchrec_sid.quality import measure_quality
from torchrec_sid.quantizers import ResidualKMeans, ResidualKMeansConfig, load_quantizer
from torchrec_sid.quantizers.base import walk_levels
from torchrec_sid.quantizers.kmeans import (
    ClusterSums,
    assign,
    cluster_sums,
    fit_centroids,
    lloyd,
    plus_plus,
    relocate,
)


def normal(rows: int, dim: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))


def planted_tree(rows: int, seed: int = 0, dim: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """Unit vectors in 16 topics of 8 subtopics, Zipf popular, with noise; topic and subtopic."""
    generator = torch.Generator().manual_seed(seed)
    fixed = torch.Generator().manual_seed(7)
    topics, subtopics = torch.randn(16, dim, generator=fixed), torch.randn(16, 8, dim, generator=fixed)
    topic = torch.multinomial(1 / torch.arange(1.0, 17), rows, True, generator=generator)
    subtopic = torch.multinomial(1 / torch.arange(1.0, 9), rows, True, generator=generator)
    x = topics[topic] + 0.6 * subtopics[topic, subtopic] + 0.3 * torch.randn(rows, dim, generator=generator)
    return x / x.norm(dim=1, keepdim=True), topic, topic * 8 + subtopic


def fitted(x: Tensor, **fields: object) -> ResidualKMeans:
    quantizer = ResidualKMeans(x.shape[1], ResidualKMeansConfig(**fields))  # type: ignore[arg-type]
    quantizer.fit(x)
    return quantizer


def fvu(quantizer: ResidualKMeans, x: Tensor, beam: int = 1) -> float:
    left = x - quantizer.decode(quantizer.encode(x, beam=beam))
    return float(left.square().sum() / (x - x.mean(0)).square().sum())


def purity(codes: Tensor, label: Tensor) -> float:
    _, group = codes.unique(dim=0, return_inverse=True)
    table = torch.zeros(int(group.max()) + 1, int(label.max()) + 1)
    table.index_put_((group, label), torch.ones(len(label)), accumulate=True)
    return float(table.max(1).values.sum()) / len(label)


# ---- the pieces of k-means


@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 999))
def test_assign_finds_the_nearest(rows: int, k: int, seed: int) -> None:
    x, centroids = normal(rows, 5, seed), normal(k, 5, seed + 1)
    distance = torch.cdist(x.double(), centroids.double()).square()
    codes, score = assign(x, centroids)
    assert torch.equal(codes, distance.argmin(1))
    assert torch.allclose(x.square().sum(1) - 2 * score, distance.min(1).values.float(), atol=1e-4)
    used = torch.arange(k) % 2 == 0
    masked = distance.masked_fill(~used, torch.inf).argmin(1)
    assert torch.equal(assign(x, centroids, used).codes, masked)


def test_one_lloyd_step_by_hand_and_the_error_never_grows() -> None:
    x = torch.tensor([[0.0], [1.0], [10.0], [12.0]])
    assert lloyd(x, torch.tensor([[0.0], [11.0]]), 1, 0.0).flatten().tolist() == [0.5, 11.0]
    points, centroids = normal(500, 6), normal(12, 6, 1)
    errors = []
    for _ in range(6):
        _, score = assign(points, centroids)
        errors.append(float(points.square().sum() - 2 * score.sum()))
        centroids = lloyd(points, centroids, 1, 0.0)
    assert all(b <= a + 1e-3 for a, b in zip(errors, errors[1:], strict=False)) and errors[-1] < errors[0]


@given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 99))
def test_seeds_are_different_rows(different: int, k: int, seed: int) -> None:
    rows = normal(different, 3, seed).repeat(3, 1)
    seeds = plus_plus(rows, k, torch.Generator().manual_seed(seed))
    assert len(seeds) == min(k, different) == len(seeds.unique(dim=0))
    assert all(any(torch.equal(s, r) for r in rows) for s in seeds)


def test_relocation_lowers_a_bad_optimum() -> None:
    generator = torch.Generator().manual_seed(0)
    middles = torch.tensor([[0.0, 0.0], [10.0, 0.0], [20.0, 0.0], [30.0, 0.0]])
    x = middles[torch.arange(400) % 4] + 0.1 * torch.randn(400, 2, generator=generator)
    # Two centroids share one blob, one centroid holds two: Lloyd alone stays there.
    stuck = lloyd(x, torch.tensor([[-0.1, 0.0], [0.1, 0.0], [15.0, 0.0], [30.0, 0.0]]), 20, 0.0)
    moved = relocate(x, stuck, 4)
    assert moved.moved == 1
    healed = lloyd(x, moved.centroids, 20, 0.0)

    def error(centroids: Tensor) -> float:
        return float(x.square().sum() - 2 * assign(x, centroids).score.sum())

    assert error(healed) < 0.05 * error(stuck)
    assert relocate(x, healed, 4).moved == 0
    grown = relocate(x, x[:1], 4)
    assert len(grown.centroids) == 2, "free codes are placed by splits"


def test_sums_add_up_over_batches_and_shrink_thin_clusters_most() -> None:
    x, codes = normal(300, 4) + 1, torch.arange(300) % 290
    whole = cluster_sums(x, codes, 290)
    parts = ClusterSums.empty(290, 4, x.device)
    for a, b in zip(x.split(70), codes.split(70), strict=True):
        parts.add(a, b)
    assert torch.allclose(whole.total, parts.total) and torch.equal(whole.count, parts.count)
    means = whole.means().float()
    assert torch.equal(whole.centroids(0.0), means)
    factor = (whole.centroids(1.0) / means).mean(1)
    thick = whole.count > 1
    assert bool((factor < 1).all()) and float(factor[thick].min()) > float(factor[~thick].max())
    assert bool((whole.centroids(3.0) / means < whole.centroids(1.0) / means).all())


# ---- the quantizer


def test_each_level_is_fitted_on_what_the_earlier_ones_leave() -> None:
    x, _, _ = planted_tree(1500)
    three, two = fitted(x, cardinalities=(8, 8, 8)), fitted(x, cardinalities=(8, 8))
    for level in range(2):
        assert torch.equal(three.codebook(level), two.codebook(level)), (
            "greedy: deeper levels change nothing"
        )
    codes = three.encode(x)
    assert torch.equal(codes[:, :2], two.encode(x))
    residual = x - three.mean
    for level in range(3):
        distance = torch.cdist(residual, three.codebook(level))
        nearest = distance.min(1).values
        picked = distance.gather(1, codes[:, level : level + 1]).squeeze(1)
        assert torch.allclose(picked, nearest, atol=1e-5)
        residual = residual - three.codebook(level)[codes[:, level]]
    assert torch.allclose(three.decode(codes), x - residual, atol=1e-5)


def test_plain_means_are_the_means_of_their_clusters() -> None:
    x, _, _ = planted_tree(800)
    quantizer = fitted(x, cardinalities=(8,), shrinkage=0.0, tolerance=0.0, iterations=60)
    codes = quantizer.encode(x)[:, 0]
    for code in range(8):
        assert torch.allclose(
            quantizer.decode(torch.tensor([[code]]))[0], x[codes == code].mean(0), atol=1e-4
        )
    assert torch.equal(quantizer.counts(0), codes.bincount(minlength=8))


def test_the_planted_tree_is_found_and_a_beam_gains_with_the_tree_intact() -> None:
    x, _, _ = planted_tree(6000)
    held_out, topic, subtopic = planted_tree(2000, seed=1)
    quantizer = fitted(x, cardinalities=(32, 32, 32))
    greedy, beam = quantizer.encode(held_out), quantizer.encode(held_out, beam=8)
    for codes in (greedy, beam):
        assert purity(codes[:, :1], topic) > 0.97 and purity(codes[:, :2], subtopic) > 0.9
    assert fvu(quantizer, held_out, beam=8) < 0.997 * fvu(quantizer, held_out)
    report = measure_quality(quantizer, held_out)
    assert all(level.used == 32 for level in report.levels) and report.verdict.name == "healthy"


def test_error_is_near_that_of_faiss_at_equal_bits() -> None:
    faiss = pytest.importorskip("faiss")
    x, _, _ = planted_tree(4000)
    held_out, _, _ = planted_tree(1000, seed=1)
    theirs = faiss.ResidualQuantizer(32, 3, 6)
    theirs.max_beam_size = 1
    theirs.train(x.numpy())
    rebuilt = torch.from_numpy(theirs.decode(theirs.compute_codes(held_out.numpy())))
    their_fvu = float((held_out - rebuilt).square().sum() / (held_out - held_out.mean(0)).square().sum())
    assert fvu(fitted(x, cardinalities=(64, 64, 64)), held_out) < 1.01 * their_fvu


@given(st.integers(1, 6), st.integers(0, 99))
def test_a_beam_never_does_worse_and_a_full_one_is_optimal(beam: int, seed: int) -> None:
    x, books = normal(20, 4, seed), [normal(5, 4, seed + 1), normal(4, 4, seed + 2)]
    used = [torch.tensor([True, True, False, True, True]), torch.ones(4, dtype=torch.bool)]

    def error(codes: Tensor) -> Tensor:
        return (x - books[0][codes[:, 0]] - books[1][codes[:, 1]]).square().sum(1)

    greedy, found = walk_levels(x, books, used, 1), walk_levels(x, books, used, beam)
    best = walk_levels(x, books, used, 5)
    grid = torch.cartesian_prod(torch.tensor([0, 1, 3, 4]), torch.arange(4))
    exact = torch.stack([error(pair.expand(20, 2)) for pair in grid]).min(0).values
    assert torch.allclose(error(best), exact, atol=1e-4)
    assert bool((error(found) <= error(greedy) + 1e-4).all()) and not bool((found[:, 0] == 2).any())


# ---- streams


def test_streams_arrays_and_files_give_the_same_codebooks(tmp_path: Path) -> None:
    x, _, _ = planted_tree(900)
    np.save(tmp_path / "x.npy", x.numpy())
    whole = fitted(x, cardinalities=(8, 8))
    for data in (x.numpy(), tmp_path / "x.npy", lambda: iter(x.split(100))):
        other = ResidualKMeans(32, ResidualKMeansConfig(cardinalities=(8, 8)))
        report = other.fit(data)
        assert report.rows == 900 and other.fingerprint == whole.fingerprint
        assert torch.equal(other.encode(data), whole.encode(x))


def test_a_small_buffer_reads_the_stream_and_comes_close() -> None:
    x, _, _ = planted_tree(8000)
    held_out, _, _ = planted_tree(1500, seed=1)
    reads = 0

    def batches():
        nonlocal reads
        reads += 1
        return iter(x.split(500))

    config = ResidualKMeansConfig(cardinalities=(16, 16), buffer_rows=1000, passes=2)
    streamed = ResidualKMeans(32, config)
    report = streamed.fit(batches)
    # One pass for the sample, which begins with the look at the first batch, and two per level.
    assert report.rows == 8000 and reads == 1 + 2 * 2
    assert int(streamed.counts(0).sum()) == 8000, "the centroids are means over the stream"
    assert torch.allclose(streamed.mean, x.mean(0), atol=1e-5)
    assert fvu(streamed, held_out) < 1.03 * fvu(fitted(x, cardinalities=(16, 16)), held_out)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the resident size from /proc")
def test_memory_does_not_grow_with_the_stream() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    largest = 0

    def batches():
        nonlocal largest
        generator = torch.Generator().manual_seed(0)
        for _ in range(80):
            largest = max(largest, resident())
            yield torch.randn(4000, 64, generator=generator)

    config = ResidualKMeansConfig(cardinalities=(8, 8), buffer_rows=4000, iterations=4)
    ResidualKMeans(64, config).fit(lambda: iter([torch.randn(4000, 64)]))  # whatever a first fit allocates
    before = resident()
    quantizer = ResidualKMeans(64, config)
    assert quantizer.fit(batches).rows == 320_000
    assert largest - before < 40e6, "the stream itself is 82 MB"


def test_sorted_data_are_no_worse_than_shuffled_ones() -> None:
    """A start from the first batch would see one topic only."""
    x, topic, _ = planted_tree(6000)
    held_out, held_topic, _ = planted_tree(1500, seed=1)
    config = {"cardinalities": (32, 16), "buffer_rows": 1500}
    in_order = fitted(x[topic.argsort()], **config)
    assert fvu(in_order, held_out) < 1.05 * fvu(fitted(x, **config), held_out)
    assert purity(in_order.encode(held_out)[:, :1], held_topic) > 0.95


def test_the_fit_is_deterministic_and_round_trips(tmp_path: Path) -> None:
    x, _, _ = planted_tree(700)
    first, again = fitted(x, cardinalities=(8, 8)), fitted(x, cardinalities=(8, 8))
    assert first.fingerprint == again.fingerprint
    assert first.save(tmp_path / "q.safetensors") == first.fingerprint
    loaded = load_quantizer(tmp_path / "q.safetensors")
    assert isinstance(loaded, ResidualKMeans) and loaded.config == first.config
    assert loaded.fingerprint == first.fingerprint
    assert torch.equal(loaded.encode(x), first.encode(x))
    first.fit(x)
    assert first.fingerprint == again.fingerprint, "a second fit starts anew"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("cardinalities", (8, 6)),
        ("iterations", 1),
        ("tolerance", 0.5),
        ("buffer_rows", 300),
        ("points_per_code", 20),
        ("passes", 0),
        ("shrinkage", 0.0),
        ("seed", 1),
    ],
)
def test_every_field_changes_the_result(field: str, value: object) -> None:
    x, _, _ = planted_tree(800)
    base = ResidualKMeansConfig(cardinalities=(8, 8), points_per_code=60, passes=1)
    quantizers = [ResidualKMeans(32, c) for c in (base, dataclasses.replace(base, **{field: value}))]
    for quantizer in quantizers:
        quantizer.fit(x)
    assert not torch.equal(quantizers[0].codebook(1)[:6], quantizers[1].codebook(1)[:6])


# ---- too little to learn, and bad input


def test_fewer_items_than_codes() -> None:
    x = normal(5, 32)
    quantizer = fitted(x, cardinalities=(8, 8))
    codes = quantizer.encode(x)
    assert len(codes.unique(dim=0)) == 5 and torch.allclose(quantizer.decode(codes), x, atol=1e-5)
    used = [int((quantizer.counts(level) > 0).sum()) for level in range(2)]
    assert used == [5, 1]
    strangers = quantizer.encode(normal(200, 32, 1), beam=4)
    assert bool((quantizer.counts(0)[strangers[:, 0]] > 0).all()), "unused codes are never returned"


@pytest.mark.parametrize("beam", [1, 3])
def test_duplicates_only(beam: int) -> None:
    x = torch.full((50, 20), 0.3)
    report = (quantizer := ResidualKMeans(20, ResidualKMeansConfig(cardinalities=(4, 4)))).fit(x)
    assert report.fvu == (0.0, 0.0)
    assert quantizer.encode(x, beam=beam).unique(dim=0).tolist() == [[0, 0]]
    assert torch.allclose(quantizer.decode(quantizer.encode(x)), x)
    assert measure_quality(quantizer, x).fvu == 0.0


def test_few_different_rows_a_constant_dimension_and_one_dimension() -> None:
    few = fitted(normal(3, 40).repeat(30, 1), cardinalities=(16, 16))
    assert fvu(few, normal(3, 40)) < 1e-10
    x = normal(300, 6)
    x[:, 2] = 7.0
    constant = fitted(x, cardinalities=(8, 8))
    assert torch.allclose(constant.decode(constant.encode(x))[:, 2], torch.full((300,), 7.0), atol=1e-5)
    line = fitted(normal(400, 1), cardinalities=(16,))
    assert fvu(line, normal(400, 1)) < 0.02
    assert [int((line.counts(0) > 0).sum())] == [16]


def test_leading_axes_with_few_values_do_not_starve_the_codes() -> None:
    x = torch.zeros(400, 64)
    x[:, :16] = 10 * normal(4, 16).repeat(100, 1)
    x[:, 16:] = 0.1 * normal(400, 48, 1)
    assert int((fitted(x, cardinalities=(32,)).counts(0) > 0).sum()) == 32


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            lambda x: x.index_put((torch.tensor(3), torch.tensor(1)), torch.tensor(math.nan)),
            "row 3 holds a NaN",
        ),
        (
            lambda x: x.index_put((torch.tensor(4), torch.tensor(1)), torch.tensor(math.inf)),
            "row 4 holds a NaN",
        ),
        (lambda x: x[:, :7], "7 dimensions.*made for 8"),
        (lambda x: x.long(), "floating point"),
        (lambda x: x[0], "shape"),
    ],
)
def test_bad_embeddings_are_named_in_fit_and_encode(spoil, words: str) -> None:
    x = normal(50, 8)
    quantizer = fitted(x, cardinalities=(4,))
    with pytest.raises(SidError, match=words):
        quantizer.encode(spoil(x))
    with pytest.raises(SidError, match=words):
        ResidualKMeans(8, ResidualKMeansConfig(cardinalities=(4,))).fit(spoil(x))


def test_bad_calls_are_named(tmp_path: Path) -> None:
    x = normal(50, 8)
    quantizer = ResidualKMeans(8)
    for call in (
        lambda: quantizer.encode(x),
        lambda: quantizer.save(tmp_path / "q"),
        lambda: quantizer.decode(x),
    ):
        with pytest.raises(SidError, match="not fitted"):
            call()
    with pytest.raises(SidError, match="not empty"):
        quantizer.fit(x[:0])
    quantizer = fitted(x, cardinalities=(4, 4))
    assert quantizer.encode(x[:0]).shape == (0, 2)
    with pytest.raises(SidError, match="beam 0"):
        quantizer.encode(x, beam=0)
    with pytest.raises(SidError, match="1 to 2 levels"):
        quantizer.decode(torch.zeros(3, 3, dtype=torch.int64))
    with pytest.raises(SidError, match="code 4 at row 0, level 1"):
        quantizer.decode(torch.full((3, 1), 4))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("cardinalities", ()),
        ("iterations", 0),
        ("tolerance", -1.0),
        ("tolerance", math.nan),
        ("buffer_rows", 0),
        ("points_per_code", 0),
        ("passes", -1),
        ("shrinkage", -0.5),
    ],
)
def test_bad_configuration_is_named(field: str, value: object) -> None:
    with pytest.raises(SidError):
        ResidualKMeansConfig(**{field: value})  # type: ignore[arg-type]


def test_fit_centroids_uses_every_point_in_the_last_dimension() -> None:
    x = torch.cat([normal(100, 20), 50 + normal(100, 20, 1)])[torch.randperm(200)]
    centroids = fit_centroids(x, 2, iterations=5, tolerance=0.0, generator=torch.Generator().manual_seed(0))
    halves = sorted(float(c.mean()) for c in centroids)
    assert halves[0] == pytest.approx(float(x[x.mean(1) < 25].mean()), abs=1e-4)
    assert halves[1] == pytest.approx(float(x[x.mean(1) > 25].mean()), abs=1e-3)
