"""`replace_embeddings` on TorchRec's models and on nested ones: the same outputs from other tables."""

import pytest
import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig
from torchrec.inference.modules import quantize_inference_model
from torchrec.models.deepfm import SimpleDeepFMNN
from torchrec.models.dlrm import DLRM, DLRM_DCN
from torchrec.modules.embedding_configs import DataType, PoolingType
from torchrec.modules.feature_processor_ import PositionWeightedModule
from torchrec.modules.fp_embedding_modules import FeatureProcessedEmbeddingBagCollection

from tests.tables.test_catalog_map import TableCatalog
from tests.test_collections import make_kjt
from torchrec_sid.collections import SidEmbeddingBagCollection, SidEmbeddingCollection
from torchrec_sid.errors import SidError
from torchrec_sid.replace import replace_embeddings
from torchrec_sid.side import SideFeaturesConfig
from torchrec_sid.spec import SidSpec
from torchrec_sid.tables import HashedId, HashedPrefix, PerLevel, Side

DIM = 8
SPEC = SidSpec((4, 4, 4))
CATALOG = TableCatalog(SPEC, {i: i % 64 for i in range(100)})
PREFIX = HashedPrefix(depth=3)
ONE_HOT = SideFeaturesConfig("one_hot")
BATCH = {
    "user": [[3], [9], [0, 4]],
    "item": [[1], [99], []],
    "history": [[], [0, 50, 7], [8]],
}


def bag(name, rows, features, **options):
    return EmbeddingBagConfig(
        name=name, embedding_dim=DIM, num_embeddings=rows, feature_names=features, **options
    )


def make_ebc(**options):
    return EmbeddingBagCollection(
        tables=[bag("t_user", 10, ["user"]), bag("t_item", 100, ["item", "history"])], **options
    )


def dlrm():
    return DLRM(
        make_ebc(), dense_in_features=2, dense_arch_layer_sizes=[4, DIM], over_arch_layer_sizes=[4, 1]
    )


def dlrm_dcn():
    return DLRM_DCN(
        make_ebc(),
        dense_in_features=2,
        dense_arch_layer_sizes=[4, DIM],
        over_arch_layer_sizes=[4, 1],
        dcn_num_layers=2,
        dcn_low_rank_dim=4,
    )


def deepfm():
    return SimpleDeepFMNN(2, make_ebc(), hidden_layer_size=4, deep_fm_dimension=4)


def batch():
    return make_kjt(SPEC, BATCH)


@pytest.mark.parametrize("make", [dlrm, dlrm_dcn, deepfm])
def test_torchrec_models_train_after_the_swap(make):
    model = make()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    report = replace_embeddings(model, {"item": PREFIX, "history": PREFIX}, catalog=CATALOG)
    assert report.model is model
    assert type(model.sparse_arch.embedding_bag_collection) is SidEmbeddingBagCollection
    (change,) = report.collections
    assert change.path == "sparse_arch.embedding_bag_collection"
    assert [(t.name, t.rows) for t in change.before] == [("t_user", 10), ("t_item", 100)]
    assert [(t.name, t.rows) for t in change.after] == [("t_user", 10), ("t_item", 85)]
    assert (report.rows_before, report.rows_after) == (110, 95)
    assert (report.bytes_before, report.bytes_after) == (110 * DIM * 4, 95 * DIM * 4)
    dense = {n: p for n, p in model.named_parameters() if "embedding_bags" not in n}
    assert all(torch.equal(p, before[n]) for n, p in dense.items())
    model(torch.rand(3, 2), batch()).sum().backward()
    assert all(p.grad is not None for p in model.sparse_arch.parameters())


