"""Pieces and SIDE features in the collections, against the sentencepiece library and SideFeatures."""

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchrec import KeyedJaggedTensor
from torchrec.modules.embedding_configs import PoolingType

from tests.tables.strategies import bags
from tests.tables.test_catalog_map import TableCatalog
from tests.tables.test_pieces import skewed
from tests.test_collections import make_kjt, weights_by_slot
from torchrec_sid.collections import SidEmbeddingBagCollection, SidEmbeddingCollection
from torchrec_sid.errors import SidError
from torchrec_sid.side import FrozenBasis, SideFeatures, SideFeaturesConfig
from torchrec_sid.spec import SidSpec
from torchrec_sid.tables import (
    HashedId,
    PieceTrainerConfig,
    SentencePiece,
    Side,
    SidEmbeddingBagConfig,
    SidEmbeddingConfig,
    train_pieces,
)
from torchrec_sid.tables.sentencepiece import to_sentences

DIM = 4
SIZES = (5, 5, 5)
SPEC = SidSpec(SIZES)


@functools.cache
def vocabulary(model):
    return train_pieces(SPEC, skewed(SPEC, 200), PieceTrainerConfig(60, model))


def rows_of(pieces, item):
    """Rows of one item by the library; the unknown item has the last."""
    if item is None:
        return [len(pieces)]
    return pieces.processor().encode(to_sentences(SPEC, torch.tensor([item])))[0]


@given(st.data())
def test_pieces_equal_the_library_forward_and_gradient(data):
    pieces = vocabulary(data.draw(st.sampled_from(["unigram", "bpe"])))
    weighted, mean = data.draw(st.booleans()), data.draw(st.booleans())
    feature = data.draw(bags(SIZES, 3))
    items = [item for bag in feature for item in bag]
    weights = [0.5 + i % 3 for i in range(len(items))]
    batch = make_kjt(SPEC, {"item": feature}, weights if weighted else None)
    scheme = SentencePiece(pieces)
    bag = SidEmbeddingBagCollection(
        tables=[
            SidEmbeddingBagConfig(
                name="item",
                embedding_dim=DIM,
                scheme=scheme,
                spec=SPEC,
                pooling=PoolingType.MEAN if mean else PoolingType.SUM,
            )
        ],
        is_weighted=weighted,
    )
    ec = SidEmbeddingCollection(
        tables=[SidEmbeddingConfig(name="item", embedding_dim=DIM, scheme=scheme, spec=SPEC)]
    )
    (table,), (rows_table,) = weights_by_slot(bag).values(), weights_by_slot(ec).values()
    assert len(table) == len(pieces) + 1

    pooled, upstream = torch.zeros(3, DIM), torch.rand(3, DIM)
    events, events_upstream = torch.zeros(len(items), DIM), torch.rand(len(items), DIM)
    gradient, events_gradient = torch.zeros_like(table), torch.zeros_like(rows_table)
    position = 0
    for b, contents in enumerate(feature):
        scales = weights[position : position + len(contents)] if weighted else [1.0] * len(contents)
        divisor = sum(scales) if mean else 1.0
        for item, scale in zip(contents, scales, strict=True):
            for row in rows_of(pieces, item):
                pooled[b] += scale / divisor * table[row].detach()
                gradient[row] += scale / divisor * upstream[b]
                events[position] += rows_table[row].detach()
                events_gradient[row] += events_upstream[position]
            position += 1
    out = bag(batch).values()
    out.backward(upstream)
    torch.testing.assert_close(out, pooled)
    torch.testing.assert_close(table.grad, gradient)
    sequence = ec(batch)["item"]
    sequence.values().backward(events_upstream)
    torch.testing.assert_close(sequence.values(), events)
    torch.testing.assert_close(rows_table.grad, events_gradient)
    assert sequence.lengths().tolist() == [len(contents) for contents in feature]


def catalog(step=1):
    codes = torch.cartesian_prod(*[torch.arange(k) for k in SIZES])
    return TableCatalog(SPEC, {step * i: int(s) for i, s in enumerate(SPEC.pack(codes))})


@pytest.mark.parametrize("step", [1, 9])
@pytest.mark.parametrize("model", ["unigram", "bpe"])
def test_precomputed_pieces_are_those_of_each_batch(model, step):
    table = {"name": "item", "embedding_dim": DIM}
    collections = [
        SidEmbeddingBagCollection(
            tables=[SidEmbeddingBagConfig(**table, scheme=SentencePiece(vocabulary(model), precompute))],
            catalog=catalog(step),
        )
        for precompute in (False, True)
    ]
    collections[1].load_state_dict(collections[0].state_dict())
    ids = torch.arange(-3, 5**3 * step + 3).tolist()
    batch = make_kjt(SPEC, {"item": [ids[:20], [], ids[20:]]})
    one, two = (collection(batch).values() for collection in collections)
    assert torch.equal(one, two)
    counted = [int(c.transform.lookups[0].unknown_count) for c in collections]
    assert counted == [len(ids) - 5**3] * 2


def test_pooling_factor_of_pieces_is_their_mean():
    pieces = vocabulary("unigram")
    bag = SidEmbeddingBagCollection(
        tables=[
            SidEmbeddingBagConfig(name="item", embedding_dim=DIM, scheme=SentencePiece(pieces), spec=SPEC)
        ]
    )
    assert 1 < pieces.pieces_per_item < 3
    assert bag.pooling_factors({"item": 10.0}) == {"item": [10 * pieces.pieces_per_item]}


