"""Drift between catalogs, counted by hand and by invariants."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from torchrec_sid.catalog import ItemValues, SidCatalog, measure_drift
from torchrec_sid.errors import SidError
from torchrec_sid.spec import SidSpec

SPEC = SidSpec((4, 4, 4))


def catalog(path: Path, ids: list[int], codes: Tensor, mark: str = "a" * 64) -> SidCatalog:
    return SidCatalog.create(path, SPEC, torch.tensor(ids), codes, mark)


def test_counts_by_hand(tmp_path: Path) -> None:
    before = torch.tensor([[0, 0, 0], [0, 0, 0], [1, 1, 1], [2, 2, 2], [3, 0, 0]])
    after = torch.tensor([[0, 0, 0], [0, 0, 1], [1, 2, 2], [0, 0, 0], [3, 3, 3]])
    report = measure_drift(
        catalog(tmp_path / "a", [1, 2, 3, 4, 5], before),
        catalog(tmp_path / "b", [1, 2, 3, 4, 6], after, "b" * 64),
    )
    assert (report.items_before, report.items_after, report.common) == (5, 5, 4)
    assert (report.added, report.removed, report.moved) == (1, 1, 3)
    assert report.moved_at_level == (1, 1, 1)
    # Items 1 and 2 shared a SID: one of them left it, and item 4 joined the other.
    assert report.kept_together == (1.0, 1.0, 0.75)
    assert (report.collision_rate_before, report.collision_rate_after) == (0.5, 0.5)
    words = report.describe()
    assert "3 moved (1 at level 1, 1 at level 2, 1 at level 3)" in words and "1 new, 1 gone" in words


def test_an_append_does_not_drift(tmp_path: Path) -> None:
    codes = torch.randint(4, (50, 3), generator=torch.Generator().manual_seed(0))
    first = catalog(tmp_path / "a", list(range(40)), codes[:40])
    second = first.append(torch.arange(40, 50), codes[40:], "a" * 64)
    report = measure_drift(first, second)
    assert (report.moved, report.added, report.removed) == (0, 10, 0)
    assert report.kept_together == (1.0, 1.0, 1.0)
    assert report.collision_rate_before == report.collision_rate_after
    assert "no SID moved" in report.describe()


@given(st.permutations(range(4)))
def test_renamed_codes_move_items_but_keep_groups(
    tmp_path_factory: pytest.TempPathFactory, names: list[int]
) -> None:
    tmp_path = tmp_path_factory.mktemp("drift")
    codes = torch.randint(4, (60, 3), generator=torch.Generator().manual_seed(1))
    report = measure_drift(
        catalog(tmp_path / "a", list(range(60)), codes),
        catalog(tmp_path / "b", list(range(60)), torch.tensor(names)[codes]),
    )
    assert report.kept_together == (1.0, 1.0, 1.0)
    assert sum(report.moved_at_level) == report.moved
    assert (report.moved == 0) == (names == sorted(names))


def test_other_cardinalities_are_refused(tmp_path: Path) -> None:
    a = catalog(tmp_path / "a", [1], torch.zeros(1, 3, dtype=torch.int64))
    other = SidSpec((4, 4))
    b = SidCatalog.create(
        tmp_path / "b", other, torch.tensor([1]), torch.zeros(1, 2, dtype=torch.int64), "a" * 64
    )
    with pytest.raises(SidError, match="one SidSpec"):
        measure_drift(a, b)


def test_shares_of_traffic_and_purity_by_hand(tmp_path: Path) -> None:
    before = torch.tensor([[0, 0, 0], [0, 0, 0], [1, 1, 1], [2, 2, 2]])
    after = torch.tensor([[0, 0, 0], [0, 0, 1], [1, 2, 1], [3, 2, 2]])
    old, new = (
        catalog(tmp_path / mark, [1, 2, 3, 4], codes, mark * 64)
        for mark, codes in (("a", before), ("b", after))
    )
    report = measure_drift(
        old,
        new,
        traffic=ItemValues(torch.tensor([4, 2, 1]), torch.tensor([1.0, 3.0, 6.0])),
        labels={"kind": ItemValues(torch.tensor([1, 2, 3, 4]), torch.tensor([5, 6, 5, 5]))},
    )
    assert report.changed.items == (0.25, 0.5, 0.75)
    assert report.changed.traffic == pytest.approx((0.1, 0.1, 0.4))  # item 3 has none
    assert report.changed.level_traffic == pytest.approx((0.1, 0.0, 0.3))
    # Items 1 and 2 share a SID before, and the whole SID no longer.
    assert report.purity_before == {"kind": (0.75, 0.75, 0.75)}
    assert report.purity_after == {"kind": (0.75, 0.75, 1.0)}
    assert report.to_dict()["changed"]["items"] == (0.25, 0.5, 0.75)
    words = report.describe()
    assert "25.0%, 50.0%, 75.0% of items, 10.0%, 10.0%, 40.0% of traffic" in words
    assert "purity of kind 0.750 -> 0.750 at depth 1, 0.750 -> 1.000 at depth 3" in words
    with pytest.raises(SidError, match="traffic"):
        measure_drift(old, new, traffic=ItemValues(torch.tensor([1]), torch.tensor([-1.0])))