@pytest.mark.parametrize(
    ("weighted", "pooling"),
    [(False, PoolingType.SUM), (True, PoolingType.SUM), (False, PoolingType.MEAN)],
)
def test_a_replacement_that_can_remember_every_id_gives_the_same_output(weighted, pooling):
    """With one row per SID and equal SIDs for equal ids, only the rows' order differs."""
    spec = SidSpec((100,))
    identity = TableCatalog(spec, {i: i for i in range(100)})
    ebc = EmbeddingBagCollection(
        tables=[
            bag("t", 100, ["item", "user", "history"], pooling=pooling),
            bag("t_user", 10, ["other"], pooling=pooling),
        ],
        is_weighted=weighted,
    )
    features = {**BATCH, "other": BATCH["user"]}
    weights = [float(i) for i in range(1, 15)] if weighted else None
    kjt = make_kjt(spec, features, weights)
    expected = ebc(kjt)
    new = replace_embeddings(
        ebc, {"item": HashedPrefix(1), "history": HashedPrefix(1)}, catalog=identity
    ).model
    with torch.no_grad():
        new.ebc.embedding_bags["t_sid"].weight[:100] = ebc.embedding_bags["t"].weight
    got = new(kjt)
    assert got.keys() == expected.keys() == ["item", "user", "history", "other"]
    torch.testing.assert_close(got.values(), expected.values())
    assert got.length_per_key() == expected.length_per_key()


class Nested(nn.Module):
    """A user's own model: collections in a list and in a child, one of them at two places."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList([make_ebc(), nn.Linear(1, 1)])
        self.child = nn.Module()
        self.child.sequence = EmbeddingCollection(
            tables=[
                EmbeddingConfig(
                    name="e", embedding_dim=DIM, num_embeddings=100, feature_names=["history", "user"]
                )
            ]
        )
        self.again = self.child.sequence

    def forward(self, features):
        return self.parts[0](features), self.child.sequence(features), self.again(features)


def test_nested_models_and_shared_collections():
    model = Nested()
    user_table = model.child.sequence.embeddings["e"].weight
    report = replace_embeddings(model, {"history": PREFIX}, catalog=CATALOG)
    assert [c.path for c in report.collections] == ["parts.0", "child.sequence"]
    assert model.again is model.child.sequence
    assert isinstance(model.child.sequence, SidEmbeddingCollection)
    assert model.child.sequence.ec.embeddings["e"].weight is user_table, "what stays keeps its parameter"
    pooled, sequence, again = model(batch())
    assert pooled.keys() == ["user", "item", "history"]
    assert list(sequence) == ["history", "user"]
    assert sequence["history"].values().shape == (4, DIM)
    assert torch.equal(sequence["history"].values(), again["history"].values())
    maps = [m.transform.lookups for m in (model.parts[0], model.child.sequence)]
    found = {id(lookup) for lookups in maps for lookup in lookups if hasattr(lookup, "fingerprint")}
    assert len(found) == 1, "one map for all collections"
    assert "parts.0: EmbeddingBagCollection" in str(report)


def test_schemes_of_one_table_may_differ():
    ebc = make_ebc()
    report = replace_embeddings(
        ebc, {"item": PREFIX, "history": (PerLevel(), Side(ONE_HOT, project=True))}, catalog=CATALOG
    )
    names = [t.name for t in report.collections[0].after]
    assert names == ["t_user", "t_item_sid1", "t_item_sid2_level"]
    assert report.model(batch()).keys() == ["user", "item", "history"]


def test_packed_sids_without_a_catalog():
    new = replace_embeddings(make_ebc(), {"item": PREFIX}, spec=SPEC).model
    assert new(make_kjt(SPEC, {**BATCH, "item": [[(1, 2, 3)], [None], []]})).values().shape == (3, 3 * DIM)


def test_types_devices_and_initialisation_are_kept():
    def ones(weight):
        return nn.init.ones_(weight)

    tables = [
        bag("t_half", 100, ["item"], data_type=DataType.FP16),
        bag("t_ones", 100, ["history"], init_fn=ones),
        bag("t_user", 10, ["user"]),
    ]
    new = replace_embeddings(
        EmbeddingBagCollection(tables), {"item": PREFIX, "history": PREFIX}, spec=SPEC
    ).model.ebc
    assert new.embedding_bags["t_half"].weight.dtype == torch.float16
    assert bool((new.embedding_bags["t_ones"].weight == 1).all())
    limit = 1 / 85**0.5
    assert float(new.embedding_bags["t_half"].weight.abs().max()) <= limit + 1e-3
    meta = replace_embeddings(
        make_ebc(device=torch.device("meta")), {"item": PREFIX}, catalog=CATALOG
    ).model
    assert meta.ebc.embedding_bags["t_item"].weight.is_meta
    assert not [b for b in meta.buffers() if b.is_meta]


def test_a_given_range_of_initial_weights_is_kept():
    table = bag("t", 100, ["item"], weight_init_min=0.25, weight_init_max=0.5)
    new = replace_embeddings(EmbeddingBagCollection([table]), {"item": PREFIX}, spec=SPEC).model
    weight = new.ebc.embedding_bags["t"].weight
    assert 0.25 <= float(weight.min()) < float(weight.max()) <= 0.5
    assert len(weight) == 85


def test_a_feature_without_a_table_is_described_with_no_rows():
    """Consumers size themselves by these; TorchRec's default range divides by the rows."""
    new = replace_embeddings(make_ebc(), {"item": Side(ONE_HOT, project=True)}, catalog=CATALOG).model
    (described,) = [c for c in new.embedding_bag_configs() if c.feature_names == ["item"]]
    assert (described.num_embeddings, described.embedding_dim) == (0, DIM)
    assert described.get_weight_init_min() == described.get_weight_init_max() == 0.0
    assert new(batch()).keys() == ["user", "item", "history"]


