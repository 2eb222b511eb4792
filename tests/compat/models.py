"""Small models in the shapes that people train with TorchRec, and what their tables can be replaced by."""

from dataclasses import dataclass

import torch
from torch import nn
from torchrec import (
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    EmbeddingCollection,
    EmbeddingConfig,
    KeyedJaggedTensor,
)
from torchrec.models.deepfm import SimpleDeepFMNN
from torchrec.models.dlrm import DLRM, DLRM_DCN
from torchrec.modules.embedding_configs import PoolingType
from torchrec.streamable import Pipelineable

from tests.tables.test_catalog_map import TableCatalog
from torchrec_sid.replace import replace_embeddings
from torchrec_sid.spec import SidSpec
from torchrec_sid.tables import HashedId, HashedPrefix

ITEMS, USERS, DIM = 100, 16, 8
SPEC = SidSpec((4, 5, 5))
CATALOG = TableCatalog(
    SPEC, {i: int(SPEC.pack(torch.tensor([[i % 4, i // 4 % 5, i // 20]]))) for i in range(ITEMS)}
)


@dataclass
class Batch(Pipelineable):
    """Dense features, sparse ones and labels of some examples."""

    dense: torch.Tensor
    sparse: KeyedJaggedTensor
    labels: torch.Tensor

    def to(self, device, non_blocking=False):
        return Batch(self.dense.to(device), self.sparse.to(device, non_blocking), self.labels.to(device))

    def record_stream(self, stream):
        self.sparse.record_stream(stream)

    def pin_memory(self):
        return self


def make_batch(seed, rank=0, ranks=1, size=8):
    """Rank ``rank``'s examples of a batch of ``size``: items, histories with empty bags, users."""
    generator = torch.Generator().manual_seed(seed)
    lengths = {
        "item": torch.ones(size, dtype=torch.int64),
        "history": torch.randint(0, 5, (size,), generator=generator),
        "user": torch.randint(0, 3, (size,), generator=generator),
    }
    limits = {"item": ITEMS, "history": ITEMS, "user": USERS}
    values = {
        name: torch.randint(0, limits[name], (int(n.sum()),), generator=generator)
        for name, n in lengths.items()
    }
    dense = torch.rand(size, 3, generator=generator)
    labels = torch.randint(0, 2, (size,), generator=generator).float()
    mine = slice(rank * size // ranks, (rank + 1) * size // ranks)
    own = {name: torch.cat(v.split(lengths[name].tolist())[mine]) for name, v in values.items()}
    kjt = KeyedJaggedTensor.from_lengths_sync(
        list(own), torch.cat(list(own.values())), torch.cat([n[mine] for n in lengths.values()])
    )
    return Batch(dense[mine], kjt, labels[mine])


def bags(**options):
    """A table for items and histories, one for users."""
    return EmbeddingBagCollection(
        [
            EmbeddingBagConfig(
                name="t_item", embedding_dim=DIM, num_embeddings=ITEMS, feature_names=["item", "history"]
            ),
            EmbeddingBagConfig(
                name="t_user", embedding_dim=DIM, num_embeddings=USERS, feature_names=["user"]
            ),
        ],
        **options,
    )


def events(*features, table="t_events"):
    """A vector for each item of some features."""
    config = EmbeddingConfig(
        name=table, embedding_dim=DIM, num_embeddings=ITEMS, feature_names=list(features)
    )
    return EmbeddingCollection([config])


class Train(nn.Module):
    """A model of ``(dense, sparse) -> logits`` with its loss, as pipelines take it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        logits = self.model(batch.dense, batch.sparse).reshape(-1)
        return nn.functional.binary_cross_entropy_with_logits(logits, batch.labels), logits.detach()


class Pooled(nn.Module):
    """Two collections side by side, one of means."""

    def __init__(self):
        super().__init__()
        mean = EmbeddingBagConfig(
            name="t_mean",
            embedding_dim=DIM,
            num_embeddings=ITEMS,
            feature_names=["history"],
            pooling=PoolingType.MEAN,
        )
        self.sum, self.mean = bags(), EmbeddingBagCollection([mean])
        self.out = nn.Linear(4 * DIM, 1)

    def forward(self, dense, sparse):
        return self.out(torch.cat([self.sum(sparse).values(), self.mean(sparse).values()], dim=1))


class TwoTower(nn.Module):
    """A product of a query's and a candidate's vector."""

    def __init__(self):
        super().__init__()
        self.query = EmbeddingBagCollection(
            [
                EmbeddingBagConfig(
                    name="t_query", embedding_dim=DIM, num_embeddings=ITEMS, feature_names=["history"]
                )
            ]
        )
        self.candidate = EmbeddingBagCollection(
            [
                EmbeddingBagConfig(
                    name="t_candidate", embedding_dim=DIM, num_embeddings=ITEMS, feature_names=["item"]
                )
            ]
        )
        self.query_proj, self.candidate_proj = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

    def forward(self, dense, sparse):
        query = self.query_proj(self.query(sparse).values())
        return (query * self.candidate_proj(self.candidate(sparse).values())).sum(dim=1)


@torch.fx.wrap
def _pad(jagged):
    return torch.ops.fbgemm.jagged_to_padded_dense(jagged.values(), [jagged.offsets()], [4], 0.0)


class Bert4Rec(nn.Module):
    """Self-attention over a padded history, as BERT4Rec has it, and a product with the item."""

    def __init__(self):
        super().__init__()
        self.events = events("history", "item")
        self.layer = nn.TransformerEncoderLayer(DIM, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, dense, sparse):
        embedded = self.events(sparse)
        return (self.layer(_pad(embedded["history"])).mean(dim=1) * _pad(embedded["item"])[:, 0]).sum(dim=1)


class Hstu(nn.Module):
    """Pointwise attention over a padded history, as HSTU has it, beside pooled users."""

    def __init__(self):
        super().__init__()
        self.events, self.bags = events("history"), bags()
        self.mix, self.out = nn.Linear(DIM, 4 * DIM), nn.Linear(4 * DIM, 1)

    def forward(self, dense, sparse):
        gate, value, query, key = nn.functional.silu(self.mix(_pad(self.events(sparse)["history"]))).chunk(
            4, 2
        )
        attended = gate * (nn.functional.silu(query @ key.transpose(1, 2)).tril() @ value)
        return self.out(torch.cat([attended.sum(dim=1), self.bags(sparse).values()], dim=1))


ARCHES = {"dense_arch_layer_sizes": [4, DIM], "over_arch_layer_sizes": [4, 1]}
MODELS = {
    "ebc": Pooled,
    "dlrm": lambda: DLRM(bags(), dense_in_features=3, **ARCHES),
    "dlrm_dcn": lambda: DLRM_DCN(
        bags(), dense_in_features=3, dcn_num_layers=2, dcn_low_rank_dim=4, **ARCHES
    ),
    "deepfm": lambda: SimpleDeepFMNN(3, bags(), hidden_layer_size=4, deep_fm_dimension=4),
    "two_tower": TwoTower,
    "bert4rec": Bert4Rec,
    "hstu": Hstu,
}
"""Name -> a model of ``(dense, sparse) -> logits``."""
WAYS = {
    "stock": {},
    "raw": {"user": HashedId(USERS)},
    "hashed": {"item": HashedId(50), "history": HashedId(50)},
    "prefix": {"item": HashedPrefix(2, 40), "history": HashedPrefix(2, 40)},
    "catalog": {"item": (HashedPrefix(3), HashedId(20)), "history": HashedPrefix(3)},
}
"""Name -> features that are replaced; ``raw`` leaves the tables of items as TorchRec's, in our
collection."""


def left_out(model, way):
    """Why a model is not tried in a way; empty where it is."""
    if way == "raw" and model in ("two_tower", "bert4rec"):
        return "no feature beside items, so that nothing would be replaced"
    return ""


def make_model(name, way):
    """The model with its tables replaced, weights drawn from one seed."""
    torch.manual_seed(0)
    model = Train(MODELS[name]())
    if WAYS[way]:
        spec = SidSpec((USERS,)) if way == "raw" else SidSpec((ITEMS,))
        by_catalog = way in ("prefix", "catalog")
        replace_embeddings(
            model, WAYS[way], catalog=CATALOG if by_catalog else None, spec=None if by_catalog else spec
        )
    return model
