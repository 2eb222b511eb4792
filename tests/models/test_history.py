"""Target attention over histories against torch's own attention, user by user."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention
from torchrec import JaggedTensor, KeyedJaggedTensor

from torchrec_sid.errors import SidError
from torchrec_sid.models.target_attention import HistoryConfig, TargetAttention

CONFIG = HistoryConfig(dim=8, heads=2, actions=3, ages=5, pools=2, max_length=6)


def _features(lengths: list[int], generator: torch.Generator) -> KeyedJaggedTensor:
    events = sum(lengths)
    action = torch.randint(0, CONFIG.actions, (events,), generator=generator)
    age = torch.randint(0, CONFIG.ages, (events,), generator=generator)
    return KeyedJaggedTensor(
        keys=["history_action", "history_age"],
        values=torch.cat([action, age]),
        lengths=torch.tensor(lengths * 2),
    )


def _reference(
    module: TargetAttention, target: torch.Tensor, content: torch.Tensor, features: KeyedJaggedTensor
) -> torch.Tensor:
    """One user and one window at a time, keys and values projected per event."""
    lengths = features["history_action"].lengths().tolist()
    actions = features["history_action"].values().split(lengths)
    ages = features["history_age"].values().split(lengths)
    heads = (CONFIG.heads, CONFIG.dim // CONFIG.heads)
    rows = []
    for user, all_vectors in enumerate(content.split(lengths)):
        all_events = all_vectors + module.action(actions[user]) + module.age(ages[user])
        query = module.query(target[user]).view(heads[0], 1, heads[1])
        attended, means, pools = [], [], []
        for window in module.config.windows:
            events, vectors = all_events[-window:], all_vectors[-window:]
            count = max(1, len(events))
            key = module.key(events).view(-1, *heads).transpose(0, 1)
            value = module.value(events).view(-1, *heads).transpose(0, 1)
            if len(events):
                attended.append(scaled_dot_product_attention(query, key, value).flatten())
            else:
                attended.append(torch.zeros(CONFIG.dim))
            means.append(events.sum(0) / count)
            gates = module.gate(actions[user][-window:])
            pools += [(gates[:, p : p + 1] * vectors).sum(0) / count**0.5 for p in range(CONFIG.pools)]
        rows.append(torch.stack([*attended, *means, *pools]))
    return torch.stack(rows)


@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=5),
    st.sampled_from([1, 3, 6, 64]),
    st.integers(0, 1000),
)
def test_attention_equals_projecting_every_event(lengths: list[int], recent: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    module = TargetAttention(replace(CONFIG, recent=recent))
    features = _features(lengths, generator)
    content = torch.randn(sum(lengths), CONFIG.dim, generator=generator)
    target = torch.randn(len(lengths), CONFIG.dim, generator=generator)
    jagged = JaggedTensor(content, lengths=torch.tensor(lengths))
    found = module(target, jagged, features)
    assert found.shape == (len(lengths), module.summaries, CONFIG.dim)
    torch.testing.assert_close(found, _reference(module, target, content, features), rtol=1e-4, atol=1e-5)


def test_without_content_events_are_actions_and_ages() -> None:
    module = TargetAttention(replace(CONFIG, pools=0))
    features = _features([3, 0], torch.Generator().manual_seed(0))
    found = module(torch.randn(2, CONFIG.dim), None, features)
    assert found.shape == (2, 2, CONFIG.dim)
    assert not found[1].any(), "a user without history has no summary"
    with pytest.raises(SidError, match="pools"):
        TargetAttention(CONFIG)(torch.randn(2, CONFIG.dim), None, features)


def test_every_size_changes_the_module() -> None:
    base = TargetAttention(CONFIG)
    assert base.summaries == 4
    for field, value in {"dim": 4, "heads": 4, "actions": 4, "ages": 6, "pools": 0}.items():
        other = TargetAttention(replace(CONFIG, **{field: value}))
        changed = {n: tuple(p.shape) for n, p in other.named_parameters()} != {
            n: tuple(p.shape) for n, p in base.named_parameters()
        }
        assert changed or other.config.heads != base.config.heads


@pytest.mark.parametrize(
    "bad", [{"dim": 0}, {"dim": 10, "heads": 4}, {"pools": -1}, {"max_length": 0}, {"recent": 0}]
)
def test_sizes_that_make_no_sense_are_refused(bad: dict) -> None:
    with pytest.raises(SidError):
        HistoryConfig(**bad)
