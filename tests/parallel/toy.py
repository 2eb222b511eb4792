"""A small ranker with pooled and sequence tables, a buffer and a dense part, and its data."""

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_sid.parallel.embedding_tables import find_tables
from torchrec_sid.parallel.initialise import initialise_tables

BAGS = ("bag_a", "bag_b")
SEQUENCE = "sequence"


class Toy(nn.Module):
    def __init__(self, rows: int = 40, dim: int = 8, device: str = "cpu") -> None:
        super().__init__()
        self.ebc = EmbeddingBagCollection(
            [
                EmbeddingBagConfig(
                    name=name, embedding_dim=dim, num_embeddings=rows, feature_names=[f"f_{name}"]
                )
                for name in BAGS
            ],
            device=torch.device(device),
        )
        self.ec = EmbeddingCollection(
            [
                EmbeddingConfig(
                    name=SEQUENCE, embedding_dim=dim, num_embeddings=rows, feature_names=["f_seq"]
                )
            ],
            device=torch.device(device),
        )
        self.register_buffer("scale", torch.linspace(0.5, 1.5, dim))
        self.over = nn.Sequential(nn.Linear(3 * dim + 2, 16), nn.ReLU(), nn.Linear(16, 1))
        self.dim = dim

    def forward(self, dense: Tensor, features: KeyedJaggedTensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        # By key: the order of the values follows the sharding.
        bags = self.ebc(features)
        pooled = torch.cat([bags[f"f_{name}"] for name in BAGS], dim=1)
        jagged = self.ec(features)["f_seq"]
        sequence = torch.segment_reduce(
            jagged.values() * self.scale, "sum", lengths=jagged.lengths().long(), unsafe=True, initial=0
        )
        logits = self.over(torch.cat([pooled, sequence, dense], dim=1)).squeeze(1)
        return nn.functional.binary_cross_entropy_with_logits(logits, labels), logits


def toy_batch(step: int, first: int, samples: int, rows: int = 40):
    """Samples ``first .. first + samples`` of the global batch of a step, the same whoever asks."""
    lengths, values = [[], [], []], [[], [], []]
    dense, labels = [], []
    for sample in range(first, first + samples):
        generator = torch.Generator().manual_seed(step * 1000 + sample)
        for feature in range(3):
            n = int(torch.randint(0, 5, (), generator=generator))
            lengths[feature].append(n)
            values[feature].append(torch.randint(0, rows, (n,), generator=generator))
        dense.append(torch.randn(2, generator=generator))
        labels.append(torch.rand((), generator=generator).round())
    features = KeyedJaggedTensor(
        keys=["f_bag_a", "f_bag_b", "f_seq"],
        values=torch.cat([torch.cat(v) for v in values]),
        lengths=torch.tensor([n for feature in lengths for n in feature]),
    )
    return torch.stack(dense), features, torch.stack(labels)


def unsharded_losses(optimizer, samples: int, steps: int, dim: int = 8, seed: int = 3) -> list[float]:
    """Losses of the same model on one process without TorchRec's sharding."""
    torch.manual_seed(0)
    model = Toy(dim=dim)
    tables = find_tables(model)
    initialise_tables(model, tables, seed)
    weights = {table.weight_key for table in tables.values()}
    named = dict(model.named_parameters())
    sparse = optimizer.factory()([named[name] for name in named if name in weights])
    dense = torch.optim.Adam([named[name] for name in named if name not in weights], lr=0.01)
    losses = []
    for step in range(steps):
        sparse.zero_grad()
        dense.zero_grad()
        loss, _ = model(*toy_batch(step, 0, samples))
        loss.backward()
        sparse.step()
        dense.step()
        losses.append(loss.item())
    return losses
