"""Intervals by resampling users: against a brute-force bootstrap, a known variance, and a true null."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrec_sid.bootstrap import UserBootstrap, cross_entropy, normalized_entropy
from torchrec_sid.errors import SidError


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 9), st.integers(1, 200), st.integers(1, 150), st.integers(0, 5))
def test_sums_of_a_draw_are_those_of_the_rows_of_the_users_drawn(users, rows, draws, seed):
    random = np.random.default_rng(seed)
    user, values = random.integers(users, size=rows) * 7, random.normal(size=rows)
    bootstrap = UserBootstrap(user, draws, seed)
    found = bootstrap.sums({"x": values, "rows": np.ones(rows)})
    # The draws again, one at a time, rows copied as often as their user was drawn.
    distinct = np.unique(user)
    generator = np.random.default_rng([seed, 0x75736572])
    for begin in range(0, draws, 64):
        drawn = generator.integers(len(distinct), size=(min(64, draws - begin), len(distinct)))
        for number, chosen in enumerate(drawn, 1 + begin):
            copied = np.concatenate([values[user == distinct[u]] for u in chosen])
            assert found["x"][number] == pytest.approx(copied.sum())
            assert found["rows"][number] == len(copied)
    assert found["x"][0] == pytest.approx(values.sum())


def test_the_width_is_that_of_users_and_not_of_rows():
    random = np.random.default_rng(0)
    users, each = 400, 25
    means = random.normal(size=users)
    values = np.repeat(means, each)  # the rows of a user are copies: 400 observations, not 10,000
    bootstrap = UserBootstrap(np.repeat(np.arange(users), each), 4000)
    sums = bootstrap.sums({"x": values, "rows": np.ones(len(values))})
    interval = bootstrap.interval(sums["x"] / sums["rows"])
    known = means.std() / np.sqrt(users)
    assert (interval.high - interval.low) / (2 * 1.96) == pytest.approx(known, rel=0.06)
    assert interval.low < means.mean() < interval.high


def test_95_percent_of_intervals_hold_the_truth_and_p_is_uniform_under_the_null():
    held, small = 0, 0
    for seed in range(400):
        random = np.random.default_rng(seed)
        sizes = random.integers(1, 12, size=80)
        values = np.repeat(random.normal(size=80), sizes) + random.normal(size=sizes.sum())
        bootstrap = UserBootstrap(np.repeat(np.arange(80), sizes), 300, seed)
        sums = bootstrap.sums({"x": values, "rows": np.ones(len(values))})
        interval = bootstrap.interval(sums["x"] / sums["rows"])
        held += interval.low <= 0 <= interval.high
        small += interval.p <= 0.05
    assert 0.90 <= held / 400 <= 0.98 and 0.02 <= small / 400 <= 0.10


def test_seeds_are_resampled_beside_users():
    users = np.arange(1000)
    bootstrap = UserBootstrap(users, 4000)
    same = [np.full(4001, 2.0)] * 5
    assert bootstrap.interval(bootstrap.over_seeds(same))[:3] == pytest.approx((2, 2, 2))
    seeds = [np.full(4001, value) for value in (1.0, 2.0, 3.0, 4.0, 5.0)]
    interval = bootstrap.interval(bootstrap.over_seeds(seeds))
    assert interval.estimate == 3
    # Five numbers drawn five times with replacement: their mean has the variance 2 / 5.
    assert np.var(bootstrap.over_seeds(seeds)[1:]) == pytest.approx(2 / 5, rel=0.1)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_normalized_entropy_is_that_of_its_definition(seed):
    random = np.random.default_rng(seed)
    logits, weight = random.normal(size=50) * 5, random.uniform(0.1, 2, size=50)
    labels = (random.uniform(size=50) < 0.4).astype(float)
    labels[:2] = 0, 1
    p = 1 / (1 + np.exp(-logits))
    loss = -(labels * np.log(p) + (1 - labels) * np.log(1 - p))
    assert cross_entropy(logits, labels) == pytest.approx(loss, rel=1e-9)
    rate = np.average(labels, weights=weight)
    expected = np.average(loss, weights=weight) / -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate))
    found = normalized_entropy((loss * weight).sum(), (labels * weight).sum(), weight.sum())
    assert found == pytest.approx(expected)


def test_what_has_no_value_has_no_interval():
    bootstrap = UserBootstrap(np.array([0, 1]), 10)
    assert bootstrap.interval(np.full(11, np.nan)) is None
    assert np.isnan(normalized_entropy(np.array(1.0), np.array(0.0), np.array(4.0)))
    assert cross_entropy(np.array([1e4, -1e4]), np.array([1.0, 0.0])) == pytest.approx([0, 0])
    with pytest.raises(SidError, match="at least one"):
        UserBootstrap(np.array([], np.int64))
