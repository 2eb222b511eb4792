"""Make the quantizer that a configuration is of."""

from __future__ import annotations

import torch

from torchrec_sid.quantizers.dpca import DiscretePca, DiscretePcaConfig
from torchrec_sid.quantizers.residual_kmeans import ResidualKMeans, ResidualKMeansConfig
from torchrec_sid.quantizers.rq_vae import RqVae, RqVaeConfig

EmbeddingQuantizerConfig = ResidualKMeansConfig | DiscretePcaConfig | RqVaeConfig
"""Of the quantizers of one embedding; ``VqFusion`` takes its sources too."""


def make_quantizer(
    dim: int, config: EmbeddingQuantizerConfig, *, device: torch.device | None = None
) -> ResidualKMeans | DiscretePca | RqVae:
    """The quantizer of embeddings of width ``dim``, not fitted yet, on ``device``."""
    if isinstance(config, ResidualKMeansConfig):
        return ResidualKMeans(dim, config, device=device)
    if isinstance(config, DiscretePcaConfig):
        return DiscretePca(dim, config, device=device)
    return RqVae(dim, config, device=device)
