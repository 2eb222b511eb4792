"""What `apps.bench.tables` compares: collections over raw ids and over SIDs, with their batches."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec import (
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    EmbeddingCollection,
    EmbeddingConfig,
    KeyedJaggedTensor,
)
from torchrec.distributed import DistributedModelParallel
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from torchrec_sid.collections import SidEmbeddingBagCollection, SidEmbeddingCollection
from torchrec_sid.parallel.sharders import sid_sharders
from torchrec_sid.spec import SidSpec
from torchrec_sid.tables import (
    HashedPrefix,
    PieceTrainerConfig,
    Scheme,
    SentencePiece,
    Side,
    SidEmbeddingBagConfig,
    SidEmbeddingConfig,
    SidPieces,
    train_pieces,
)

DEPTH = 3
TRITS = SidSpec((3,) * 25)


class Case(NamedTuple):
    """Bags or histories of items."""

    name: str
    kind: Literal["bags", "history"]
    batch: int
    items: int
    """Items per example."""


class Items(NamedTuple):
    """A catalog of SIDs to draw items from."""

    spec: SidSpec
    codes: Tensor
    pieces: SidPieces


def planted(levels: int, cardinality: int, count: int, vocabulary: int, seed: int) -> Items:
    """SIDs in which runs repeat, as residual codes of clustered items do, and pieces trained on them."""
    generator = torch.Generator().manual_seed(seed)
    columns = [(torch.rand(count, generator=generator) ** 3 * cardinality).long()]
    for level in range(1, levels):
        own = (torch.rand(count, generator=generator) ** 3 * cardinality).long()
        follows = torch.rand(count, generator=generator) < 0.7
        columns.append(torch.where(follows, (columns[-1] * 7 + level) % cardinality, own))
    spec, codes = SidSpec((cardinality,) * levels), torch.stack(columns, dim=1)
    return Items(spec, codes, train_pieces(spec, codes, PieceTrainerConfig(vocabulary)))


class System(NamedTuple):
    """A collection and its batch."""

    module: nn.Module
    batch: KeyedJaggedTensor

    def values(self) -> Tensor:
        """Pooled ``[B, D]`` or per event ``[n, D]``."""
        # A KJT caches its offsets, and every step of training meets a new one.
        batch = KeyedJaggedTensor(["item"], self.batch.values(), lengths=self.batch.lengths())
        out = self.module(batch)["item"]
        # A sharded collection returns a promise of it, so its class says nothing.
        values: Tensor = out.values() if hasattr(out, "lengths") else out
        return values

    def forward(self) -> None:
        """One pass without gradient."""
        with torch.no_grad():
            self.values()

    def forward_backward(self) -> None:
        """One pass and its gradients, which replace those of the last."""
        for parameter in self.module.parameters():
            parameter.grad = None
        self.values().sum().backward()


def make_systems(case: Case, items: Items, dim: int, seed: int, device: torch.device) -> dict[str, System]:
    """Every system of a case, of the same dimension and rows."""
    generator = torch.Generator().manual_seed(seed)
    total, table_rows = case.batch * case.items, len(items.pieces) + 1
    chosen = torch.randint(0, len(items.codes), (total,), generator=generator)
    trits = torch.randint(0, 3, (total, TRITS.levels), generator=generator)
    raw = torch.randint(0, table_rows, (total,), generator=generator)

    def batch(values: Tensor, per_item: int = 1) -> KeyedJaggedTensor:
        lengths = torch.full((case.batch,), case.items * per_item)
        return KeyedJaggedTensor.from_lengths_sync(["item"], values, lengths).to(device)

    def sid(scheme: Scheme, spec: SidSpec) -> nn.Module:
        if case.kind == "bags":
            bag = SidEmbeddingBagConfig(name="item", embedding_dim=dim, scheme=scheme, spec=spec)
            return SidEmbeddingBagCollection([bag], device=device)
        sequence = SidEmbeddingConfig(name="item", embedding_dim=dim, scheme=scheme, spec=spec)
        return SidEmbeddingCollection([sequence], device=device)

    def plain() -> nn.Module:
        if case.kind == "bags":
            bag = EmbeddingBagConfig(name="item", embedding_dim=dim, num_embeddings=table_rows)
            return EmbeddingBagCollection([bag], device=device)
        sequence = EmbeddingConfig(name="item", embedding_dim=dim, num_embeddings=table_rows)
        return EmbeddingCollection([sequence], device=device)

    sids = batch(items.spec.pack(items.codes[chosen]))
    prefix = System(sid(HashedPrefix(depth=DEPTH, num_embeddings=table_rows), items.spec), sids)
    # The very rows that the prefixes read: equally many, equally often in cache.
    found = prefix.module.get_submodule("transform")(sids)
    read = (found[0] if isinstance(found, tuple) else found).values()
    return {
        "raw_id": System(plain(), batch(raw)),
        "raw_id_equal": System(plain(), batch(read, DEPTH)),
        "hashed_prefix": prefix,
        "sentencepiece": System(sid(SentencePiece(items.pieces), items.spec), sids),
        "side": System(sid(Side(project=True), TRITS), batch(TRITS.pack(trits))),
    }


@contextmanager
def one_process(device: torch.device) -> Iterator[None]:
    """A process group of one, for DistributedModelParallel."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("LOCAL_WORLD_SIZE", "1")
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=f"file://{Path(folder) / 'store'}",
            rank=0,
            world_size=1,
        )
        try:
            yield
        finally:
            dist.destroy_process_group()


def shard(system: System, device: torch.device) -> System:
    """The system under DistributedModelParallel, SGD fused into the backward pass of its tables."""
    apply_optimizer_in_backward(torch.optim.SGD, list(system.module.parameters()), {"lr": 0.1})
    model = nn.Sequential(system.module)
    return System(DistributedModelParallel(model, device=device, sharders=sid_sharders()), system.batch)
