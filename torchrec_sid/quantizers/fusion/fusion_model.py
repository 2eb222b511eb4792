"""The shape of a fused quantizer, and its parts as its fit and its report see them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from torchrec_sid.errors import SidError
from torchrec_sid.quantizers.autoencoder import GradientName, LinearPlusMlp
from torchrec_sid.quantizers.bottleneck import Bottleneck, BottleneckConfig
from torchrec_sid.quantizers.dpca import DiscretePcaConfig
from torchrec_sid.quantizers.fusion.heads import FusionHeads
from torchrec_sid.quantizers.fusion.sources import FusionInputs
from torchrec_sid.quantizers.gradient_fit import TrainingConfig
from torchrec_sid.spec import SidSpec


@dataclass(frozen=True)
class VqFusionConfig(BottleneckConfig, TrainingConfig):
    """Shape and training of a ``VqFusion``. The default SID is 5 bytes: 4 codes of 256 and 5 trits.

    Raises:
        SidError: a field out of range.
    """

    epochs: float = 16.0
    """Passes over the data."""
    codebooks: tuple[int, ...] = (256, 256, 256, 256)
    """Codewords per residual codebook; with no stages the SID is that of an RQ-VAE."""
    stages: tuple[tuple[int, int], ...] = ((5, 3),)
    """``(m, alphabet)`` of the digit stages after them; with no codebooks it is Discrete PCA, with one
    stage and no codebooks FSQ."""
    latent_dim: int | None = None
    """Width of the latents; None is that of all sources together, at most 512."""
    hidden: tuple[int, ...] = (512,)
    """Widths of the hidden layers of the encoder and of each head; none leaves them linear."""
    gradient: GradientName = "straight_through"
    """What the encoder learns from: ``"straight_through"`` or ``"rotation"``."""
    source_dropout: float = 0.1
    """Probability with which training hides a source of an item (at least one stays) from a second look,
    whose latent is pulled to that of the whole item."""
    contrastive_weight: float = 0.1
    """lambda of the contrastive term, where the fit is given co-engaged pairs."""
    contrastive_temperature: float = 0.1
    """Temperature of the contrastive term."""
    contrastive_batch: int = 256
    """Pairs per step and rank."""
    seed: int = 0
    """Seed of every random choice."""

    def __post_init__(self) -> None:
        BottleneckConfig.__post_init__(self)
        TrainingConfig.__post_init__(self)
        object.__setattr__(self, "codebooks", tuple(int(k) for k in self.codebooks))
        object.__setattr__(self, "stages", tuple((int(m), int(a)) for m, a in self.stages))
        object.__setattr__(self, "hidden", tuple(int(h) for h in self.hidden))
        if self.stages:
            DiscretePcaConfig(stages=self.stages, codebooks=self.codebooks)
        else:
            SidSpec(self.codebooks)
        if any(h < 1 for h in self.hidden) or (self.latent_dim is not None and self.latent_dim < 1):
            raise SidError("hidden, latent_dim", f"{self.hidden}, {self.latent_dim}", "Use widths above 0.")
        if self.gradient not in ("straight_through", "rotation"):
            raise SidError("gradient", repr(self.gradient), "Use 'straight_through' or 'rotation'.")
        if not 0 <= self.source_dropout < 1:
            raise SidError("source_dropout", f"{self.source_dropout}", "Use a probability below 1.")
        if (
            self.contrastive_weight < 0
            or not self.contrastive_temperature > 0
            or self.contrastive_batch < 2
        ):
            raise SidError(
                "contrastive_weight, contrastive_temperature, contrastive_batch",
                f"{self.contrastive_weight}, {self.contrastive_temperature}, {self.contrastive_batch}",
                "Use a weight of 0 or more, a temperature above 0 and 2 pairs or more.",
            )


class FusionModel(NamedTuple):
    """What stands between the sources of an item and its codes, and back."""

    inputs: FusionInputs
    """Normalises and packs rows of sources."""
    encoder: LinearPlusMlp
    """Packed rows to latents."""
    bottleneck: Bottleneck
    """Latents to codes."""
    heads: FusionHeads
    """Latents to sources."""

    @property
    def source_weights(self) -> Tensor:
        """``[K]`` float32."""
        weights = [source.weight for source in self.inputs.sources.values()]
        return torch.tensor(weights, device=self.inputs.mean.device)

    def pack(self, raw: Tensor) -> Tensor:
        """Rows of :class:`~.source_rows.FusionData` -> normalised rows ``[N, D + K]``."""
        return self.inputs.pack(raw.to(self.inputs.mean.device))

    def latents(self, packed: Tensor) -> Tensor:
        """Normalised rows ``[N, D + K]`` -> what the bottleneck quantizes, ``[N, latent]``."""
        z: Tensor = self.encoder(self.inputs.fill(packed))
        return z

    def encode(self, packed: Tensor, *, beam: int = 1) -> Tensor:
        """Normalised rows ``[N, D + K]`` -> codes ``[N, L]``."""
        return self.bottleneck.encode(self.latents(packed), beam=beam)

    def decode(self, codes: Tensor) -> list[Tensor]:
        """Codes ``[N, l]`` -> per source ``[N, width]``: the normalised embedding, or logits."""
        decoded: list[Tensor] = self.heads(self.bottleneck.decode(codes))
        return decoded
