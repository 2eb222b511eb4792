"""Models on the meta device, to plan for."""

import torch
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from torchrec_sid.parallel.embedding_tables import find_tables, table_parameters
from torchrec_sid.parallel.optimizer import TableOptimizer

META = torch.device("meta")


class Planned(nn.Module):
    """Two pooled tables (one of them with two features), one sequence table, a dense layer."""

    def __init__(self, rows: int = 10_000_000, optimizer: TableOptimizer | None = None) -> None:
        super().__init__()
        self.ebc = EmbeddingBagCollection(
            [
                EmbeddingBagConfig(
                    name="large", embedding_dim=128, num_embeddings=rows, feature_names=["l1", "l2"]
                ),
                EmbeddingBagConfig(
                    name="small", embedding_dim=64, num_embeddings=rows // 10, feature_names=["s"]
                ),
            ],
            device=META,
        )
        self.ec = EmbeddingCollection(
            [EmbeddingConfig(name="events", embedding_dim=64, num_embeddings=rows, feature_names=["h"])],
            device=META,
        )
        self.dense = nn.Linear(1000, 1000, device=META)
        tables = find_tables(self)
        (optimizer or TableOptimizer()).mark(table_parameters(self, tables).values())
