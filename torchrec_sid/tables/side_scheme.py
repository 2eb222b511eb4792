"""`Side`: the parameter-free vector of a SID as one more way to embed a feature, without a table."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from torchrec_sid.errors import SidError
from torchrec_sid.side.basis import FrozenBasis
from torchrec_sid.side.features import SideFeatures, SideFeaturesConfig
from torchrec_sid.spec import SidSpec
from torchrec_sid.tables.catalog_map import CatalogMap
from torchrec_sid.tables.scheme_registry import Scheme, SidVectors
from torchrec_sid.tables.slots import Slot


@dataclass(frozen=True)
class Side(Scheme):
    """Digits, one-hot or basis features of a SID (arXiv 2506.16698), computed from frozen constants.

    Alone it needs no table at all; beside a table scheme it is what generalises while the table remembers.
    The unknown item is the zero vector.

    Args:
        features: which features, and how they are scaled.
        basis: the decoder that the digits belong to; see :class:`~torchrec_sid.side.features.SideFeatures`.
        project: map the features to the table's ``embedding_dim`` by a learned matrix, without bias; needed
            where they are summed with another scheme or feed a model that wants one dimension.
        calibrate: centre and scale by the SIDs of the catalog instead of uniform codes.
    """

    features: SideFeaturesConfig = field(default_factory=SideFeaturesConfig)
    basis: FrozenBasis | None = None
    project: bool = False
    calibrate: bool = False
    label: ClassVar[str] = "side"

    def slots(self, spec: SidSpec) -> tuple[Slot, ...]:
        """None: it looks nothing up."""
        return ()

    def vectors(
        self, spec: SidSpec, embedding_dim: int, catalog: CatalogMap | None, device: torch.device | None
    ) -> SidVectors:
        """The features, mapped to ``embedding_dim`` where they are projected."""
        known = None if catalog is None else catalog.packed
        return SideVectors(self, spec, embedding_dim, known, device)


class SideVectors(SidVectors):
    """Packed SIDs ``[n]`` -> vectors, and their sums over bags. The matrix, if any, is its only parameter.

    Args:
        side: configuration.
        spec: shape of the SIDs.
        embedding_dim: D of the table, where ``side.project``.
        catalog: ``[N]`` int64 packed SIDs to calibrate by; -1 are left out.
        device: of the buffers and the matrix; buffers are never on meta.
    """

    def __init__(
        self,
        side: Side,
        spec: SidSpec,
        embedding_dim: int,
        catalog: Tensor | None,
        device: torch.device | str | None,
    ) -> None:
        super().__init__()
        self.features = SideFeatures(spec, side.features, basis=side.basis, device=device)
        if side.calibrate:
            if catalog is None:
                raise SidError(
                    "Side", "calibrate=True without a catalog", "Give the collection its catalog."
                )
            self.features.calibrate(catalog[catalog >= 0])
        self.matrix = (
            nn.Linear(self.features.dim, embedding_dim, bias=False, device=device) if side.project else None
        )
        self.dim: int = embedding_dim if side.project else self.features.dim

    def forward(self, packed: Tensor, lengths: Tensor | None, weights: Tensor | None) -> Tensor:
        """As :class:`SidVectors`, in float32; bags are projected once, not item by item."""
        vectors: Tensor = self.features(packed.clamp(min=0))
        vectors = vectors * (packed >= 0).unsqueeze(1)
        if lengths is not None:
            offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(torch.int64)
            vectors = nn.functional.embedding_bag(
                torch.arange(packed.numel(), device=packed.device),
                vectors,
                offsets,
                mode="sum",
                per_sample_weights=weights,
                include_last_offset=True,
            )
        if self.matrix is None:
            return vectors
        # The features stay float32 in a half-precision model, and so does what tables give out.
        projected: Tensor = self.matrix(vectors.to(self.matrix.weight.dtype))
        return projected.float()
