"""Quantizers: content embeddings to Semantic IDs."""

from torchrec_sid.quantizers.dpca import DiscretePca, DiscretePcaConfig
from torchrec_sid.quantizers.interface import FitReport, Quantized, Quantizer
from torchrec_sid.quantizers.load import load_quantizer
from torchrec_sid.quantizers.residual_kmeans import ResidualKMeans, ResidualKMeansConfig

__all__ = [
    "DiscretePca",
    "DiscretePcaConfig",
    "FitReport",
    "Quantized",
    "Quantizer",
    "ResidualKMeans",
    "ResidualKMeansConfig",
    "load_quantizer",
]
