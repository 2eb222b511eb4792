"""Similarity features for every arm: one definition of the pools, measures against plain loops."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchrec import KeyedJaggedTensor

from torchrec_sid import (
    ContentCosine,
    FrozenBasis,
    PrefixOverlap,
    SameItem,
    SidSpec,
    SimilarityConfig,
    SimilarityFeatures,
    pool_similarities,
)
from torchrec_sid.errors import SidError
from torchrec_sid.models.similarities import SimilarityChannel
from torchrec_sid.models.target_attention import HistoryConfig


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.booleans())
def test_the_cosine_of_decoded_sids_has_the_features_of_side(seed, labels):
    generator = torch.Generator().manual_seed(seed)
    spec = SidSpec((3,) * 10)
    codes = torch.randint(0, 3, (30, 10), generator=generator)
    basis = FrozenBasis.from_digits(spec, torch.randn(10, 6, generator=generator))
    decoded = sum(basis.values(level)[codes[:, level]] for level in range(10))
    lengths = torch.randint(0, 6, (4,), generator=generator)
    events = torch.randint(0, 30, (int(lengths.sum()),), generator=generator)
    items = torch.randint(0, 30, (4,), generator=generator)
    liked = torch.randint(-1, 2, (len(events),), generator=generator).float()
    config = SimilarityConfig(labels=labels)
    packed = spec.pack_bytes(codes)
    side = SimilarityFeatures(basis, config)
    expected = side(packed[items], packed[events], lengths, liked if labels else None)
    similarity = ContentCosine(decoded, centred=False)(items.repeat_interleave(lengths), events)
    found = pool_similarities(similarity, lengths, liked, config)
    assert found.shape == (4, len(config.names))
    # fp16 embeddings, and temperatures up to 30.
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0.02)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000))
def test_measures_are_those_of_plain_loops(seed):
    generator = torch.Generator().manual_seed(seed)
    spec = SidSpec((3, 2, 4))
    codes = torch.stack([torch.randint(0, k, (20,), generator=generator) for k in (3, 2, 4)], 1)
    sids = spec.pack(codes)
    sids[::5] = -1  # items without a SID
    a, b = torch.randint(0, 20, (2, 40), generator=generator)
    found = PrefixOverlap(spec)(sids[a], sids[b])
    for i in range(40):
        depth = 0
        while depth < 3 and codes[a[i], depth] == codes[b[i], depth]:
            depth += 1
        known = sids[a[i]] >= 0 and sids[b[i]] >= 0
        assert found[i] == pytest.approx(depth / 3 if known else 0)
    assert SameItem()(a, b).tolist() == [float(x == y) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    content = torch.randn(20, 5, generator=generator)
    centred = content - content.mean(0)
    expected = torch.nn.functional.cosine_similarity(centred[a], centred[b])
    torch.testing.assert_close(ContentCosine(content)(a, b), expected, atol=2e-3, rtol=0)


def test_an_item_without_content_is_like_nothing_and_bad_content_is_refused():
    content = torch.tensor([[1.0, 0], [0, 0], [-1, 0]])
    assert ContentCosine(content)(torch.tensor([1, 0]), torch.tensor([0, 2])).tolist() == [0, -1]
    for bad in (torch.tensor([[float("nan")]]), torch.ones(3), torch.ones(2, 2, dtype=torch.int64)):
        with pytest.raises(SidError, match="finite floats"):
            ContentCosine(bad)
    with pytest.raises(SidError, match="agreement_bins"):
        pool_similarities(
            torch.ones(1), torch.ones(1).long(), torch.ones(1), SimilarityConfig(agreement_bins=2)
        )


def test_a_window_pools_the_most_recent_events_alone():
    history = HistoryConfig(dim=8, heads=2, actions=2, max_length=100, recent=2)
    channel = SimilarityChannel(SameItem(), ("item", "history"), 8, history, torch.tensor([-1.0, 1.0]))
    features = KeyedJaggedTensor(
        ["item", "history", "history_action"],
        values=torch.tensor([7, 7, 7, 7, 7, 1, 2, 1, 0, 1, 1]),
        lengths=torch.tensor([1, 1, 1, 4, 0, 0, 4, 0, 0]),
    )
    output = channel(features, {})
    assert output.fields.shape == (3, 0, 8) and output.numbers.shape == (3, channel.numbers)
    names = channel.config.names
    recent, whole = (dict(zip(names, part, strict=True)) for part in output.numbers[0].split(len(names)))
    assert recent["max"] == 0 and recent["mean"] == 0
    # Of the user's four events the first two are on the candidate; one was liked, one was not.
    assert whole["max_liked"] == whole["max_disliked"] == whole["max"] == 1
    assert whole["mean"] == 0.5 and whole["signed_mean"] == 0
    empty = dict(zip(names, output.numbers[1], strict=False))
    assert empty["max"] == -1 and empty["mean"] == 0
    assert SimilarityChannel(SameItem(), ("item", "history"), 8, None, torch.ones(2)).numbers == 0
