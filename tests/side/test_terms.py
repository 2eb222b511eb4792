import pytest
import torch

from torchrec_sid import SidError
from torchrec_sid.side import EventTerms, EventTermsConfig


def test_buckets_of_age_and_position() -> None:
    terms = EventTerms(EventTermsConfig(age_boundaries=(1.0, 10.0), position_buckets=4), dim=2, heads=1)
    lengths = torch.tensor([9, 0, 1])
    ages = torch.tensor([0.0, 0.99, 1.0, 5.0, 10.0, 1e9, torch.inf, torch.nan, -3.0, 0.5])
    age, position = terms.columns(lengths, 10, None, ages)
    assert age.tolist() == [0, 0, 1, 1, 2, 2, 2, 2, 0, 0]
    # Distances 8..0 from the newest: 0 | 1 | 2-3 | 4 and more.
    assert position.tolist() == [3, 3, 3, 3, 3, 2, 2, 1, 0, 0][:0] + [3, 3, 3, 3, 3, 2, 2, 1, 0] + [0]


def test_age_buckets_equal_edges_between_them() -> None:
    edges = EventTerms(EventTermsConfig(age_boundaries=(0.5, 1.5, 2.5)), dim=2, heads=1)
    numbers = EventTerms(EventTermsConfig(age_buckets=4), dim=2, heads=1)
    ages = torch.tensor([3, 0, 1, 2, 2])
    for given in (ages, ages.to(torch.uint8), ages.to(torch.int32)):
        columns = [terms.columns(torch.tensor([5]), 5, None, given) for terms in (edges, numbers)]
        assert torch.equal(columns[0][0], columns[1][0])
        assert columns[1][0].dtype == torch.uint8
    assert numbers.config.sizes == edges.config.sizes == (4,)


def test_numbers_outside_their_range_stay_outside() -> None:
    terms = EventTerms(EventTermsConfig(num_actions=3, age_buckets=255), dim=2, heads=1)
    wild = torch.tensor([-1, -256, 3, 256, 258, 2**40])
    actions, ages = terms.columns(torch.tensor([6]), 6, wild, wild)
    assert (actions >= 3).all()
    assert ages.tolist() == [255, 255, 3, 255, 255, 255]
    with pytest.raises(SidError, match="ages: dtype torch.float32"):
        terms.columns(torch.tensor([6]), 6, wild, wild.float())


@pytest.mark.parametrize("fields", [{"age_buckets": 256}, {"age_buckets": 3, "age_boundaries": (1.0,)}])
def test_bad_age_buckets_are_refused(fields: dict) -> None:
    with pytest.raises(SidError, match="age_buckets"):
        EventTermsConfig(**fields)


def test_alibi_slopes_and_distance() -> None:
    terms = EventTerms(EventTermsConfig(alibi=True), dim=2, heads=2)
    bias = terms.bias(torch.tensor([3, 1]), 4)
    assert bias is not None
    assert bias.tolist() == [[-0.125, -2 / 256], [-0.0625, -1 / 256], [0.0, 0.0], [0.0, 0.0]]


def test_all_positions_to_ten_thousand_are_powers_of_two() -> None:
    terms = EventTerms(EventTermsConfig(position_buckets=40), dim=2, heads=1)
    (bucket,) = terms.columns(torch.tensor([10_001]), 10_001, None, None)
    distance = torch.arange(10_000, -1, -1)
    expected = torch.tensor([int(d).bit_length() for d in distance])
    assert torch.equal(bucket.long(), expected)