class Subclass(EmbeddingBagCollection):
    pass


def wrapped():
    return FeatureProcessedEmbeddingBagCollection(
        EmbeddingBagCollection([bag("t", 100, ["item"])], is_weighted=True),
        {"item": PositionWeightedModule(4)},
    )


def already():
    model = dlrm()
    replace_embeddings(model, {"item": PREFIX}, catalog=CATALOG)
    return model


def quantized():
    return quantize_inference_model(dlrm())


@pytest.mark.parametrize(
    ("make", "features", "says"),
    [
        (dlrm, {}, "no features"),
        (dlrm, {"itm": PREFIX}, r"'itm'.*\['history', 'item', 'user'\]"),
        (lambda: nn.Linear(1, 1), {"item": PREFIX}, "none"),
        (lambda: nn.ModuleList([Subclass([bag("t", 100, ["item"])])]), {"item": PREFIX}, "'0'.*a Subclass"),
        (wrapped, {"item": PREFIX}, "FeatureProcessedEmbeddingBagCollection"),
        (already, {"item": PREFIX}, "'item'.*already"),
        (quantized, {"item": PREFIX}, "quantized"),
        (dlrm, {"item": Side(ONE_HOT)}, "sparse_arch.embedding_bag_collection, table.*12 dimensions"),
        (dlrm, {"item": HashedPrefix(4)}, "depth 4"),
    ],
)
def test_what_cannot_be_replaced_is_refused_and_left_alone(make, features, says):
    model = make()
    names = [(n, type(m)) for n, m in model.named_modules()]
    with pytest.raises(SidError, match=says):
        replace_embeddings(model, features, catalog=CATALOG)
    assert [(n, type(m)) for n, m in model.named_modules()] == names


def test_need_indices_of_many_rows_is_refused():
    ec = EmbeddingCollection(
        [EmbeddingConfig(name="item", embedding_dim=4, num_embeddings=9)], need_indices=True
    )
    with pytest.raises(SidError, match="need_indices"):
        replace_embeddings(ec, {"item": PREFIX}, spec=SPEC)


def test_hashed_ids_of_raw_ids_beside_prefixes():
    new = replace_embeddings(make_ebc(), {"item": (PREFIX, HashedId(50))}, catalog=CATALOG).model
    assert new.transform.catalog_fingerprints == {"item": CATALOG.fingerprint}
    assert new(batch()).values().shape == (3, 3 * DIM)
