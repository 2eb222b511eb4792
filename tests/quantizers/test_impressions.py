"""Sampling items by their impressions."""

import pytest
import torch

from torchrec_sid.errors import SidError
from torchrec_sid.quantizers.sample import sample_impressed

X = torch.eye(4)
SEEN = torch.tensor([0, 1, 3, 12])


def _shares(**options: object) -> torch.Tensor:
    return sample_impressed(X, SEEN, rows=40_000, **options).mean(0)


def test_rows_follow_the_traffic_and_the_unseen_are_left_out() -> None:
    torch.testing.assert_close(_shares(), SEEN / 16, atol=0.01, rtol=0)
    assert _shares()[0] == 0


def test_power_zero_treats_the_impressed_alike() -> None:
    torch.testing.assert_close(_shares(power=0.0), torch.tensor([0, 1, 1, 1]) / 3, atol=0.01, rtol=0)


def test_the_seed_decides() -> None:
    assert torch.equal(
        sample_impressed(X, SEEN, rows=50, seed=1), sample_impressed(X, SEEN, rows=50, seed=1)
    )
    assert not torch.equal(
        sample_impressed(X, SEEN, rows=50, seed=1), sample_impressed(X, SEEN, rows=50, seed=2)
    )


@pytest.mark.parametrize(
    "impressions",
    [torch.ones(3), torch.tensor([1.0, -1, 0, 0]), torch.zeros(4), torch.full((4,), torch.nan)],
)
def test_weights_that_make_no_sense_are_refused(impressions: torch.Tensor) -> None:
    with pytest.raises(SidError, match="impressions"):
        sample_impressed(X, impressions)
    with pytest.raises(SidError, match="impressions"):
        sample_impressed(X, SEEN, rows=0)
