"""Semantic IDs for TorchRec: learn them from content, and rank with them instead of raw ids.

This top level, ``quantizers``, ``catalog``, ``quality`` and ``side`` need torch alone; ``tables``,
``collections``, ``models``, ``data.batch`` and ``parallel`` need TorchRec.
"""

from torchrec_sid.errors import ArtifactError, SidError
from torchrec_sid.spec import SidSpec

__version__ = "0.1.0"

__all__ = ["ArtifactError", "SidError", "SidSpec", "__version__"]
