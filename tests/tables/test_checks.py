"""Bad batches are refused by feature, value and remedy: TorchRec would read wrong rows without a word."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor

from torchrec_sid.collections import SidEmbeddingBagCollection
from torchrec_sid.errors import SidError
from torchrec_sid.spec import SidSpec
from torchrec_sid.tables import HashedPrefix, SidEmbeddingBagConfig
from torchrec_sid.tables.checks import check_packed

SPEC = SidSpec((8, 5, 8))


def collection(weighted=False):
    return SidEmbeddingBagCollection(
        tables=[
            SidEmbeddingBagConfig(name="item", embedding_dim=4, scheme=HashedPrefix(3), spec=SPEC),
            EmbeddingBagConfig(name="user", embedding_dim=4, num_embeddings=10, feature_names=["user"]),
        ],
        is_weighted=weighted,
    )


def batch(values, lengths=(1, 1), keys=("item", "user"), weights=None):
    return KeyedJaggedTensor(
        keys=list(keys), values=values, lengths=torch.tensor(lengths), weights=weights, stride=1
    )


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: batch(torch.tensor([1.0, 2.0])), "float32.*SidSpec.pack"),
        (lambda: batch(torch.tensor([[1, 2, 3], [4, 5, 6]])), "shape \\(2, 3\\).*SidSpec.pack"),
        (lambda: batch(torch.tensor([[1, 2], [3, 4]])[:, 1]), "not contiguous.*contiguous\\(\\)"),
        (
            lambda: batch(torch.tensor([1, 2]), keys=("items", "user")),
            "'item'.*\\['items', 'user'\\].*rename",
        ),
        (lambda: batch(torch.tensor([1, 2, 3])), "lengths sum to 2 but there are 3"),
        (lambda: batch(torch.tensor([1, 2, 3]), lengths=(1, 1, 1)), "3 lengths for 2 keys"),
        (lambda: batch(torch.tensor([1, 2]), keys=("item", "item")), "'item'.*twice"),
        (lambda: batch(torch.tensor([1, 2]), lengths=(3, -1)), "length -1 at position 1"),
        (
            lambda: KeyedJaggedTensor(
                ["item", "user"],
                torch.tensor([1, 2]),
                lengths=torch.tensor([1, 1]),
                offsets=torch.tensor([0, 2, 2]),
                stride=1,
            ),
            "contradict the offsets",
        ),
        (
            lambda: KeyedJaggedTensor(
                ["item", "user"],
                torch.tensor([1, 2]),
                lengths=torch.tensor([1, 1], dtype=torch.int32),
                offsets=torch.tensor([0, 2]),
                stride=1,
            ),
            "2 offsets for 2 lengths",
        ),
        (lambda: batch(torch.tensor([1, 2]), weights=torch.ones(3)), "\\(3,\\) weights"),
        (lambda: batch(torch.tensor([1 << 9, 2])), "'item'.*packed SID 512 at position 0.*catalog"),
        (lambda: batch(torch.tensor([-2, 2])), "'item'.*packed SID -2"),
        (
            lambda: batch(torch.tensor([7 << 3, 2])),
            "'item'.*packed SID 56.*code 7 at level 2, outside 0..4",
        ),
    ],
)
def test_a_bad_batch_is_named(make, says):
    with pytest.raises(SidError, match=says):
        collection()(make())


@pytest.mark.parametrize(
    ("weights", "says"),
    [(None, "no weights.*is_weighted"), (torch.ones(1), "\\(1,\\) weights for \\(2,\\) values")],
)
def test_missing_or_mixed_weights_are_named(weights, says):
    with pytest.raises(SidError, match=says):
        collection(weighted=True)(batch(torch.tensor([1, 2]), weights=weights))


def test_weights_are_ignored_where_torchrec_ignores_them():
    plain, weighted = (batch(torch.tensor([1, 2]), weights=w) for w in (None, torch.tensor([2.0, 3.0])))
    ebc = collection()
    assert torch.equal(ebc(plain).values(), ebc(weighted).values())


def test_int32_values_are_taken():
    ebc = collection()
    wide, narrow = batch(torch.tensor([9, 2])), batch(torch.tensor([9, 2], dtype=torch.int32))
    assert torch.equal(ebc(wide).values(), ebc(narrow).values())


@given(st.lists(st.integers(-3, 600), max_size=8))
def test_check_packed_equals_unpacking_one_by_one(values):
    def good(value):
        codes = (value >> 6, value >> 3 & 7, value & 7)
        return value == -1 or all(0 <= c < k for c, k in zip(codes, SPEC.cardinalities, strict=True))

    packed = torch.tensor(values, dtype=torch.int64)
    if all(good(v) for v in values):
        unknown = check_packed("item", packed, SPEC)
        expected = [v == -1 for v in values]
        assert unknown.tolist() == expected if unknown is not None else not any(expected)
    else:
        first = next(v for v in values if not good(v))
        with pytest.raises(SidError, match=f"packed SID {first} at position {values.index(first)}"):
            check_packed("item", packed, SPEC)
