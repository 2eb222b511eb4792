"""Learning rates over a run, optimizers by name, clipping."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchrec_sid.errors import SidError
from torchrec_sid.training.schedule import RateSchedule, clip_gradients, make_dense_optimizer


def rates(steps, at, **how):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.4)
    schedule, found = RateSchedule(optimizer.param_groups, steps, **how), []
    for step in at:
        schedule.set(step)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def test_the_rate_falls_linearly_to_its_final_share() -> None:
    assert rates(10, (0, 5, 10, 20), options={"final": 0.1}) == pytest.approx([0.4, 0.2, 0.04, 0.04])
    assert rates(10, (20,)) == pytest.approx([0.02])


def test_schedules_of_torch_have_the_length_of_the_run() -> None:
    cosine = [0.4 * (1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)]
    assert rates(8, range(8), name="CosineAnnealingLR") == pytest.approx(cosine, abs=1e-9)
    assert rates(8, (0, 3), name="constant") == [0.4, 0.4]
    halved = rates(8, range(5), name="StepLR", options={"step_size": 2.0, "gamma": 0.5})
    assert halved == pytest.approx([0.4, 0.4, 0.2, 0.2, 0.1])
    peak = rates(8, range(10), name="OneCycleLR", options={"max_lr": 1.0})
    assert 0.35 < max(peak) <= 0.4 and peak[0] < 0.05 and peak[-1] < 0.01


@given(
    st.sampled_from(["linear", "CosineAnnealingLR", "OneCycleLR", "PolynomialLR"]),
    st.integers(0, 5),
    st.lists(st.integers(0, 12), min_size=1),
)
def test_a_rate_is_a_function_of_the_step_alone(name: str, warmup: int, order: list[int]) -> None:
    how = {"name": name, "warmup": warmup, "options": {"max_lr": 1.0} if name == "OneCycleLR" else {}}
    alone = [rates(10, [step], **how)[0] for step in order]
    assert rates(10, order, **how) == pytest.approx(alone, abs=1e-12)


def test_warmup_rises_from_the_first_step() -> None:
    assert rates(100, (0, 1, 3, 4), name="constant", warmup=4) == pytest.approx([0.1, 0.2, 0.4, 0.4])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"name": "Cosine"}, "schedule: 'Cosine'"),
        ({"name": "StepLR"}, "schedule_options.*step_size"),
        ({"name": "LambdaLR"}, "schedule_options.*lr_lambda"),
        ({"options": {"gamma": 1.0}}, "gamma"),
        ({"name": "constant", "options": {"final": 1.0}}, "final"),
        ({"warmup": -1}, "warmup_steps: -1"),
    ],
)
def test_unusable_schedules_are_named(how, message) -> None:
    with pytest.raises(SidError, match=message):
        rates(10, (0,), **how)


def test_optimizers_come_by_name() -> None:
    weights = [torch.nn.Parameter(torch.ones(2))]
    optimizer = make_dense_optimizer("AdamW", weights, 0.1, {"weight_decay": 0.5})
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.param_groups[0]["weight_decay"] == 0.5 and optimizer.param_groups[0]["lr"] == 0.1
    for name, options, message in (
        ("Adamm", {}, "dense_optimizer: 'Adamm'"),
        ("Optimizer", {}, "dense_optimizer"),
        ("SGD", {"momentun": 0.9}, "dense_options.*momentun"),
        ("Adam", {"eps": -1.0}, "dense_options.*epsilon"),
    ):
        with pytest.raises(SidError, match=message):
            make_dense_optimizer(name, weights, 0.1, options)


def test_gradients_are_scaled_to_the_largest_norm() -> None:
    weights = [torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(1))]
    optimizer = torch.optim.SGD(weights, lr=1.0)
    clip_gradients(optimizer, 2.0)
    weights[0].grad, weights[1].grad = torch.tensor([6.0, 0.0]), torch.tensor([8.0])
    optimizer.step()
    torch.testing.assert_close(torch.cat([w.detach() for w in weights]), torch.tensor([-1.2, 0.0, -1.6]))
    weights[0].grad, weights[1].grad = torch.tensor([0.1, 0.0]), torch.zeros(1)
    optimizer.step()
    assert weights[0][0].item() == pytest.approx(-1.3)
    with pytest.raises(SidError, match="clip_norm: 0"):
        clip_gradients(optimizer, 0.0)
