"""Load a quantizer of whatever kind a file holds."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from torchrec_sid.artifact import read_manifest
from torchrec_sid.errors import ArtifactError
from torchrec_sid.quantizers.base import Quantizer

_KINDS = {
    "residual_kmeans": ("residual_kmeans", "ResidualKMeans"),
    "rq_vae": ("rq_vae", "RqVae"),
    "discrete_pca": ("dpca", "DiscretePca"),
    "vq_fusion": ("fusion.vq_fusion", "VqFusion"),
}


def load_quantizer(path: str | Path) -> Quantizer:
    """Read a quantizer written by :meth:`Quantizer.save`, of the class that its manifest names.

    Raises:
        ArtifactError: missing, truncated, altered, or not a quantizer.
    """
    kind = read_manifest(path).kind
    if kind not in _KINDS:
        raise ArtifactError(str(path), f"holds a {kind!r}", f"Pass a quantizer: one of {sorted(_KINDS)}.")
    module, name = _KINDS[kind]
    quantizer: type[Quantizer] = getattr(import_module(f"torchrec_sid.quantizers.{module}"), name)
    return quantizer.load(path)
