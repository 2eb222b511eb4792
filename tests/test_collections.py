"""The collections against dictionaries, forward and gradient, and against TorchRec's own accessors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingConfig, KeyedJaggedTensor
from torchrec.models.dlrm import DLRM
from torchrec.modules.embedding_configs import DataType, PoolingType

from tests.tables.reference import tables_of
from tests.tables.strategies import bags, cardinalities, schemes
from torchrec_sid.collections import SidEmbeddingBagCollection, SidEmbeddingCollection
from torchrec_sid.errors import SidError
from torchrec_sid.spec import SidSpec
from torchrec_sid.tables import HashedId, HashedPrefix, PerLevel, SidEmbeddingBagConfig, SidEmbeddingConfig

DIM = 4


def make_kjt(spec, features, weights=None):
    """Lists of bags per feature -> KJT; items are codes, None (unknown), or an int (raw id)."""
    values, lengths = [], []
    for feature_bags in features.values():
        lengths += [len(bag) for bag in feature_bags]
        for item in (item for bag in feature_bags for item in bag):
            if isinstance(item, tuple):
                item = int(spec.pack(torch.tensor([item])))
            values.append(-1 if item is None else item)
    return KeyedJaggedTensor.from_lengths_sync(
        keys=list(features),
        values=torch.tensor(values, dtype=torch.int64),
        lengths=torch.tensor(lengths, dtype=torch.int64),
        weights=None if weights is None else torch.tensor(weights, dtype=torch.float32),
    )


def weights_by_slot(collection):
    inner = collection.embedding_bags if hasattr(collection, "ebc") else collection.embeddings
    return {name: table.weight for name, table in inner.items()}


@given(st.data())
def test_bags_equal_dictionaries_forward_and_gradient(data):
    sizes = data.draw(cardinalities)
    scheme = data.draw(schemes(len(sizes)))
    batch = data.draw(st.integers(1, 3))
    weighted, mean = data.draw(st.booleans()), data.draw(st.booleans())
    features = {name: data.draw(bags(sizes, batch)) for name in ("item", "history")}
    count = sum(len(bag) for feature in features.values() for bag in feature)
    item_weights = [0.5 + i % 3 for i in range(count)] if weighted else None
    spec = SidSpec(sizes)

    pooling = PoolingType.MEAN if mean else PoolingType.SUM
    ebc = SidEmbeddingBagCollection(
        tables=[
            SidEmbeddingBagConfig(
                name="t",
                embedding_dim=DIM,
                feature_names=["item", "history"],
                scheme=scheme,
                spec=spec,
                pooling=pooling,
            )
        ],
        is_weighted=weighted,
    )
    out = ebc(make_kjt(spec, features, item_weights)).values()
    upstream = torch.rand_like(out)
    out.backward(upstream)

    rows_of = tables_of(scheme, sizes)
    tables = list(weights_by_slot(ebc).values())
    expected = torch.zeros(batch, 2 * DIM)
    gradients = [torch.zeros_like(t) for t in tables]
    position = 0
    for f, feature_bags in enumerate(features.values()):
        block = slice(f * DIM, (f + 1) * DIM)
        for b, bag in enumerate(feature_bags):
            scales = item_weights[position : position + len(bag)] if weighted else [1.0] * len(bag)
            position += len(bag)
            divisor = sum(scales) if mean else 1.0
            for item, scale in zip(bag, (s / divisor for s in scales), strict=True):
                for t, reference in enumerate(rows_of):
                    for row in reference.of(item):
                        expected[b, block] += scale * tables[t][row].detach()
                        gradients[t][row] += scale * upstream[b, block]
    torch.testing.assert_close(out, expected)
    for table, gradient in zip(tables, gradients, strict=True):
        torch.testing.assert_close(
            torch.zeros_like(gradient) if table.grad is None else table.grad, gradient
        )


@given(st.data())
def test_events_equal_dictionaries_forward_and_gradient(data):
    as_bags = data.draw(st.booleans())
    sizes = data.draw(cardinalities)
    scheme = data.draw(schemes(len(sizes)))
    features = {name: data.draw(bags(sizes, 2)) for name in ("item", "history")}
    spec = SidSpec(sizes)
    ec = SidEmbeddingCollection(
        tables=[
            SidEmbeddingConfig(
                name="t",
                embedding_dim=DIM,
                feature_names=["item", "history"],
                scheme=scheme,
                spec=spec,
                events="bag" if as_bags else "rows",
            )
        ]
    )
    out = ec(make_kjt(spec, features))
    rows_of, tables = tables_of(scheme, sizes), list(weights_by_slot(ec).values())
    gradients = [torch.zeros_like(t) for t in tables]
    assert list(out) == ["item", "history"]
    loss = torch.zeros(())
    for name, feature_bags in features.items():
        items = [item for bag in feature_bags for item in bag]
        assert out[name].lengths().tolist() == [len(bag) for bag in feature_bags]
        expected = torch.zeros(len(items), DIM)
        upstream = torch.rand(len(items), DIM)
        for i, item in enumerate(items):
            for t, reference in enumerate(rows_of):
                for row in reference.of(item):
                    expected[i] += tables[t][row].detach()
                    gradients[t][row] += upstream[i]
        torch.testing.assert_close(out[name].values(), expected)
        loss = loss + (out[name].values() * upstream).sum()
    loss.backward()
    for table, gradient in zip(tables, gradients, strict=True):
        torch.testing.assert_close(
            torch.zeros_like(gradient) if table.grad is None else table.grad, gradient
        )


SPEC = SidSpec((8, 8, 5))
BATCH = {
    "item": [[(1, 2, 3)], [(7, 7, 4)], []],
    "history": [[], [(0, 0, 0), None, (1, 2, 4)], [(5, 6, 1)]],
    "user": [[3], [9], [0, 4]],
}


def sid_bag(**options):
    base = {"name": "t_item", "embedding_dim": DIM, "feature_names": ["item"]}
    base |= {"scheme": HashedPrefix(3), "spec": SPEC}
    return SidEmbeddingBagConfig(**{**base, **options})


def test_raw_ids_pass_through_bit_for_bit():
    user = EmbeddingBagConfig(name="t_user", embedding_dim=DIM, num_embeddings=10, feature_names=["user"])
    ebc = SidEmbeddingBagCollection(tables=[sid_bag(), user])
    stock = EmbeddingBagCollection(tables=[user])
    stock.load_state_dict({"embedding_bags.t_user.weight": weights_by_slot(ebc)["t_user"]})
    batch = make_kjt(SPEC, BATCH)
    assert torch.equal(ebc(batch)["user"], stock(batch)["user"])


def test_output_order_is_that_of_the_tables_not_of_the_batch():
    ebc = SidEmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(name="t_user", embedding_dim=2, num_embeddings=10, feature_names=["user"]),
            sid_bag(feature_names=["history", "item"]),
        ]
    )
    out = ebc(make_kjt(SPEC, BATCH))
    assert out.keys() == ["user", "history", "item"]
    assert out.length_per_key() == [2, DIM, DIM]


def test_combined_schemes_sum_or_stand_side_by_side():
    schemes_ = (HashedPrefix(2), PerLevel(separate=True), HashedId(50))
    summed = SidEmbeddingBagCollection(tables=[sid_bag(scheme=schemes_)])
    beside = SidEmbeddingBagCollection(tables=[sid_bag(scheme=schemes_, combine="concat")])
    assert list(weights_by_slot(summed)) == [
        "t_item_prefix",
        "t_item_level_level1",
        "t_item_level_level2",
        "t_item_level_level3",
        "t_item_id",
    ]
    beside.load_state_dict(summed.state_dict())
    batch = make_kjt(SPEC, BATCH)
    blocks = beside(batch)["item"].view(3, len(schemes_), DIM)
    torch.testing.assert_close(summed(batch)["item"], blocks.sum(1))
    for i, scheme in enumerate(schemes_):
        alone = SidEmbeddingBagCollection(tables=[sid_bag(scheme=scheme)])
        tables = [t for name, t in weights_by_slot(summed).items() if name.split("_")[2] == scheme.label]
        for ours, theirs in zip(weights_by_slot(alone).values(), tables, strict=True):
            ours.data.copy_(theirs)
        torch.testing.assert_close(blocks[:, i], alone(batch)["item"])
    assert beside.embedding_bag_configs()[0].embedding_dim == 3 * DIM


def test_events_of_combined_schemes():
    table = {"name": "t", "embedding_dim": DIM, "feature_names": ["history"], "spec": SPEC}
    schemes_ = (HashedPrefix(2), HashedId(50))
    summed = SidEmbeddingCollection(tables=[SidEmbeddingConfig(**table, scheme=schemes_)])
    beside = SidEmbeddingCollection(tables=[SidEmbeddingConfig(**table, scheme=schemes_, combine="concat")])
    beside.load_state_dict(summed.state_dict())
    batch = make_kjt(SPEC, BATCH)
    one, two = summed(batch)["history"], beside(batch)["history"]
    torch.testing.assert_close(one.values(), two.values().view(-1, 2, DIM).sum(1))
    assert two.lengths().tolist() == [0, 3, 1]
    assert (summed.embedding_dim(), beside.embedding_dim()) == (DIM, 2 * DIM)


def test_a_feature_of_two_tables_is_named_as_in_torchrec():
    two = [sid_bag(name=name, scheme=HashedPrefix(d)) for name, d in (("a", 1), ("b", 2))]
    ebc = SidEmbeddingBagCollection(tables=two)
    assert ebc(make_kjt(SPEC, BATCH)).keys() == ["item@a", "item@b"]


def test_accessors_are_those_of_the_replaced_collection():
    ebc = SidEmbeddingBagCollection(
        tables=[
            sid_bag(scheme=HashedPrefix(3, separate=True), data_type=DataType.FP16),
            EmbeddingBagConfig(name="t_user", embedding_dim=DIM, num_embeddings=10, feature_names=["user"]),
        ],
        is_weighted=True,
        device=torch.device("meta"),
    )
    item, user = ebc.embedding_bag_configs()
    assert (item.name, item.feature_names, item.embedding_dim) == ("t_item", ["item"], DIM)
    assert item.num_embeddings == sum(len(w) for n, w in weights_by_slot(ebc).items() if n != "t_user")
    assert (user.name, user.num_embeddings) == ("t_user", 10)
    assert ebc.is_weighted()
    assert ebc.device.type == "meta"
    assert weights_by_slot(ebc)["t_item_depth1"].dtype == torch.float16
    ec = SidEmbeddingCollection(
        tables=[SidEmbeddingConfig(name="history", embedding_dim=DIM, scheme=HashedPrefix(3), spec=SPEC)]
    )
    assert ec.embedding_configs()[0].feature_names == ["history"]
    assert ec.embedding_names_by_table() == [["history"]]
    assert (ec.embedding_dim(), ec.need_indices(), ec.device.type) == (DIM, False, "cpu")


def test_pooling_factors_count_rows_per_example():
    ebc = SidEmbeddingBagCollection(
        tables=[
            sid_bag(feature_names=["item", "history"]),
            EmbeddingBagConfig(name="t_user", embedding_dim=DIM, num_embeddings=10, feature_names=["user"]),
        ]
    )
    assert ebc.pooling_factors({"history": 50.0}) == {"t_item": [3.0, 150.0], "t_user": [1.0]}
    batch = make_kjt(SPEC, BATCH)
    rows = ebc.transform(batch)
    per_item = rows["history"].lengths().sum() / batch["history"].lengths().sum()
    assert per_item == ebc.pooling_factors()["t_item"][1]


def test_init_fn_initialises_every_physical_table():
    ebc = SidEmbeddingBagCollection(
        tables=[sid_bag(scheme=PerLevel(separate=True), init_fn=torch.nn.init.ones_)]
    )
    assert all(bool((w == 1).all()) for w in weights_by_slot(ebc).values())


def test_need_indices_gives_rows_or_refuses():
    table = SidEmbeddingConfig(name="history", embedding_dim=DIM, scheme=HashedPrefix(1), spec=SPEC)
    ec = SidEmbeddingCollection(tables=[table], need_indices=True)
    out = ec(make_kjt(SPEC, BATCH))["history"]
    assert out.weights().tolist() == [0, 8, 1, 5]
    table = SidEmbeddingConfig(name="history", embedding_dim=DIM, scheme=HashedPrefix(2), spec=SPEC)
    with pytest.raises(SidError, match="need_indices"):
        SidEmbeddingCollection(tables=[table], need_indices=True)


def test_variable_batch_per_feature_equals_fixed_batch():
    """Two distinct bags of history serve three examples through inverse indices."""
    ebc = SidEmbeddingBagCollection(
        tables=[sid_bag(feature_names=["item", "history"], scheme=HashedPrefix(2, separate=True))]
    )
    full = make_kjt(SPEC, {"item": BATCH["item"], "history": [BATCH["history"][i] for i in (1, 2, 1)]})
    items = make_kjt(SPEC, {"item": BATCH["item"]})
    distinct = make_kjt(SPEC, {"history": BATCH["history"][1:]})
    variable = KeyedJaggedTensor(
        keys=["item", "history"],
        values=torch.cat([items.values(), distinct.values()]),
        lengths=torch.cat([items.lengths(), distinct.lengths()]),
        stride_per_key_per_rank=[[3], [2]],
        inverse_indices=(["history", "item"], torch.tensor([[0, 1, 0], [0, 1, 2]])),
    )
    torch.testing.assert_close(ebc(variable).values(), ebc(full).values())


def test_it_drops_into_a_dlrm():
    ebc = SidEmbeddingBagCollection(
        tables=[
            sid_bag(feature_names=["item", "history"], scheme=(HashedPrefix(3), HashedId(50))),
            EmbeddingBagConfig(name="t_user", embedding_dim=DIM, num_embeddings=10, feature_names=["user"]),
        ]
    )
    model = DLRM(ebc, dense_in_features=2, dense_arch_layer_sizes=[8, DIM], over_arch_layer_sizes=[5, 1])
    assert model(torch.rand(3, 2), make_kjt(SPEC, BATCH)).shape == (3, 1)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: SidEmbeddingBagCollection(tables=[sid_bag(), sid_bag(feature_names=["b"])]), "used twice"),
        (lambda: SidEmbeddingBagCollection(tables=[sid_bag(spec=None)]), "no spec"),
        (
            lambda: SidEmbeddingBagCollection(
                tables=[sid_bag(), sid_bag(name="b", spec=SidSpec((8, 8, 6)))]
            ),
            "one kind of SID",
        ),
        (
            lambda: SidEmbeddingBagCollection(
                tables=[
                    sid_bag(),
                    EmbeddingBagConfig(name="r", embedding_dim=4, num_embeddings=9, feature_names=["item"]),
                ]
            ),
            "'item'.*'r' takes raw ids",
        ),
        (
            lambda: SidEmbeddingBagCollection(tables=[EmbeddingConfig(num_embeddings=4, embedding_dim=4)]),
            "EmbeddingBagConfig",
        ),
        (lambda: sid_bag(feature_names="item"), "list of names"),
        (lambda: sid_bag(feature_names=["item", "item"]), "repeats a feature"),
        (lambda: sid_bag(scheme=()), "no scheme"),
        (lambda: sid_bag(scheme=(HashedPrefix(1), HashedPrefix(2))), "repeat a kind"),
        (lambda: sid_bag(combine="max"), "'max'"),
        (lambda: sid_bag(embedding_dim=0), "embedding_dim=0"),
        (lambda: sid_bag(spec=SidSpec((256,) * 8)), "64 bits"),
        (
            lambda: SidEmbeddingCollection(
                tables=[
                    SidEmbeddingConfig(name=n, embedding_dim=d, scheme=HashedPrefix(1), spec=SPEC)
                    for n, d in (("a", 4), ("b", 8))
                ]
            ),
            "one dimension",
        ),
    ],
)
def test_contradictions_are_refused_at_construction(make, says):
    with pytest.raises(SidError, match=says):
        make()
