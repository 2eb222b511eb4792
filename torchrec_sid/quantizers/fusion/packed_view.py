"""A fused quantizer as one from vectors to vectors, for tools that know nothing of sources."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import torch
from torch import Tensor

from torchrec_sid.errors import SidError
from torchrec_sid.quantizers.base import Quantizer
from torchrec_sid.quantizers.fusion.fusion_config import VqFusionConfig
from torchrec_sid.quantizers.fusion.sources import CategorySource
from torchrec_sid.spec import SidSpec
from torchrec_sid.streams import open_stream

if TYPE_CHECKING:
    from torchrec_sid.quantizers.fusion.vq_fusion import VqFusion


class PackedView(Quantizer):
    """Reads and writes normalised rows ``[N, D + K]`` of a fitted :class:`VqFusion`.

    The K flags say which sources are present; they are decoded as 1.

    Args:
        fusion: the quantizer seen; kept as it is.
    """

    kind: ClassVar[str] = "vq_fusion_view"
    config_type: ClassVar[type[Any]] = VqFusionConfig

    def __init__(self, fusion: VqFusion) -> None:
        super().__init__(fusion.inputs.columns, fusion.config)
        self.fitted.copy_(fusion.fitted.cpu())
        self._fusion = [fusion]  # in a list, so that it does not become a submodule

    @property
    def spec(self) -> SidSpec:
        """That of the quantizer."""
        return self._fusion[0].spec

    def fit(self, data: Any, *, progress: bool = False) -> NoReturn:
        """Refused: a view has nothing to fit."""
        raise SidError("PackedView", "a view", "Fit the VqFusion itself.")

    def encode(self, x: Any, *, beam: int = 1) -> Tensor:
        """Normalised rows (anything ``open_stream`` takes) -> codes ``[N, L]``."""
        return torch.cat([self._fusion[0].encode_packed(batch, beam=beam) for batch in open_stream(x)])

    def decode(self, codes: Tensor) -> Tensor:
        """Codes ``[N, l]`` -> normalised rows ``[N, D + K]``."""
        fusion = self._fusion[0]
        blocks = []
        for i, (source, out) in enumerate(
            zip(fusion.sources.values(), fusion.decode_heads(codes), strict=True)
        ):
            if isinstance(source, CategorySource):
                out = fusion.inputs.normalise(i, out.softmax(dim=1))
            blocks.append(out * math.sqrt(source.weight))
        flags = blocks[0].new_ones(len(codes), len(blocks))
        return torch.cat([*blocks, flags], dim=1)
