"""The last digit tells items apart and never moves a published SID."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchrec_sid.catalog import SidCatalog, add_last_digit
from torchrec_sid.errors import SidError
from torchrec_sid.spec import SidSpec

SPEC = SidSpec((3, 3))


@given(st.integers(0, 60), st.integers(0, 10_000))
def test_digits_are_unique_and_numbered_by_item_id(rows: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(3, (rows, 2), generator=generator)
    ids = torch.randperm(1000, generator=generator)[:rows]
    result = add_last_digit(SPEC, ids, codes, cardinality=64)
    assert result.spec == SidSpec((3, 3, 64)) and result.overflow == 0
    assert torch.equal(result.codes[:, :2], codes), "prefixes stay"
    assert len(set(map(tuple, result.codes.tolist()))) == rows
    for sid in set(map(tuple, codes.tolist())):
        mine = (codes == torch.tensor(sid)).all(1)
        in_order = result.codes[mine][ids[mine].argsort(), 2]
        assert in_order.tolist() == list(range(int(mine.sum())))


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 10_000))
def test_appended_items_go_on_after_the_published_ones(
    tmp_path_factory: pytest.TempPathFactory, old: int, new: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(3, (old + new, 2), generator=generator)
    ids = torch.arange(old + new).flip(0)
    first = add_last_digit(SPEC, ids[:old], codes[:old], cardinality=128)
    path: Path = tmp_path_factory.mktemp("digits")
    catalog = SidCatalog.create(path, first.spec, ids[:old], first.codes, "a" * 64)
    second = add_last_digit(SPEC, ids[old:], codes[old:], cardinality=128, published=catalog)
    both = catalog.append(ids[old:], second.codes, "a" * 64)
    assert torch.equal(both.codes(ids[:old]), first.codes)
    assert len(both.lookup(ids).unique()) == old + new


def test_overflow_is_counted(tmp_path: Path) -> None:
    codes = torch.zeros(5, 2, dtype=torch.int64)
    result = add_last_digit(SPEC, torch.arange(5), codes, cardinality=3)
    assert result.codes[:, 2].tolist() == [0, 1, 2, 2, 2] and result.overflow == 2


def test_bad_input_is_named(tmp_path: Path) -> None:
    codes = torch.zeros(5, 2, dtype=torch.int64)
    with pytest.raises(SidError, match="64 bits in all"):
        add_last_digit(SidSpec((2**30, 2**26)), torch.arange(5), codes)
    plain = SidCatalog.create(tmp_path / "c", SPEC, torch.arange(5), codes, "a" * 64)
    with pytest.raises(SidError, match=r"Pass a catalog of \(3, 3, 256\)"):
        add_last_digit(SPEC, torch.tensor([9]), codes[:1], published=plain)
    with pytest.raises(SidError, match="level 1"):
        add_last_digit(SPEC, torch.arange(5), codes + 3)
