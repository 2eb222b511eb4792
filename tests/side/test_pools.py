"""Pools of packed histories against sums over decoded events, user by user."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from torchrec_sid.side.features import SideFeatures, SideFeaturesConfig
from torchrec_sid.side.pools import HistoryPools
from torchrec_sid.spec import SidSpec

SPEC = SidSpec((3,) * 7)
DIM, ACTIONS, AGES, POOLS = 4, 3, 5, 2


def _history(lengths: list[int], seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    events = sum(lengths)
    packed = SPEC.pack_bytes(torch.randint(3, (events, SPEC.levels), generator=generator))
    actions = torch.randint(ACTIONS, (events,), generator=generator)
    return packed, actions, torch.randint(AGES, (events,), generator=generator)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=5), st.integers(0, 1000))
def test_pools_are_sums_over_decoded_events(lengths: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    features = SideFeatures(SPEC, SideFeaturesConfig(kind="one_hot"))
    module = HistoryPools(features.dim, DIM, ACTIONS, AGES, POOLS)
    packed, actions, ages = _history(lengths, seed)
    found = module(features, packed, torch.tensor(lengths), actions, ages)
    assert found.shape == (len(lengths), module.summaries, DIM)
    vectors = module.projection(features(packed))
    terms = module.action(actions) + module.age(ages)
    gated = module.gate(actions).unsqueeze(2) * vectors.unsqueeze(1)
    users = zip((vectors + terms).split(lengths), gated.split(lengths), strict=True)
    for user, (events, pooled) in enumerate(users):
        n = max(1, len(events))
        expected = torch.cat([events.sum(0, keepdim=True) / n, pooled.sum(0) / n**0.5])
        torch.testing.assert_close(found[user], expected, rtol=1e-4, atol=1e-5)


def test_every_parameter_learns_and_no_row_per_event_is_kept() -> None:
    features = SideFeatures(SPEC, SideFeaturesConfig(kind="one_hot"))
    module = HistoryPools(features.dim, DIM, ACTIONS, AGES, POOLS)
    packed, actions, ages = _history([40, 0, 9], 0)
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.shape[0]) or t, lambda t: t):
        module(features, packed, torch.tensor([40, 0, 9]), actions, ages).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in module.parameters())
    assert sizes and max(sizes) < 49, "something per event is kept for the backward pass"
