"""Quantized tables return what TorchRec's quantized collections return, bit for bit."""

import copy

import pytest
import torch
from torch import nn
from torchrec import (
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    EmbeddingCollection,
    EmbeddingConfig,
    KeyedJaggedTensor,
)
from torchrec.inference.modules import quantize_inference_model
from torchrec.modules.embedding_configs import PoolingType

from torchrec_sid.errors import SidError
from torchrec_sid.serving.quantized import quantize_tables

DTYPES = {"int8": torch.int8, "int4": torch.quint4x2}


def make_kjt(weighted=False):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 4, (4 * 5,), generator=generator)
    count = int(lengths.sum())
    return KeyedJaggedTensor(
        keys=["d", "c", "b", "a"],
        values=torch.randint(0, 30, (count,), generator=generator),
        lengths=lengths,
        weights=torch.rand(count, generator=generator) if weighted else None,
    )


def bags(weighted, poolings=(PoolingType.SUM,) * 3):
    names = (["a", "b"], ["c"], ["d"])
    return EmbeddingBagCollection(
        [
            EmbeddingBagConfig(
                name=f"t{i}", embedding_dim=8 * (i + 1), num_embeddings=30, feature_names=f, pooling=p
            )
            for i, (f, p) in enumerate(zip(names, poolings, strict=True))
        ],
        is_weighted=weighted,
    )


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("weighted", [False, True])
def test_bags(precision, weighted):
    collection = bags(weighted)
    stock = quantize_inference_model(
        nn.Sequential(copy.deepcopy(collection)), quantization_dtype=DTYPES[precision]
    )
    ours = quantize_tables(collection, precision)
    expected, found = stock(make_kjt(weighted)), ours(make_kjt(weighted))
    assert found.keys() == expected.keys()
    assert torch.equal(found.values(), expected.values())
    assert found.length_per_key() == expected.length_per_key()


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_events(precision):
    collection = EmbeddingCollection(
        [
            EmbeddingConfig(name=f"t{i}", embedding_dim=8, num_embeddings=30, feature_names=names)
            for i, names in enumerate((["c"], ["a", "d"]))
        ]
    )
    stock = quantize_inference_model(
        nn.Sequential(copy.deepcopy(collection)), quantization_dtype=DTYPES[precision]
    )
    ours = quantize_tables(collection, precision)
    expected, found = stock(make_kjt()), ours(make_kjt())
    assert sorted(found) == sorted(expected) == ["a", "c", "d"]
    for name in found:
        assert torch.equal(found[name].values(), expected[name].values())
        assert torch.equal(found[name].lengths(), expected[name].lengths())


def test_keys_keep_the_order_of_the_float_collection():
    """TorchRec puts tables of one pooling together, which moves keys in a collection of several."""
    collection = bags(False, (PoolingType.SUM, PoolingType.MEAN, PoolingType.SUM))
    expected = collection(make_kjt())
    found = quantize_tables(collection, "int8")(make_kjt())
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found.values(), expected.values().detach(), atol=5e-3, rtol=0)


def test_float_changes_nothing_and_others_are_refused():
    collection = bags(False)
    assert quantize_tables(collection, "float") is collection
    with pytest.raises(SidError, match="'fp8'"):
        quantize_tables(collection, "fp8")
    ec = EmbeddingCollection(
        [EmbeddingConfig(name="a", embedding_dim=8, num_embeddings=30)], need_indices=True
    )
    with pytest.raises(SidError, match="need_indices"):
        quantize_tables(nn.Sequential(ec), "int8")
