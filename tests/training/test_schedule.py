"""The learning rate over a run."""

import pytest
import torch

from torchrec_sid.training.schedule import LinearDecay


def test_the_rate_falls_linearly_to_its_final_share() -> None:
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=0.4)
    decay = LinearDecay(optimizer, steps=10, final=0.1)
    rates = []
    for step in (0, 5, 10, 20):
        decay.set(step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.4, 0.2, 0.04, 0.04])
