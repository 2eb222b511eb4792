"""Quantizers: content embeddings to Semantic IDs."""

from torchrec_sid.quantizers.dpca import DiscretePca, DiscretePcaConfig
from torchrec_sid.quantizers.interface import FitReport, Quantized, Quantizer
from torchrec_sid.quantizers.load import load_quantizer
from torchrec_sid.quantizers.residual_kmeans import ResidualKMeans, ResidualKMeansConfig
from torchrec_sid.quantizers.rq_vae import RqVae, RqVaeConfig
from torchrec_sid.quantizers.usage import CollapseError

__all__ = [
    "CollapseError",
    "DiscretePca",
    "DiscretePcaConfig",
    "FitReport",
    "Quantized",
    "Quantizer",
    "ResidualKMeans",
    "ResidualKMeansConfig",
    "RqVae",
    "RqVaeConfig",
    "load_quantizer",
]
