"""Raw ids to packed SIDs: the map, and what becomes of it when a model is moved."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchrec_sid.spec import SidSpec
from torchrec_sid.tables import UNKNOWN, CatalogMap

SPEC = SidSpec((4, 5))


class TableCatalog:
    """The two calls of a SidCatalog that the map uses, over a dictionary."""

    def __init__(self, spec, sids, fingerprint="f" * 64):
        self.spec, self.fingerprint, self._sids = spec, fingerprint, dict(sorted(sids.items()))

    def item_ids(self):
        return torch.tensor(list(self._sids), dtype=torch.int64)

    def lookup(self, item_ids, unknown=None):
        return torch.tensor([self._sids.get(int(i), unknown) for i in item_ids], dtype=torch.int64)


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


def zeroed(tensor):
    """What `to_empty` may find: memory that was given back zeroed."""
    return torch.zeros_like(tensor)


@pytest.mark.parametrize("fn", [zeroed, torch.Tensor.half, torch.Tensor.clone, lambda t: t.to("meta")])
def test_a_catalog_survives_what_is_applied_to_all_tensors(fn):
    lookup = CatalogMap(TableCatalog(SPEC, {7: 3, 1000: 4}))
    lookup(torch.tensor([1]))
    lookup._apply(fn)
    assert lookup(torch.tensor([7, 1000, 8])).tolist() == [3, 4, UNKNOWN]
    assert int(lookup.unknown_count) == 2
    assert not lookup.state_dict(), "the catalog is an artefact of its own"


def test_a_catalog_is_made_on_a_real_device():
    with torch.device("meta"):
        lookup = CatalogMap(TableCatalog(SPEC, {7: 3}))
    assert lookup.packed.device.type == "cpu"
    assert lookup(torch.tensor([7])).tolist() == [3]