BATCH = {"item": [[(0, 1, 2), None], [], [(4, 4, 4)]]}
BASIS = FrozenBasis(
    SPEC, tuple(torch.randn(5, 6, generator=torch.Generator().manual_seed(i)) for i in range(3))
)


def side_vectors(config, basis, items):
    features = SideFeatures(SPEC, config, basis=basis)
    zero = torch.zeros(1, features.dim)
    return [zero if i is None else features(torch.tensor([i])) for i in items]


@pytest.mark.parametrize(
    ("config", "basis", "dim"),
    [
        (SideFeaturesConfig("digits"), None, 3),
        (SideFeaturesConfig("one_hot"), None, 12),
        (SideFeaturesConfig("basis"), BASIS, 6),
    ],
)
@pytest.mark.parametrize("weighted", [False, True])
def test_side_needs_no_table(config, basis, dim, weighted):
    table = {"name": "item", "embedding_dim": dim, "scheme": Side(config, basis), "spec": SPEC}
    bag = SidEmbeddingBagCollection(tables=[SidEmbeddingBagConfig(**table)], is_weighted=weighted)
    ec = SidEmbeddingCollection(tables=[SidEmbeddingConfig(**table)])
    assert not list(bag.parameters()) + list(ec.parameters())
    batch = make_kjt(SPEC, BATCH, [2.0, 5.0, 3.0] if weighted else None)
    first, unknown, last = side_vectors(config, basis, [(0, 1, 2), None, (4, 4, 4)])
    one, three = (2.0, 3.0) if weighted else (1.0, 1.0)
    torch.testing.assert_close(bag(batch)["item"], torch.cat([one * first, 0 * first, three * last]))
    torch.testing.assert_close(ec(batch)["item"].values(), torch.cat([first, unknown, last]))
    assert ec(batch)["item"].lengths().tolist() == [2, 0, 1]
    assert bag.embedding_bag_configs()[0].num_embeddings == 0
    assert bag.pooling_factors() == {}
    assert (bag.is_weighted(), bag.device.type) == (weighted, "cpu")


@pytest.mark.parametrize("combine", ["sum", "concat"])
def test_side_beside_a_memory_table(combine):
    side = Side(project=combine == "sum")
    table = {"name": "item", "embedding_dim": DIM, "spec": SPEC, "combine": combine}
    both = SidEmbeddingBagCollection(tables=[SidEmbeddingBagConfig(**table, scheme=(side, HashedId(50)))])
    alone = SidEmbeddingBagCollection(tables=[SidEmbeddingBagConfig(**table, scheme=HashedId(50))])
    alone.ebc.embedding_bags["item"].weight.data.copy_(weights_by_slot(both)["item_id"])
    batch = make_kjt(SPEC, BATCH)
    first, _, last = side_vectors(None, None, [(0, 1, 2), None, (4, 4, 4)])
    vectors = torch.cat([first, 0 * first, last])
    if combine == "sum":
        expected = vectors @ both.combine.sides[0].matrix.weight.t() + alone(batch)["item"]
    else:
        expected = torch.cat([vectors, alone(batch)["item"]], dim=1)
    torch.testing.assert_close(both(batch)["item"], expected)
    both(batch).values().sum().backward()
    assert all(p.grad is not None for p in both.parameters())


def test_side_of_shared_bags_is_spread_over_the_examples():
    bag = SidEmbeddingBagCollection(
        tables=[
            SidEmbeddingBagConfig(
                name="item", embedding_dim=3, scheme=Side(), spec=SPEC, pooling=PoolingType.MEAN
            )
        ]
    )
    distinct = make_kjt(SPEC, {"item": BATCH["item"][:2]})
    variable = KeyedJaggedTensor(
        keys=["item"],
        values=distinct.values(),
        lengths=distinct.lengths(),
        stride_per_key_per_rank=[[2]],
        inverse_indices=(["item"], torch.tensor([[0, 1, 0]])),
    )
    full = make_kjt(SPEC, {"item": [BATCH["item"][i] for i in (0, 1, 0)]})
    torch.testing.assert_close(bag(variable).values(), bag(full).values())


def test_calibration_uses_the_catalog():
    few = TableCatalog(SPEC, {i: int(SPEC.pack(torch.tensor([[i % 2, 0, 4]]))) for i in range(10)})
    bag = SidEmbeddingBagCollection(
        tables=[SidEmbeddingBagConfig(name="item", embedding_dim=3, scheme=Side(calibrate=True))],
        catalog=few,
    )
    vectors = bag(make_kjt(SPEC, {"item": [[i] for i in range(10)]})).values()
    torch.testing.assert_close(vectors.mean(0), torch.zeros(3))
    torch.testing.assert_close(vectors.square().sum(1).mean(), torch.tensor(3.0))


def one_table(**options):
    base = {"name": "item", "embedding_dim": DIM, "spec": SPEC}
    return SidEmbeddingBagCollection(tables=[SidEmbeddingBagConfig(**{**base, **options})])


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: one_table(scheme=Side()), "3 dimensions, embedding_dim=4.*project=True"),
        (lambda: one_table(scheme=Side(calibrate=True, project=True)), "calibrate=True without a catalog"),
        (lambda: one_table(scheme=SentencePiece(vocabulary("bpe"), precompute=True)), "without a catalog"),
        (
            lambda: one_table(scheme=SentencePiece(vocabulary("bpe")), spec=SidSpec((5, 5))),
            "pieces of SIDs",
        ),
    ],
)
def test_contradictions_are_refused(make, says):
    with pytest.raises(SidError, match=says):
        make()
