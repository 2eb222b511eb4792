"""Quantizers: content embeddings to Semantic IDs."""

from torchrec_sid.quantizers.base import FitReport, Quantized, Quantizer
from torchrec_sid.quantizers.dpca import DiscretePca, DiscretePcaConfig
from torchrec_sid.quantizers.fusion.fusion_config import VqFusionConfig
from torchrec_sid.quantizers.fusion.fusion_report import CategoryReport, EmbeddingReport
from torchrec_sid.quantizers.fusion.sources import CategorySource, EmbeddingSource
from torchrec_sid.quantizers.fusion.vq_fusion import VqFusion
from torchrec_sid.quantizers.load import load_quantizer
from torchrec_sid.quantizers.make import EmbeddingQuantizerConfig, make_quantizer
from torchrec_sid.quantizers.residual_kmeans import ResidualKMeans, ResidualKMeansConfig
from torchrec_sid.quantizers.rq_vae import RqVae, RqVaeConfig
from torchrec_sid.quantizers.usage import CollapseError

__all__ = [
    "CategoryReport",
    "CategorySource",
    "CollapseError",
    "DiscretePca",
    "DiscretePcaConfig",
    "EmbeddingQuantizerConfig",
    "EmbeddingReport",
    "EmbeddingSource",
    "FitReport",
    "Quantized",
    "Quantizer",
    "ResidualKMeans",
    "ResidualKMeansConfig",
    "RqVae",
    "RqVaeConfig",
    "VqFusion",
    "VqFusionConfig",
    "load_quantizer",
    "make_quantizer",
]
