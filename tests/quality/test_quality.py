"""The diagnostics against brute force, and the verdict on SIDs whose fault is known."""

import json
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from torchrec_sid.errors import SidError
from torchrec_sid.quality import SharingMeter, measure_quality
from torchrec_sid.quality.keyed_sums import CountTable, VectorTable, mix, prefix_keys
from torchrec_sid.quality.sharing import default_depths
from torchrec_sid.quantizers import ResidualKMeans, ResidualKMeansConfig
from torchrec_sid.spec import SidSpec


def tree(rows: int = 2000, dim: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Points in 6 topics of 4 subtopics, with noise; and the topic of each."""
    generator = torch.Generator().manual_seed(seed)
    fixed = torch.Generator().manual_seed(99)
    topics, subtopics = torch.randn(6, dim, generator=fixed), torch.randn(6, 4, dim, generator=fixed)
    topic = torch.randint(6, (rows,), generator=generator)
    subtopic = torch.randint(4, (rows,), generator=generator)
    noise = torch.randn(rows, dim, generator=generator)
    return 3 * topics[topic] + subtopics[topic, subtopic] + 0.3 * noise, topic


def fitted(x: Tensor, cardinalities: tuple[int, ...] = (6, 4, 4)) -> ResidualKMeans:
    quantizer = ResidualKMeans(x.shape[1], ResidualKMeansConfig(cardinalities=cardinalities))
    quantizer.fit(x)
    return quantizer


@given(st.integers(2, 40), st.integers(1, 7), st.integers(0, 1000))
def test_sharing_equals_brute_force_whatever_the_batches(rows: int, batch: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    spec = SidSpec((3, 2))
    codes = torch.stack([torch.randint(k, (rows,), generator=generator) for k in spec.cardinalities], 1)
    x = torch.randn(rows, 4, generator=generator)
    label = torch.randint(3, (rows,), generator=generator)
    meter = SharingMeter(spec, 4, labels=("topic",))
    for c, v, t in zip(codes.split(batch), x.split(batch), label.split(batch), strict=True):
        meter.add(c, v, {"topic": t})
    unit = x / x.norm(dim=1, keepdim=True)
    pairs = list(combinations(range(rows), 2))
    for prefix in meter.prefixes():
        key = [tuple(c) for c in codes[:, : prefix.depth].tolist()]
        inside = [float(unit[i] @ unit[j]) for i, j in pairs if key[i] == key[j]]
        groups = {k: [i for i in range(rows) if key[i] == k] for k in set(key)}
        assert prefix.groups == len(groups) and prefix.items_per_prefix == rows / len(groups)
        assert prefix.mates == pytest.approx(2 * len(inside) / rows)
        if inside:
            assert (
                prefix.cosine == pytest.approx(sum(inside) / len(inside), abs=1e-5) and prefix.cosine_exact
            )
        else:
            assert prefix.cosine is None
        commonest = [int(label[members].bincount().max()) for members in groups.values()]
        assert prefix.purity["topic"] == pytest.approx(sum(commonest) / rows)
    mean = sum(float(unit[i] @ unit[j]) for i, j in pairs) / len(pairs)
    assert meter.random_cosine() == pytest.approx(mean, abs=1e-5)
    sids = [tuple(c) for c in codes.tolist()]
    assert meter.unique() == len(set(sids))
    assert meter.collision_rate() == pytest.approx(sum(sids.count(s) > 1 for s in sids) / rows)
    share = codes[:, 0].bincount(minlength=3).double() / rows
    assert meter.perplexity(1) == pytest.approx(float(torch.special.entr(share).sum().exp()))
    assert meter.used(1) == int((share > 0).sum())


def test_errors_match_the_definition() -> None:
    x, _ = tree()
    held_out, _ = tree(500, seed=1)
    quantizer = fitted(x)
    report = measure_quality(quantizer, held_out)
    variance = (held_out - held_out.mean(0)).square().sum()
    codes = quantizer.encode(held_out)
    for level in report.levels:
        left = held_out - quantizer.decode(codes[:, : level.level])
        assert level.fvu == pytest.approx(float(left.square().sum() / variance), rel=1e-4)
    assert report.fvu == report.levels[-1].fvu and (report.held_out, report.items) == (500, 500)
    assert measure_quality(quantizer, held_out).to_dict() == report.to_dict()
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["verdict"]["name"] == "healthy"


def test_items_labels_depths_and_beam_change_what_is_measured() -> None:
    x, topic = tree()
    held_out, _ = tree(500, seed=1)
    quantizer = fitted(x)
    alone, with_items = (
        measure_quality(quantizer, held_out),
        measure_quality(quantizer, held_out, items=x, labels={"topic": topic}),
    )
    assert with_items.items == 2000 and with_items.fvu == alone.fvu
    assert with_items.prefixes[0].purity["topic"] > 0.99 > 0.3 > 1 / 6
    assert [p.depth for p in measure_quality(quantizer, held_out, depths=(1,)).prefixes] == [1, 3]
    assert measure_quality(quantizer, held_out, beam=8).fvu < alone.fvu


def test_a_sample_of_groups_is_fair_and_bounded() -> None:
    generator = torch.Generator().manual_seed(0)
    spec = SidSpec((8192, 2))
    codes = torch.stack([torch.randint(k, (40_000,), generator=generator) for k in spec.cardinalities], 1)
    # Groups with odd codes are tight, groups with even codes are loose: the sample must hold both fairly.
    x = torch.randn(8192, 16, generator=generator)[codes[:, 0]]
    x += (2.0 - 1.5 * (codes[:, :1] % 2)) * torch.randn(40_000, 16, generator=generator)
    exact, sampled = SharingMeter(spec, 16), SharingMeter(spec, 16, max_groups=2048)
    for meter in (exact, sampled):
        for c, v in zip(codes.split(1000), x.split(1000), strict=True):
            meter.add(c, v)
    for a, b in zip(exact.prefixes(), sampled.prefixes(), strict=True):
        assert a.cosine_exact and not b.cosine_exact
        assert b.cosine == pytest.approx(a.cosine, abs=0.04) and (a.groups, a.mates) == (b.groups, b.mates)
    assert all(len(depth.vectors.sums) <= 2048 for depth in sampled._depths.values())


@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=50), st.integers(1, 9))
def test_count_table_equals_a_dictionary(keys: list[int], batch: int) -> None:
    table = CountTable()
    for part in torch.tensor(keys, dtype=torch.int64).split(batch):
        table.add(part)
    assert dict(zip(table.keys.tolist(), table.counts.tolist(), strict=True)) == {
        k: keys.count(k) for k in set(keys)
    }


@given(st.lists(st.tuples(st.integers(-50, 50), st.floats(-9, 9)), max_size=60), st.integers(1, 9))
def test_vector_table_keeps_whole_keys(pairs: list[tuple[int, float]], batch: int) -> None:
    table = VectorTable(1, limit=10)
    keys = torch.tensor([k for k, _ in pairs], dtype=torch.int64)
    values = torch.tensor([[v] for _, v in pairs], dtype=torch.float32).view(-1, 1)
    for k, v in zip(keys.split(batch), values.split(batch), strict=True):
        table.add(k, v)
    assert len(table._keys) <= 10
    for key, slot in zip(table._keys.tolist(), table._slots.tolist(), strict=True):
        mine = keys == key
        assert int(table.counts[slot]) == int(mine.sum())
        assert float(table.sums[slot]) == pytest.approx(float(values[mine].sum()), abs=1e-3)


def test_the_hash_is_a_bijection_that_spreads_and_long_prefixes_have_keys() -> None:
    keys = torch.arange(-5000, 5000)
    hashed = mix(keys)
    assert len(hashed.unique()) == 10_000
    assert all(abs(float(((hashed >> bit) & 1).float().mean()) - 0.5) < 0.03 for bit in range(64))
    spec = SidSpec((3,) * 50)
    codes = torch.randint(3, (3000, 50), generator=torch.Generator().manual_seed(0))
    codes = torch.cat([codes, codes])
    assert len(prefix_keys(spec, codes, 50).unique()) == 3000
    assert default_depths(50)[0] == 1 and default_depths(50)[-1] == 50 and len(default_depths(50)) <= 8
    assert default_depths(4) == (1, 2, 3, 4)


def test_verdicts() -> None:
    x, _ = tree(4000)
    assert measure_quality(fitted(x), x).verdict.name == "healthy"
    assert measure_quality(fitted(x, (2,)), x).verdict.name == "too coarse"
    unique = measure_quality(fitted(x, (64, 256)), x)
    assert unique.verdict.name == "nearly unique" and "Only level 1 groups" in unique.verdict.text
    outliers = torch.cat(
        [torch.zeros(4000, 12), 100 * torch.randn(40, 12, generator=torch.Generator().manual_seed(0))]
    )
    collapsed = measure_quality(fitted(outliers, (32, 2)), outliers)
    assert collapsed.verdict.name == "collapsed" and "Level 1 uses" in collapsed.verdict.text


def test_defined_on_the_edge() -> None:
    x, _ = tree(100)
    quantizer = fitted(x)
    constant = measure_quality(quantizer, x[:1].repeat(5, 1))
    assert constant.fvu == 0.0 and constant.prefixes[0].cosine == pytest.approx(1.0)
    single = measure_quality(quantizer, x[:1])
    assert (
        single.random_cosine == 0.0 and single.prefixes[0].cosine is None and single.collision_rate == 0.0
    )
    zeros = measure_quality(quantizer, torch.zeros(3, 12))
    assert zeros.prefixes[0].cosine is not None and abs(zeros.prefixes[0].cosine) <= 1


def test_bad_input_is_named() -> None:
    x, topic = tree(100)
    quantizer = fitted(x)
    with pytest.raises(SidError, match="not fitted"):
        measure_quality(ResidualKMeans(12), x)
    with pytest.raises(SidError, match=r"labels\['topic'\]"):
        measure_quality(quantizer, x, labels={"topic": topic[:50]})
    with pytest.raises(SidError, match=r"labels\['topic'\]"):
        measure_quality(quantizer, x[:50], labels={"topic": topic})
    with pytest.raises(SidError, match="depths"):
        measure_quality(quantizer, x, depths=(4,))
    with pytest.raises(SidError, match="held_out: row 3 holds a NaN"):
        measure_quality(quantizer, torch.where(torch.arange(100)[:, None] == 3, torch.nan, x))
