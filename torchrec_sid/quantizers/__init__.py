"""Quantizers: content embeddings to Semantic IDs."""

# A new quantizer is its file and a line here: importing it registers it.
from torchrec_sid.quantizers.alignment import ChangedShares, CodeAlignment, align_codes, changed_shares
from torchrec_sid.quantizers.base import (
    QUANTIZERS,
    AdditiveDecoder,
    FitReport,
    Quantized,
    Quantizer,
    load_quantizer,
    make_quantizer,
    quantizer_of,
    register_quantizer,
)
from torchrec_sid.quantizers.dpca import DiscretePca, DiscretePcaConfig
from torchrec_sid.quantizers.fusion.fusion_model import VqFusionConfig
from torchrec_sid.quantizers.fusion.fusion_report import CategoryReport, EmbeddingReport
from torchrec_sid.quantizers.fusion.sources import CategorySource, EmbeddingSource
from torchrec_sid.quantizers.fusion.vq_fusion import VqFusion
from torchrec_sid.quantizers.residual_kmeans import ResidualKMeans, ResidualKMeansConfig
from torchrec_sid.quantizers.rq_vae import RqVae, RqVaeConfig
from torchrec_sid.quantizers.sample import sample_impressed
from torchrec_sid.quantizers.usage import CollapseError

__all__ = [
    "QUANTIZERS",
    "AdditiveDecoder",
    "CategoryReport",
    "CategorySource",
    "ChangedShares",
    "CodeAlignment",
    "CollapseError",
    "DiscretePca",
    "DiscretePcaConfig",
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
    "align_codes",
    "changed_shares",
    "load_quantizer",
    "make_quantizer",
    "quantizer_of",
    "register_quantizer",
    "sample_impressed",
]
