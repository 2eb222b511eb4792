"""Diagnostics of Semantic IDs: error, usage, collisions, and how alike items of one prefix are."""

from torchrec_sid.quality.measure import measure_quality
from torchrec_sid.quality.quality_report import LevelQuality, PrefixQuality, QualityReport, Verdict
from torchrec_sid.quality.sharing import SharingMeter

__all__ = [
    "LevelQuality",
    "PrefixQuality",
    "QualityReport",
    "SharingMeter",
    "Verdict",
    "measure_quality",
]
