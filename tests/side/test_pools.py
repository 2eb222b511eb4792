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


@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=5),
    st.sampled_from([(6,), (2, 6), (1, 3, 6)]),
    st.integers(0, 1000),
)
def test_pools_are_sums_over_decoded_events(
    lengths: list[int], windows: tuple[int, ...], seed: int
) -> None:
    torch.manual_seed(seed)
    features = SideFeatures(SPEC, SideFeaturesConfig(kind="one_hot"))
    module = HistoryPools(features.dim, DIM, ACTIONS, AGES, POOLS, windows)
    packed, actions, ages = _history(lengths, seed)
    found = module(features, packed, torch.tensor(lengths), actions, ages)
    assert found.shape == (len(lengths), module.summaries, DIM)
    vectors = module.projection(features(packed))
    terms = module.action(actions) + module.age(ages)
    gated = module.gate(actions).unsqueeze(2) * vectors.unsqueeze(1)
    for user, (events, pooled) in enumerate(
        zip((vectors + terms).split(lengths), gated.split(lengths), strict=True)
    ):
        counts = [max(1, min(len(events), window)) for window in windows]
        means = [events[-w:].sum(0) / n for w, n in zip(windows, counts, strict=True)]
        pools = [pooled[-w:].sum(0) / n**0.5 for w, n in zip(windows, counts, strict=True)]
        expected = torch.cat([torch.stack(means), torch.cat(pools)])
        torch.testing.assert_close(found[user], expected, rtol=1e-4, atol=1e-5)


def test_every_parameter_learns_and_no_row_per_event_is_made() -> None:
    features = SideFeatures(SPEC, SideFeaturesConfig(kind="one_hot"))
    module = HistoryPools(features.dim, DIM, ACTIONS, AGES, POOLS, (2, 64))
    packed, actions, ages = _history([40, 0, 9], 0)
    sizes: list[int] = []
    found = module(features, packed, torch.tensor([40, 0, 9]), actions, ages)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.shape[0]) or t, lambda t: t):
        found = module(features, packed, torch.tensor([40, 0, 9]), actions, ages)
        found.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in module.parameters())
    assert sizes and max(sizes) < 49, "something per event is kept for the backward pass"
