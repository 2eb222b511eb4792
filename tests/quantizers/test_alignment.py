"""Codes of a refitted quantizer under the names that they had."""

from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrec_sid.data.planted import SyntheticConfig, World
from torchrec_sid.data.synthetic import write_synthetic
from torchrec_sid.errors import SidError
from torchrec_sid.quantizers import (
    CategorySource,
    DiscretePca,
    DiscretePcaConfig,
    EmbeddingSource,
    ResidualKMeans,
    ResidualKMeansConfig,
    RqVae,
    RqVaeConfig,
    VqFusion,
    VqFusionConfig,
    align_codes,
    changed_shares,
)
from torchrec_sid.quantizers.renaming import Renaming
from torchrec_sid.spec import SidSpec

LABELS = torch.arange(600) % 4
X = torch.randn(600, 12, generator=torch.Generator().manual_seed(0)) + 3 * torch.eye(12)[LABELS]


def kmeans(seed=0):
    quantizer = ResidualKMeans(12, ResidualKMeansConfig(cardinalities=(8, 4), seed=seed))
    quantizer.fit(X)
    return quantizer, X


def dpca(seed=0):
    quantizer = DiscretePca(12, DiscretePcaConfig(stages=((4, 3), (2, 5)), codebooks=(4,), seed=seed))
    quantizer.fit(X)
    return quantizer, X


def rq_vae(seed=0):
    config = RqVaeConfig(cardinalities=(8, 4), epochs=1, batch_size=128, hidden=(16,), seed=seed)
    quantizer = RqVae(12, config)
    quantizer.fit(X)
    return quantizer, X


def fusion(seed=0):
    config = VqFusionConfig(codebooks=(8,), stages=((4, 3),), epochs=1, batch_size=128, seed=seed)
    quantizer = VqFusion({"text": EmbeddingSource(12), "kind": CategorySource(4)}, config)
    data = {"text": X, "kind": LABELS}
    quantizer.fit(data)
    return quantizer, data


KINDS = {"residual_kmeans": kmeans, "discrete_pca": dpca, "rq_vae": rq_vae, "vq_fusion": fusion}


def random_renaming(quantizer, seed):
    """Any renaming that the quantizer allows."""
    draw = torch.Generator().manual_seed(seed)
    names = Renaming.none(quantizer.spec)
    levels, codes = list(names.levels), list(names.codes)
    for group in quantizer.code_groups:
        width = group.stop - group.start
        if group.digits:
            order = torch.randperm(width, generator=draw).tolist()
            levels[group.start : group.stop] = [group.start + i for i in order]
            for level in range(group.start, group.stop):
                if torch.rand(1, generator=draw) < 0.5:
                    codes[level] = codes[level].flip(0)
        else:
            codes[group.start] = torch.randperm(quantizer.spec.cardinalities[group.start], generator=draw)
    return Renaming(tuple(levels), tuple(codes))


@pytest.mark.parametrize("kind", KINDS)
def test_names_are_all_that_a_renaming_changes_and_alignment_finds_them_again(kind, tmp_path):
    quantizer, data = KINDS[kind]()
    codes = quantizer.encode(data)
    decoded, decoder = quantizer.decode(codes), quantizer.additive_decoder()
    for seed in range(3):
        renaming = random_renaming(quantizer, seed)
        quantizer.rename_codes(renaming)
        named = quantizer.encode(data)
        assert torch.equal(named, renaming.apply(codes))
        assert (named != codes).any()
        torch.testing.assert_close(quantizer.decode(named), decoded)
        # What SIDE computes with is renamed along.
        assert len(quantizer.additive_decoder().tables) == len(decoder.tables)
        done = align_codes(quantizer, codes, named)
        assert torch.equal(done.renaming.apply(named), codes)
        assert done.aligned.traffic == (0.0,) * quantizer.spec.levels
        assert done.unaligned.traffic[-1] > 0.5
        assert torch.equal(quantizer.encode(data), codes)
    quantizer.save(tmp_path / "q.safetensors")
    assert torch.equal(type(quantizer).load(tmp_path / "q.safetensors").encode(data), codes)


