import pytest
import torch
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from tests.parallel.toy import Toy
from torchrec_sid.errors import SidError
from torchrec_sid.parallel.embedding_tables import LocalShard, find_tables, local_shards
from torchrec_sid.parallel.initialise import copy_full_into_sharded, initialise_tables


def drawn(model, seed):
    initialise_tables(model, find_tables(model), seed)
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def test_the_seed_decides_and_nothing_else():
    torch.manual_seed(1)
    first = drawn(Toy(), 3)
    torch.manual_seed(2)
    again, other = drawn(Toy(), 3), drawn(Toy(), 4)
    keys = [table.weight_key for table in find_tables(Toy()).values()]
    assert len(keys) == 3
    for key in keys:
        assert torch.equal(first[key], again[key])
        assert not torch.equal(first[key], other[key])


def test_the_global_generator_is_left_where_it_was():
    model = Toy()
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    drawn(model, 6)
    assert torch.equal(torch.rand(3), expected)


def test_tables_differ_and_follow_torchrecs_default():
    weights = drawn(Toy(rows=10_000), 0)
    a, b = weights["ebc.embedding_bags.bag_a.weight"], weights["ebc.embedding_bags.bag_b.weight"]
    assert not torch.equal(a, b)
    bound = 10_000**-0.5
    assert a.abs().max() <= bound
    assert abs(a.mean()) < bound / 50
    assert abs(a.std() - bound / 3**0.5) < bound / 50


def test_init_fn_and_bounds_of_the_configuration_count():
    ebc = EmbeddingBagCollection(
        [
            EmbeddingBagConfig(
                name="ones",
                embedding_dim=4,
                num_embeddings=5,
                feature_names=["a"],
                init_fn=lambda weight: nn.init.constant_(weight, 2.0),
            ),
            EmbeddingBagConfig(
                name="bounds",
                embedding_dim=4,
                num_embeddings=5,
                feature_names=["b"],
                weight_init_min=3.0,
                weight_init_max=4.0,
            ),
        ]
    )
    weights = drawn(ebc, 0)
    assert torch.all(weights["embedding_bags.ones.weight"] == 2)
    assert torch.all(
        (weights["embedding_bags.bounds.weight"] >= 3) & (weights["embedding_bags.bounds.weight"] <= 4)
    )


class Blocked(nn.Module):
    """A table whose state is given as any blocks, as a sharded model's would be."""

    def __init__(self, weight, blocks):
        super().__init__()
        self.blocks = [LocalShard(weight[r : r + h, c : c + w], r, c) for r, c, h, w in blocks]


@pytest.mark.parametrize("dim", [4, 6])
def test_any_block_of_a_table_is_drawn_alike(monkeypatch, dim):
    rows = 700_000
    ec = EmbeddingCollection(
        [EmbeddingConfig(name="t", embedding_dim=dim, num_embeddings=rows, feature_names=["f"])]
    )
    whole = drawn(ec, 9)["embeddings.t.weight"]
    pieces = torch.full_like(whole, torch.nan)
    blocks = [
        (0, 0, 300_001, 4),
        (300_001, 0, rows - 300_001, 2),
        (300_001, 2, rows - 300_001, 2),
        (0, 4, rows, dim - 4),
    ]
    model = Blocked(pieces, blocks)
    from torchrec_sid.parallel import initialise

    monkeypatch.setattr(initialise, "local_shards", lambda weight: iter(model.blocks))
    initialise_tables(ec, find_tables(ec), 9)
    assert torch.equal(pieces, whole)


def test_copy_into_an_unsharded_model():
    source, target = Toy(), Toy()
    copy_full_into_sharded(target.state_dict(), source.state_dict())
    for key, weight in source.state_dict().items():
        assert torch.equal(target.state_dict()[key], weight)
    with pytest.raises(SidError, match="is in one model and not in the other"):
        copy_full_into_sharded(target.state_dict(), {})


def test_local_shards_of_a_plain_tensor():
    weight = torch.ones(2, 3)
    [shard] = local_shards(weight)
    assert shard.tensor is weight
    assert (shard.row, shard.column) == (0, 0)
