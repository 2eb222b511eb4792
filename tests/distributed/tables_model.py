"""One model with every kind of SID table, its batches, and its training, sharded or not."""

import functools
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torchrec import EmbeddingBagConfig, EmbeddingConfig, KeyedJaggedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.sharding_plan import (
    column_wise,
    construct_module_sharding_plan,
    grid_shard,
    row_wise,
    table_row_wise,
    table_wise,
)
from torchrec.distributed.types import ShardingEnv, ShardingPlan
from torchrec.modules.embedding_configs import PoolingType
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.streamable import Pipelineable

from tests.tables.test_catalog_map import TableCatalog
from torchrec_sid.collections import SidEmbeddingBagCollection, SidEmbeddingCollection
from torchrec_sid.parallel.initialise import copy_full_into_sharded
from torchrec_sid.side import SideFeaturesConfig
from torchrec_sid.spec import SidSpec
from torchrec_sid.tables import (
    HashedId,
    HashedPrefix,
    NGramGroups,
    PerLevel,
    PieceTrainerConfig,
    SentencePiece,
    Side,
    SidEmbeddingBagConfig,
    SidEmbeddingConfig,
    train_pieces,
)

SPEC = SidSpec((8, 8, 5))
LR = 0.5
ITEMS = 60
CATALOG = TableCatalog(
    SPEC, {7 * i: int(SPEC.pack(torch.tensor([[i % 8, i // 8, i % 5]]))) for i in range(ITEMS)}
)


@dataclass
class Batch(Pipelineable):
    features: KeyedJaggedTensor
    labels: torch.Tensor

    def to(self, device, non_blocking=False):
        return Batch(self.features.to(device, non_blocking), self.labels.to(device))

    def record_stream(self, stream):
        self.features.record_stream(stream)
        self.labels.record_stream(stream)

    def pin_memory(self):
        return Batch(self.features.pin_memory(), self.labels.pin_memory())


@functools.cache
def vocabulary():
    generator = torch.Generator().manual_seed(3)
    codes = torch.stack([torch.randint(0, k, (300,), generator=generator) for k in SPEC.cardinalities], 1)
    codes[:, 1] = (codes[:, 0] + codes[:, 1] % 2) % 8
    return train_pieces(SPEC, codes, PieceTrainerConfig(60))


class Model(nn.Module):
    """SIDs, ids looked up in a catalog, and raw ids, pooled and as a sequence."""

    def __init__(self, dim=8, device=None, catalog=CATALOG):
        super().__init__()
        one_hot = SideFeaturesConfig("one_hot")
        self.bags = SidEmbeddingBagCollection(
            tables=[
                SidEmbeddingBagConfig(
                    name="b_item",
                    embedding_dim=dim,
                    feature_names=["item", "history"],
                    scheme=(HashedPrefix(3, num_embeddings=64), HashedId(32)),
                    spec=SPEC,
                ),
                SidEmbeddingBagConfig(
                    name="b_other",
                    embedding_dim=dim,
                    scheme=(NGramGroups(2), SentencePiece(vocabulary()), Side(one_hot, project=True)),
                    feature_names=["other"],
                    pooling=PoolingType.MEAN,
                ),
                EmbeddingBagConfig(
                    name="b_user", embedding_dim=dim, num_embeddings=16, feature_names=["user"]
                ),
            ],
            catalog={"other": catalog},
            device=device,
        )
        self.events = SidEmbeddingCollection(
            tables=[
                SidEmbeddingConfig(
                    name="e_history",
                    embedding_dim=dim,
                    feature_names=["history"],
                    scheme=(HashedPrefix(2), PerLevel(separate=True), SentencePiece(vocabulary())),
                    spec=SPEC,
                ),
                SidEmbeddingConfig(
                    name="e_item",
                    embedding_dim=dim,
                    feature_names=["item", "history"],
                    scheme=(HashedPrefix(3, 64), HashedId(32)),
                    spec=SPEC,
                ),
                SidEmbeddingConfig(
                    name="e_rows",
                    embedding_dim=dim,
                    feature_names=["item"],
                    scheme=NGramGroups(2),
                    spec=SPEC,
                    events="rows",
                ),
                EmbeddingConfig(
                    name="e_user", embedding_dim=dim, num_embeddings=16, feature_names=["user"]
                ),
            ],
            device=device,
        )
        self.sequences = self.events.output_names
        generator = torch.Generator().manual_seed(0)
        self.out = nn.Linear(9 * dim, 1)
        with torch.no_grad():
            for parameter in [*self.out.parameters(), *self.bags.combine.parameters()]:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)

    def forward(self, batch):
        pooled = self.bags(batch.features)
        rows = self.events(batch.features)
        sequence = _pool([rows[name] for name in self.sequences])
        logits = self.out(torch.cat([pooled.values(), sequence], dim=1)).squeeze(1)
        loss = nn.functional.binary_cross_entropy_with_logits(logits, batch.labels)
        return loss, logits.detach()


@torch.fx.wrap
def _pool(jagged):
    parts = [torch.segment_reduce(j.values(), "sum", lengths=j.lengths(), initial=0) for j in jagged]
    return torch.cat(parts, dim=1)


def make_batch(seed, size=12):
    """Whole batch; ranks take slices of it."""
    g = torch.Generator().manual_seed(seed)
    lengths = {
        name: torch.randint(0, 4, (size,), generator=g) for name in ("item", "history", "other", "user")
    }

    def sids(n):
        return SPEC.pack(
            torch.stack([torch.randint(0, k, (n,), generator=g) for k in SPEC.cardinalities], 1)
        )

    values = {
        "item": sids(int(lengths["item"].sum())),
        "history": sids(int(lengths["history"].sum())),
        # A third of the ids are unknown to the catalog.
        "other": torch.randint(0, ITEMS * 3 // 2, (int(lengths["other"].sum()),), generator=g) * 7,
        "user": torch.randint(0, 16, (int(lengths["user"].sum()),), generator=g),
    }
    values["history"][::5] = -1
    return lengths, values, torch.randint(0, 2, (size,), generator=g).float()


def part(whole, rank, ranks):
    """One rank's slice of a batch."""
    lengths, values, labels = whole
    size = len(labels) // ranks
    rows = slice(rank * size, (rank + 1) * size)
    pieces = [torch.split(values[k], lengths[k].tolist())[rows] for k in values]
    return Batch(
        KeyedJaggedTensor.from_lengths_sync(
            keys=list(values),
            values=torch.cat([v for piece in pieces for v in piece]),
            lengths=torch.cat([lengths[k][rows] for k in values]),
        ),
        labels[rows],
    )


def train_plain(model, steps, lr=LR):
    """Losses on whole batches, one process."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss, _ = model(part(make_batch(step), 0, 1))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


SHARDINGS = {
    "table_wise": lambda i, ranks: table_wise(rank=i % ranks, compute_kernel="fused"),
    "row_wise": lambda i, ranks: row_wise(compute_kernel="fused"),
    "column_wise": lambda i, ranks: column_wise(ranks=list(range(ranks)), compute_kernel="fused"),
    "table_row_wise": lambda i, ranks: table_row_wise(host_index=0),
    "grid_shard": lambda i, ranks: grid_shard(host_indexes=[0]),
}


def shard(model, kinds, ranks, like=None):
    """DMP and optimizer; ``kinds`` shard bags and events. Weights: those of ``like``, or its own."""
    full = {name: t.clone() for name, t in (like or model).state_dict().items()}
    plan = {}
    events = list(model.events.event_bags)
    # A bag per event: their number differs from rank to rank, and gloo reduces equal parts only.
    own_row = "table_wise" if kinds[1] == "row_wise" else kinds[1]
    collections = {
        "bags.ebc": (model.bags.ebc, kinds[0]),
        "events.ec": (model.events.ec, kinds[1]),
        **{f"events.event_bags.{i}": (bags, own_row) for i, bags in enumerate(events)},
    }
    for path, (module, kind) in collections.items():
        apply_optimizer_in_backward(torch.optim.SGD, module.parameters(), {"lr": LR})
        tables = module.embeddings if path.endswith("ec") else module.embedding_bags
        per_table = {name: SHARDINGS[kind](i, ranks) for i, name in enumerate(tables)}
        plan[path] = construct_module_sharding_plan(module, per_table, local_size=ranks, device_type="cpu")
    sharded = DistributedModelParallel(
        model,
        env=ShardingEnv.from_process_group(dist.group.WORLD),
        device=torch.device("cpu"),
        plan=ShardingPlan(plan),
        sharders=[EmbeddingBagCollectionSharder(), EmbeddingCollectionSharder()],
    )
    copy_full_into_sharded(sharded.state_dict(), full)
    dense = dict(in_backward_optimizer_filter(sharded.named_parameters()))
    wrapped = KeyedOptimizerWrapper(dense, lambda p: torch.optim.SGD(p, lr=LR))
    return sharded, CombinedOptimizer([sharded.fused_optimizer, wrapped])


def mean_over_ranks(value):
    total = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()


def train_sharded(sharded, optimizer, steps, first=0):
    """Losses averaged over the ranks, each on its slice."""
    losses = []
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss, _ = sharded(part(make_batch(step), dist.get_rank(), dist.get_world_size()))
        loss.backward()
        optimizer.step()
        losses.append(mean_over_ranks(loss.item()))
    return losses
