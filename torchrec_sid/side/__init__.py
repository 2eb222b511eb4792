"""SIDE: parameter-free features of a SID, and attention over histories of packed codes."""

from torchrec_sid.side.basis import FrozenBasis, as_bytes
from torchrec_sid.side.code_space_attention import CodeSpaceAttention, CodeSpaceAttentionConfig
from torchrec_sid.side.features import SideFeatures, SideFeaturesConfig
from torchrec_sid.side.pools import HistoryPools
from torchrec_sid.side.similarity import SimilarityConfig, SimilarityFeatures
from torchrec_sid.side.terms import EventTerms, EventTermsConfig

__all__ = [
    "CodeSpaceAttention",
    "CodeSpaceAttentionConfig",
    "EventTerms",
    "EventTermsConfig",
    "FrozenBasis",
    "HistoryPools",
    "SideFeatures",
    "SideFeaturesConfig",
    "SimilarityConfig",
    "SimilarityFeatures",
    "as_bytes",
]
