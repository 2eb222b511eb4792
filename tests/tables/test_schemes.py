"""Schemes: ranges, rows, exactness, and refusal of configurations that make no sense."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.tables.reference import hashed, splitmix, tables_of
from tests.tables.strategies import cardinalities, schemes
from torchrec_sid.errors import SidError
from torchrec_sid.hashing import hash_rows_, splitmix64
from torchrec_sid.spec import SidSpec
from torchrec_sid.tables import HashedId, HashedPrefix, NGramGroups, PerLevel
from torchrec_sid.tables.indexers import IdIndexer, LevelIndexer


def rows_of(scheme, spec, codes):
    """Rows ``[n, P]`` of each slot."""
    packed = spec.pack(torch.tensor(codes))
    return [
        LevelIndexer(slot, spec)(packed, packed, None).rows.view(len(codes), -1)
        for slot in scheme.slots(spec)
    ]


@given(st.data())
def test_rows_equal_the_dictionary_reference(data):
    sizes = data.draw(cardinalities)
    scheme = data.draw(schemes(len(sizes)))
    codes = data.draw(st.lists(st.tuples(*[st.integers(0, k - 1) for k in sizes]), min_size=1, max_size=6))
    spec = SidSpec(sizes)
    expected = tables_of(scheme, sizes)
    assert [slot.rows for slot in scheme.slots(spec)] == [table.rows for table in expected]
    for got, table in zip(rows_of(scheme, spec, codes), expected, strict=True):
        assert got.tolist() == [table.of(c) for c in codes]


@given(st.data())
def test_every_row_is_within_the_table(data):
    sizes = data.draw(cardinalities)
    scheme = data.draw(schemes(len(sizes)))
    spec = SidSpec(sizes)
    everything = torch.cartesian_prod(*[torch.arange(k) for k in sizes]).view(-1, len(sizes))
    for slot, rows in zip(scheme.slots(spec), rows_of(scheme, spec, everything.tolist()), strict=True):
        assert int(rows.min()) >= 0
        assert int(rows.max()) < slot.rows - 1, "the last row belongs to the unknown item"


@given(st.integers(2, 5), st.integers(1, 4))
def test_prefix_rows_are_the_published_enumeration(k, depth):
    spec = SidSpec((k,) * depth)
    codes = torch.randint(0, k, (5, depth)).tolist()
    (rows,) = rows_of(HashedPrefix(depth), spec, codes)
    for item, row in zip(codes, rows.tolist(), strict=True):
        for i in range(1, depth + 1):
            assert row[i - 1] == sum(k ** (i - t) * (item[t - 1] + 1) for t in range(1, i + 1)) - 1


def test_the_enumeration_never_collides_and_fills_the_table():
    spec = SidSpec((4, 3, 5))
    everything = torch.cartesian_prod(torch.arange(4), torch.arange(3), torch.arange(5)).tolist()
    (rows,) = rows_of(HashedPrefix(3), spec, everything)
    assert rows.unique().tolist() == list(range(4 + 12 + 60))


def test_coarse_prefixes_keep_their_rows_when_deep_ones_are_hashed():
    spec = SidSpec((16, 16, 16))
    (slot,) = HashedPrefix(3, num_embeddings=1000).slots(spec)
    assert [c.exact for c in slot.columns] == [True, True, False]
    assert slot.exact_rows == 16 + 256
    codes = torch.randint(0, 16, (500, 3)).tolist()
    (rows,) = rows_of(HashedPrefix(3, num_embeddings=1000), spec, codes)
    assert int(rows[:, 2].min()) >= 272


def test_rows_are_not_more_than_needed_nor_than_allowed():
    spec = SidSpec((4, 4))
    assert HashedPrefix(2, num_embeddings=1000).slots(spec)[0].rows == 21
    assert HashedPrefix(2, num_embeddings=12).slots(spec)[0].rows == 12
    sizes = [slot.rows for slot in HashedPrefix(2, num_embeddings=12, separate=True).slots(spec)]
    assert sizes == [5, 12]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (HashedPrefix(2), HashedPrefix(3)),
        (HashedPrefix(3, 40), HashedPrefix(3, 50)),
        (HashedPrefix(3, 40), HashedPrefix(3, 40, seed=1)),
        (PerLevel(), PerLevel(depth=2)),
        (NGramGroups(2), NGramGroups(3)),
        (NGramGroups(2), NGramGroups(2, stride=1)),
        (NGramGroups(2), NGramGroups(2, depth=2)),
        (NGramGroups(2, num_embeddings=20), NGramGroups(2, num_embeddings=30)),
        (NGramGroups(2, num_embeddings=20), NGramGroups(2, num_embeddings=20, seed=1)),
    ],
)
def test_every_field_changes_the_rows(one, other):
    spec = SidSpec((4, 4, 4, 4))
    codes = torch.randint(0, 4, (64, 4), generator=torch.Generator().manual_seed(0)).tolist()
    assert rows_of(one, spec, codes)[0].tolist() != rows_of(other, spec, codes)[0].tolist()


@pytest.mark.parametrize("scheme", [HashedPrefix(3), PerLevel(), NGramGroups(2)])
def test_separate_makes_one_table_per_column(scheme):
    spec = SidSpec((4, 4, 4))
    apart = type(scheme)(**{**vars(scheme), "separate": True})
    (together,) = scheme.slots(spec)
    assert len(apart.slots(spec)) == len(together.columns) > 1


def test_hash_equals_python_integers():
    keys = torch.cat([torch.arange(100), torch.randint(-(2**63), 2**63 - 1, (100,))])
    for seed in (0, 1, 2**40):
        assert splitmix64(seed) % 2**64 == splitmix(seed)
        for rows in (1, 7, 2**31 - 1):
            expected = [hashed(int(k), splitmix64(seed), rows) for k in keys]
            assert hash_rows_(keys.clone(), splitmix64(seed), rows).tolist() == expected


@pytest.mark.parametrize("keys", [torch.arange(200_000), torch.arange(200_000) << 40])
def test_hash_spreads_structured_keys_like_random_ones(keys):
    rows = 1000
    load = torch.bincount(hash_rows_(keys.clone(), splitmix64(3), rows), minlength=rows).double()
    # A random assignment has variance = mean = 200; five standard errors of the variance are 45.
    assert 155 < float(load.var()) < 245


def test_hashed_id_uses_rows_seed_and_value():
    spec = SidSpec((4, 4))
    ids = torch.tensor([0, 1, 2**62, -7, 2**63 - 1])

    def rows(scheme, unknown=None):
        (slot,) = scheme.slots(spec)
        return IdIndexer(slot, raw_ids=unknown is None)(ids, ids, unknown).rows

    expected = [hashed(int(i), splitmix(5), 99) for i in ids]
    assert rows(HashedId(100, seed=5)).tolist() == expected
    assert rows(HashedId(100, seed=6)).tolist() != expected
    assert rows(HashedId(50, seed=5)).tolist() != expected
    unknown = torch.tensor([False, True, False, False, False])
    assert rows(HashedId(100, seed=5), unknown)[1] == 99


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: HashedPrefix(0), "depth=0"),
        (lambda: HashedPrefix(2, num_embeddings=1), "num_embeddings=1"),
        (lambda: HashedPrefix(2, num_embeddings=2**31), "num_embeddings=2147483648"),
        (lambda: HashedPrefix(5).slots(SidSpec((4, 4))), "depth 5"),
        (lambda: PerLevel(depth=3).slots(SidSpec((4, 4))), "depth 3"),
        (lambda: PerLevel(depth=0), "depth=0"),
        (lambda: NGramGroups(0), "n=0"),
        (lambda: NGramGroups(2, stride=0), "stride=0"),
        (lambda: NGramGroups(2, stride=3), "stride=3"),
        (lambda: NGramGroups(2, depth=0), "depth=0"),
        (lambda: NGramGroups(4).slots(SidSpec((2048,) * 4)), "17592186044417 rows"),
        (lambda: HashedId(0), "num_embeddings=0"),
    ],
)
def test_senseless_configurations_are_refused(make, names):
    with pytest.raises(SidError, match=names):
        make()
