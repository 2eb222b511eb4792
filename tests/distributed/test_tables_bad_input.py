"""Under DistributedModelParallel a bad batch is refused before TorchRec reads wrong rows."""

import torch
import torch.distributed as dist
from torchrec import KeyedJaggedTensor
from torchrec.distributed import DistributedModelParallel

from tests.distributed.launch import run_ranks
from tests.distributed.tables_model import SPEC, Batch, Model, make_batch, part, shard
from torchrec_sid.collections import SidEmbeddingBagCollection
from torchrec_sid.errors import SidError
from torchrec_sid.parallel.sharders import sid_sharders
from torchrec_sid.replace import replace_embeddings
from torchrec_sid.spec import SidSpec
from torchrec_sid.tables import HashedId, HashedPrefix, SidEmbeddingBagConfig

OUTSIDE = int(SPEC.pack(torch.tensor([[7, 7, 4]]))) + 1


def with_values(batch, values):
    kjt = batch.features
    spoilt = KeyedJaggedTensor(
        keys=kjt.keys(), values=values, lengths=kjt.lengths(), stride=kjt.stride(), weights=None
    )
    return Batch(spoilt, batch.labels)


def first_is(value):
    return lambda batch: with_values(batch, torch.cat([torch.tensor([value]), batch.features.values()[1:]]))


def renamed(batch):
    kjt = batch.features
    keys = ["itm" if key == "item" else key for key in kjt.keys()]  # noqa: SIM118
    return Batch(KeyedJaggedTensor(keys, kjt.values(), lengths=kjt.lengths()), batch.labels)


def one_value_short(batch):
    return with_values(batch, batch.features.values()[:-1].contiguous())


BAD = {
    "code": (first_is(OUTSIDE), "feature 'item'", "code 5 at level 3"),
    "too many levels": (first_is(1 << SPEC.bits), "feature 'item'", "outside 0..2**"),
    "negative": (first_is(-2), "feature 'item'", "packed SID -2"),
    "float": (lambda b: with_values(b, b.features.values().float()), "'item'", "float32"),
    "strided": (
        lambda b: with_values(b, torch.stack([b.features.values()] * 2, dim=1)[:, 0]),
        "'item'",
        "not contiguous",
    ),
    "2-D": (
        lambda b: with_values(b, torch.stack([b.features.values()] * 3, dim=1)),
        "'item'",
        "SidSpec.pack",
    ),
    "unknown feature": (renamed, "feature 'item'", "rename it"),
    "lengths": (one_value_short, "'item'", "lengths sum to"),
}
"""Name -> what to do to a batch, and what the error says."""


def said(call):
    try:
        call()
    except SidError as error:
        return str(error)
    return "nothing"


def weighted_model():
    """Two features, weighted."""
    table = {"embedding_dim": 8, "scheme": HashedPrefix(2), "spec": SidSpec((8, 8))}
    bags = SidEmbeddingBagCollection(
        [SidEmbeddingBagConfig(name="item", **table), SidEmbeddingBagConfig(name="other", **table)],
        is_weighted=True,
    )
    return torch.nn.Sequential(bags)


def weighted_batch(lengths=(1, 1, 1, 1), weights=True):
    values = torch.arange(sum(lengths)) % 8
    return KeyedJaggedTensor(
        ["item", "other"],
        values,
        lengths=torch.tensor(lengths),
        weights=torch.ones(len(values)) if weights else None,
    )


def on_each_rank():
    sharded, _ = shard(Model(), ("row_wise", "row_wise"), 2)
    found = {}
    for name, (spoil, *_) in BAD.items():
        batch = spoil(part(make_batch(0), dist.get_rank(), 2))
        found[name] = said(lambda b=batch: sharded(b))
    found["sharded"] = said(lambda: replace_embeddings(sharded, {"user": HashedId(5)}, spec=SPEC))
    weighted = DistributedModelParallel(
        weighted_model(), device=torch.device("cpu"), sharders=sid_sharders()
    )
    found["good"] = said(lambda: weighted(weighted_batch()))
    found["no weights"] = said(lambda: weighted(weighted_batch(weights=False)))
    return found


def test_bad_batches_are_refused_under_dmp():
    for found in run_ranks(on_each_rank, 2):
        for name, (_, *says) in BAD.items():
            assert all(words in found[name] for words in says), (name, found[name])
        assert "the model is sharded" in found["sharded"]
        assert found["good"] == "nothing"
        assert "no weights" in found["no weights"]
