import torch

from torchrec_sid.side import EventTerms, EventTermsConfig


def test_buckets_of_age_and_position() -> None:
    terms = EventTerms(EventTermsConfig(age_boundaries=(1.0, 10.0), position_buckets=4), dim=2, heads=1)
    lengths = torch.tensor([9, 0, 1])
    ages = torch.tensor([0.0, 0.99, 1.0, 5.0, 10.0, 1e9, torch.inf, torch.nan, -3.0, 0.5])
    age, position = terms.columns(lengths, 10, None, ages)
    assert age.tolist() == [0, 0, 1, 1, 2, 2, 2, 2, 0, 0]
    # Distances 8..0 from the newest: 0 | 1 | 2-3 | 4 and more.
    assert position.tolist() == [3, 3, 3, 3, 3, 2, 2, 1, 0, 0][:0] + [3, 3, 3, 3, 3, 2, 2, 1, 0] + [0]


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
