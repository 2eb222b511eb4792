"""SIDE: parameter-free features of a SID, and attention over histories of packed codes."""

from torchrec_sid.side.basis import FrozenBasis, as_bytes
from torchrec_sid.side.features import SideFeatures, SideFeaturesConfig

__all__ = ["FrozenBasis", "SideFeatures", "SideFeaturesConfig", "as_bytes"]
