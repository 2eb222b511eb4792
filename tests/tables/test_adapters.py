"""Codes in other forms, and raw ids with a catalog, give what packed SIDs give."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchrec import KeyedJaggedTensor

from tests.tables.strategies import cardinalities
from torchrec_sid.errors import SidError
from torchrec_sid.spec import SidSpec
from torchrec_sid.tables import UNKNOWN, CatalogLookup, CatalogMap, PackFeatures, PackValues

SPEC = SidSpec((4, 5))


class TableCatalog:
    """The two calls of a SidCatalog that the map uses, over a dictionary."""

    def __init__(self, spec, sids, fingerprint="f" * 64):
        self.spec, self.fingerprint, self._sids = spec, fingerprint, dict(sorted(sids.items()))

    def item_ids(self):
        return torch.tensor(list(self._sids), dtype=torch.int64)

    def lookup(self, item_ids, unknown=None):
        return torch.tensor([self._sids.get(int(i), unknown) for i in item_ids], dtype=torch.int64)


def kjt(features, weights=None):
    values = torch.tensor([v for bags in features.values() for bag in bags for v in bag])
    lengths = torch.tensor([len(bag) for bags in features.values() for bag in bags])
    return KeyedJaggedTensor.from_lengths_sync(list(features), values, lengths, weights)


@given(st.data())
def test_codes_as_features_or_as_values_equal_packed(data):
    sizes = data.draw(cardinalities)
    spec = SidSpec(sizes)
    item = st.tuples(*[st.integers(0, k - 1) for k in sizes])
    bags = data.draw(st.lists(st.lists(item, max_size=3), min_size=2, max_size=2))
    codes = torch.tensor([i for bag in bags for i in bag], dtype=torch.int64).view(-1, len(sizes))
    lengths = torch.tensor([len(bag) for bag in bags])
    user, names = torch.tensor([7, 8]), [f"level_{i}" for i in range(len(sizes))]
    as_features = KeyedJaggedTensor.from_lengths_sync(
        keys=[names[0], "user", *names[1:]],
        values=torch.cat([codes[:, 0], user, codes[:, 1:].t().reshape(-1)]),
        lengths=torch.cat([lengths, torch.ones(2, dtype=torch.int64), lengths.repeat(len(sizes) - 1)]),
    )
    as_values = KeyedJaggedTensor.from_lengths_sync(
        keys=["item", "user"],
        values=torch.cat([codes.reshape(-1), user]),
        lengths=torch.cat([lengths * len(sizes), torch.ones(2, dtype=torch.int64)]),
    )
    for out in (PackFeatures({"item": names}, spec)(as_features), PackValues(["item"], spec)(as_values)):
        assert out.keys() == ["item", "user"]
        assert out["item"].values().tolist() == spec.pack(codes).tolist()
        assert out["item"].lengths().tolist() == lengths.tolist()
        assert out["user"].values().tolist() == [7, 8]
        assert out.values().is_contiguous()


def test_pack_features_keeps_weights_and_inverse_indices():
    batch = KeyedJaggedTensor(
        keys=["a", "b", "user"],
        values=torch.tensor([1, 2, 3, 4, 9]),
        weights=torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5]),
        lengths=torch.tensor([1, 1, 1, 1, 1]),
        stride_per_key_per_rank=[[2], [2], [1]],
        inverse_indices=(["a", "b", "user"], torch.tensor([[0, 1], [0, 1], [0, 0]])),
    )
    out = PackFeatures({"item": ["a", "b"]}, SPEC)(batch)
    assert out.weights().tolist() == pytest.approx([0.1, 0.2, 0.5])
    assert out.stride_per_key() == [2, 1]
    names, table = out.inverse_indices()
    assert (names, table.tolist()) == (["item", "user"], [[0, 1], [0, 0]])


@pytest.mark.parametrize(
    ("run", "says"),
    [
        (lambda: PackFeatures({"item": ["a"]}, SPEC), "'item'.*1 level features"),
        (lambda: PackFeatures({"item": ["a", "b"]}, SPEC)(kjt({"a": [[1]]})), "'b'"),
        (
            lambda: PackFeatures({"item": ["a", "b"]}, SPEC)(kjt({"a": [[1]], "b": [[5]]})),
            "'b'.*code 5.*0..4",
        ),
        (
            lambda: PackFeatures({"item": ["a", "b"]}, SPEC)(kjt({"a": [[1]], "b": [[1, 2]]})),
            "'b'.*lengths",
        ),
        (lambda: PackValues(["item"], SPEC)(kjt({"item": [[1, 2], [3]]})), "example 1 has 1 codes"),
        (
            lambda: PackValues(["item"], SPEC)(kjt({"item": [[1, -2]]})),
            "'item'.*code -2 of item 0 at level 2",
        ),
        (lambda: PackValues(["item"], SPEC)(kjt({"item": [[1, 2]]}, torch.ones(2))), "weighted"),
        (lambda: PackValues(["items"], SPEC)(kjt({"item": [[1, 2]]})), "'items'.*keys are \\['item'\\]"),
    ],
)
def test_bad_codes_are_named(run, says):
    with pytest.raises(SidError, match=says):
        run()


@given(st.dictionaries(st.integers(-50, 2**62), st.integers(0, 31), max_size=30), st.data())
def test_catalog_map_equals_a_dictionary(sids, data):
    spec = SidSpec((4, 8))
    known = st.sampled_from(sorted(sids)) if sids else st.nothing()
    asked = data.draw(st.lists(known | st.integers(-(2**63), 2**63 - 1), max_size=20))
    lookup = CatalogMap(TableCatalog(spec, sids))
    for times in (1, 2):
        got = lookup(torch.tensor(asked, dtype=torch.int64)).tolist()
        assert got == [sids.get(i, UNKNOWN) for i in asked]
        assert int(lookup.unknown_count) == times * sum(i not in sids for i in asked)


@pytest.mark.parametrize("step", [1, 3, 100])
def test_catalog_map_of_dense_and_sparse_ids(step):
    sids = {10 + step * i: i % 32 for i in range(500)}
    lookup = CatalogMap(TableCatalog(SidSpec((4, 8)), sids))
    asked = torch.arange(-5, 600 * step)
    assert lookup(asked).tolist() == [sids.get(int(i), UNKNOWN) for i in asked]


def test_catalog_lookup_replaces_named_features_only():
    lookup = CatalogLookup(["item"], TableCatalog(SPEC, {7: 3}), device=torch.device("meta"))
    out = lookup(kjt({"item": [[7, 8]], "user": [[7]]}))
    assert out.values().tolist() == [3, UNKNOWN, 7]
    assert lookup.map.packed.device.type == "cpu", "buffers are made on a real device"
    assert not lookup.state_dict(), "the catalog is an artefact of its own"