def test_aligning_a_quantizer_to_itself_changes_nothing():
    quantizer, data = kmeans()
    before, codes = quantizer.fingerprint, quantizer.encode(data)
    done = align_codes(quantizer, codes[:5], codes[:5])
    assert quantizer.fingerprint == before  # codes without an item keep their names too
    assert done.renaming.levels == (0, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_fit_is_aligned_and_new_items_follow(kind):
    quantizer, data = KINDS[kind](0)
    old = quantizer.encode(data)
    again, _ = KINDS[kind](1)
    new = again.encode(data)
    vectors = again.decode(new)
    done = align_codes(again, old, new)
    aligned = again.encode(data)
    assert torch.equal(aligned, done.renaming.apply(new))
    torch.testing.assert_close(again.decode(aligned), vectors)
    assert done.aligned == changed_shares(old, aligned)
    assert done.unaligned == changed_shares(old, new)
    # Of every permutation of the first codes none keeps more.
    assert done.aligned.traffic[0] <= done.unaligned.traffic[0]


def test_matching_is_the_best_by_traffic_under_matched_parents():
    quantizer = ResidualKMeans(2, ResidualKMeansConfig(cardinalities=(2, 2)))
    quantizer.fitted.fill_(True)
    # By items the first codes agree as they are; by traffic they are exchanged.
    old = torch.tensor([[0, 0], [0, 0], [1, 1], [0, 1]])
    new = torch.tensor([[0, 1], [0, 1], [1, 0], [1, 1]])
    done = align_codes(quantizer, old, new, torch.tensor([1.0, 1.0, 1.0, 9.0]))
    assert done.renaming.codes[0].tolist() == [1, 0]
    # Under the matched parents only the last item is left, and it keeps its second code, though three
    # items under other parents would have it changed.
    assert done.renaming.codes[1].tolist() == [0, 1]
    assert done.aligned.traffic == (pytest.approx(3 / 12), pytest.approx(3 / 12))
    assert done.aligned.items == (0.75, 0.75)
    by_items = align_codes(quantizer, old, new)
    assert by_items.renaming.codes[0].tolist() == [0, 1]
    assert by_items.renaming.codes[1].tolist() == [1, 0]
    assert "75.0% of traffic keeps its first code" in by_items.describe()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 5))
def test_no_permutation_keeps_more_traffic_at_the_first_level(seed, k):
    draw = torch.Generator().manual_seed(seed)
    old, new = (torch.randint(0, k, (30, 1), generator=draw) for _ in range(2))
    traffic = torch.rand(30, generator=draw, dtype=torch.float64)
    quantizer = ResidualKMeans(2, ResidualKMeansConfig(cardinalities=(k,)))
    quantizer.fitted.fill_(True)
    kept = 1 - align_codes(quantizer, old, new, traffic).aligned.traffic[0]
    best = max(
        float(traffic[torch.tensor(order)[new[:, 0]] == old[:, 0]].sum() / traffic.sum())
        for order in permutations(range(k))
    )
    assert kept == pytest.approx(best)


def test_what_cannot_be_aligned_is_refused():
    quantizer, data = kmeans()
    codes = quantizer.encode(data)
    with pytest.raises(SidError, match="1 numbers|600 numbers"):
        align_codes(quantizer, codes, codes, torch.ones(3))
    with pytest.raises(SidError, match="traffic"):
        align_codes(quantizer, codes, codes, -torch.ones(600))
    with pytest.raises(SidError, match="both"):
        align_codes(quantizer, codes[:, :1], codes)
    with pytest.raises(SidError, match="align_codes"):
        quantizer.rename_codes(Renaming((0, 1), (torch.zeros(8, dtype=torch.int64), torch.arange(4))))
    with pytest.raises(SidError, match="not fitted"):
        ResidualKMeans(12).rename_codes(Renaming.none(SidSpec((64, 64, 64, 64))))
    other = ResidualKMeans(12, ResidualKMeansConfig(cardinalities=(4, 4)))
    with pytest.raises(SidError, match="start from none"):
        other.fit(X, start=quantizer)


def test_a_fit_that_starts_at_another_keeps_its_clusters():
    first, _ = kmeans(0)
    again = ResidualKMeans(12, ResidualKMeansConfig(cardinalities=(8, 4), seed=9))
    report = again.fit(X, start=first)
    assert report.fvu[-1] <= 1.02 * first.fit(X).fvu[-1]
    assert changed_shares(first.encode(X), again.encode(X)).items[0] < 0.1


@pytest.mark.parametrize(("codes", "warm"), [(16, False), (64, True)])
def test_four_fifths_of_the_traffic_of_a_log_that_grew_keep_their_first_code(tmp_path, codes, warm):
    config = SyntheticConfig(items=5_000, events=2_000)
    write_synthetic(tmp_path, config)
    x = torch.from_numpy(np.load(tmp_path / "item_emb.npy").astype(np.float32))
    traffic = torch.from_numpy(World(config).popularity(np.arange(5_000)))
    shape = ResidualKMeansConfig(cardinalities=(codes, codes))
    before, after = ResidualKMeans(64, shape), ResidualKMeans(64, shape)
    before.fit(x[:3800])
    # A quarter of the items is new, a quarter of the old ones is gone.
    after.fit(x[1000:], start=before if warm else None)
    done = align_codes(after, before.encode(x[:3800]), after.encode(x[:3800]), traffic[:3800])
    assert 1 - done.aligned.traffic[0] >= 0.8
    assert warm or 1 - done.unaligned.traffic[0] < 3 / codes


def test_traffic_under_other_parents_does_not_decide_where_matched_ones_speak():
    quantizer = ResidualKMeans(2, ResidualKMeansConfig(cardinalities=(3, 2)))
    quantizer.fitted.fill_(True)
    old = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1], [2, 0], [2, 1]])
    new = torch.tensor([[0, 0], [0, 1], [0, 1], [0, 0], [0, 1], [0, 0]])
    # Over all parents 6 of 10 would have the second codes exchanged; the matched parent would not.
    done = align_codes(quantizer, old, new, torch.tensor([2.0, 2.0, 1.5, 1.5, 1.5, 1.5]))
    assert done.renaming.codes[0][0] == 0
    assert done.renaming.codes[1].tolist() == [0, 1]
