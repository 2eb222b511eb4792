"""`VqFusion`: one Semantic ID from several embeddings and categories."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
import torch.distributed as dist
from torch import Tensor

from torchrec_sid.errors import SidError
from torchrec_sid.quantizers.base import FitReport, Quantizer
from torchrec_sid.quantizers.bottleneck import Bottleneck
from torchrec_sid.quantizers.collectives import Collectives
from torchrec_sid.quantizers.fusion.fusion_config import VqFusionConfig
from torchrec_sid.quantizers.fusion.fusion_fit import FusionFit
from torchrec_sid.quantizers.fusion.fusion_report import FusionMeter, SourceReport
from torchrec_sid.quantizers.fusion.heads import FusionHeads
from torchrec_sid.quantizers.fusion.packed_view import PackedView
from torchrec_sid.quantizers.fusion.source_rows import FusionData
from torchrec_sid.quantizers.fusion.sources import (
    CategorySource,
    FusionInputs,
    Source,
    source_from_json,
    source_to_json,
)
from torchrec_sid.quantizers.gradient_fit import FitOptions
from torchrec_sid.quantizers.networks import LinearPlusMlp
from torchrec_sid.seeding import derived_generator
from torchrec_sid.spec import SidSpec

if TYPE_CHECKING:
    from torchrec_sid.quality import QualityReport

_WIDEST_LATENT = 512


class VqFusion(Quantizer):
    """Several sources of an item, some of them missing, through one encoder into one SID.

    Named in "SIDE" (arXiv 2506.16698), whose losses are not public; these are ours. Every source is
    normalised to variance 1, their concatenation is encoded, quantized by residual codebooks and tied
    digits, and decoded by one head per source::

        sum_k w_k |x_k - g_k(z_hat)|^2 / Var(x_k) + sum_j v_j KL(p_j || softmax h_j(z_hat)) / H(mean p_j)
            + quantizer loss / Var(z) + lambda InfoNCE(co-engaged pairs) / log P

    so that each term is 1 for knowing nothing. Like :class:`RqVae` it starts at the closed-form solution
    and ends in the state with the lowest error on a fixed sample.

    Args:
        sources: by name, :class:`EmbeddingSource` or :class:`CategorySource`.
        config: see :class:`VqFusionConfig`.
        device: where the state lives and the fit runs.

    Example:
        >>> from torchrec_sid import CategorySource, EmbeddingSource
        >>> x = torch.randn(600, 16, generator=torch.Generator().manual_seed(0))
        >>> label = (x[:, 0] > 0).long()
        >>> config = VqFusionConfig(codebooks=(16,), stages=((4, 3),), epochs=2)
        >>> fusion = VqFusion({"text": EmbeddingSource(16), "kind": CategorySource(2)}, config)
        >>> report = fusion.fit({"text": x, "kind": label})
        >>> codes = fusion.encode({"text": x})
        >>> {name: tuple(decoded.shape) for name, decoded in fusion.decode(codes).items()}
        {'text': (600, 16), 'kind': (600, 2)}
    """

    kind: ClassVar[str] = "vq_fusion"
    config_type: ClassVar[type[Any]] = VqFusionConfig
    config: VqFusionConfig

    def __init__(
        self,
        sources: Mapping[str, Source],
        config: VqFusionConfig | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        config = VqFusionConfig() if config is None else config
        super().__init__(sum(source.width for source in sources.values()), config)
        self.register_buffer("fitted", torch.tensor(False, device=device))
        self.inputs = FusionInputs(sources, device=device)
        latent = min(self.dim, _WIDEST_LATENT) if config.latent_dim is None else config.latent_dim
        if latent > self.dim:
            raise SidError("latent_dim", f"{latent} for {self.dim} columns", f"Use at most {self.dim}.")
        if max([m for m, _ in config.stages], default=0) > latent:
            raise SidError(
                "stages", f"{config.stages} for latents of {latent}", "Use fewer digits a stage."
            )
        generator = derived_generator(config.seed, "vq_fusion.networks")
        self.encoder = LinearPlusMlp(
            self.inputs.columns, latent, config.hidden, generator=generator, device=device
        )
        self.heads = FusionHeads(self.inputs, latent, config.hidden, generator=generator, device=device)
        self.bottleneck = Bottleneck(latent, config.codebooks, config.stages, config, device=device)

    @property
    def sources(self) -> dict[str, Source]:
        """What it fuses, by name."""
        return self.inputs.sources

    @property
    def decoder_floats(self) -> int:
        """Numbers that decoding needs: codebooks, digits, heads, means and scales."""
        bottleneck = self.bottleneck
        vectors = sum(bottleneck.sizes) + len(bottleneck.alphabets) + 1
        heads = sum(p.numel() for p in self.heads.parameters())
        return vectors * bottleneck.dim + heads + self.dim + len(self.sources)

    @property
    def spec(self) -> SidSpec:
        """One level per codebook, then one per digit."""
        return SidSpec(self.bottleneck.cardinalities)

    def fit(
        self,
        data: Mapping[str, Any],
        *,
        present: Mapping[str, Any] | None = None,
        pairs: Tensor | None = None,
        progress: bool = False,
        checkpoint: str | Path | None = None,
        checkpoint_every: int = 500,
        group: dist.ProcessGroup | None = None,
    ) -> FitReport:
        """Train from aligned sources; :class:`FusionData` says what they may be and how rows are missing.

        Args:
            data: by source name.
            present: by source name ``[N]`` bool.
            pairs: ``[P, 2]`` int64 rows of items that the same user engaged with in the training period;
                they are pulled together. Needs sources with random access.
            progress: show a bar with loss, usage and perplexity per level; they are logged as well.
            checkpoint: file from which an interrupted fit continues.
            checkpoint_every: steps between writes of that file.
            group: fit together with the other ranks of this process group, each with the same ``data``.

        Returns:
            A report whose ``fvu`` is the mean over sources of the error after each level: fraction of
            variance unexplained of embeddings, KL over entropy of categories.

        Raises:
            SidError: bad data.
            CollapseError: usage collapsed or the loss diverged; the message says what to change.
            ArtifactError: the checkpoint belongs to another fit.
        """
        began = time.perf_counter()
        options = FitOptions(progress, checkpoint, checkpoint_every)
        opened = FusionData(data, self.sources, present)
        fit = FusionFit(self, opened, pairs, Collectives(group))
        fit.run(options)
        self.fitted.fill_(True)
        return FitReport(fit.rows, time.perf_counter() - began, fit.level_errors())

    @torch.no_grad()
    def encode(
        self, data: Mapping[str, Any], *, present: Mapping[str, Any] | None = None, beam: int = 1
    ) -> Tensor:
        """Sources (what :meth:`fit` takes; some may be left out) -> codes ``[N, L]`` int64.

        Args:
            data: by source name.
            present: by source name ``[N]`` bool.
            beam: hypotheses kept per level; 1 is greedy, as in training.

        Raises:
            SidError: not fitted, an unknown source or category, a row without any source, bad values.
        """
        self.require_fitted()
        if beam < 1:
            raise SidError("VqFusion.encode", f"beam {beam}", "Choose 1 or more.")
        opened = FusionData(data, self.sources, present)
        codes = [self.encode_packed(self.pack(raw), beam=beam) for raw in opened]
        empty = torch.empty(0, self.spec.levels, dtype=torch.int64, device=self.inputs.mean.device)
        return torch.cat(codes) if codes else empty

    @torch.no_grad()
    def decode(self, codes: Tensor) -> dict[str, Tensor]:
        """Codes ``[N, l]``, any prefix ``1 <= l <= L`` -> by source name float32 ``[N, width]``.

        Embeddings in their own units, categories as probabilities.

        Raises:
            SidError: not fitted, no or too many levels, a code outside its alphabet.
        """
        return {
            name: out.softmax(dim=1) if isinstance(source, CategorySource) else self.inputs.restore(i, out)
            for i, ((name, source), out) in enumerate(
                zip(self.sources.items(), self.decode_heads(codes), strict=True)
            )
        }

    def report(
        self, data: Mapping[str, Any], *, present: Mapping[str, Any] | None = None, beam: int = 1
    ) -> dict[str, SourceReport]:
        """What the SID keeps of each source on held-out items, and what is kept without a quantizer."""
        self.require_fitted()
        meter = FusionMeter(self)
        for raw in FusionData(data, self.sources, present):
            meter.add(raw, beam=beam)
        return meter.reports()

    def quality(self, held_out: Any, *, progress: bool = False) -> QualityReport:
        """The diagnostics of :mod:`torchrec_sid.quality`, on all sources as one normalised vector.

        Args:
            held_out: by source name, or ``FusionData`` with missing rows.
            progress: show a bar.
        """
        from torchrec_sid.quality import measure_quality  # above this module in the flow

        opened = held_out if isinstance(held_out, FusionData) else FusionData(held_out, self.sources)
        return measure_quality(PackedView(self), lambda: map(self.pack, opened), progress=progress)

    def pack(self, raw: Tensor) -> Tensor:
        """Rows of :class:`FusionData` -> normalised rows, see :class:`FusionInputs`."""
        return self.inputs.pack(raw.to(self.inputs.mean.device))

    @torch.no_grad()
    def encode_packed(self, packed: Tensor, *, beam: int = 1) -> Tensor:
        """Normalised rows ``[N, D + K]`` -> codes ``[N, L]``."""
        return self.bottleneck.encode(self.latents(packed), beam=beam)

    def latents(self, packed: Tensor) -> Tensor:
        """Normalised rows ``[N, D + K]`` -> what the bottleneck quantizes, ``[N, latent]``."""
        z: Tensor = self.encoder(self.inputs.fill(packed))
        return z

    @torch.no_grad()
    def decode_heads(self, codes: Tensor) -> list[Tensor]:
        """Codes ``[N, l]`` -> what the heads give: normalised embeddings and logits."""
        self.require_fitted()
        depth = codes.shape[1] if codes.dim() == 2 else 0
        if not 1 <= depth <= self.spec.levels:
            raise SidError("codes", f"shape {tuple(codes.shape)}", f"Pass 1 to {self.spec.levels} levels.")
        self.spec.truncated(depth).validate(codes)
        heads: list[Tensor] = self.heads(self.bottleneck.decode(codes.to(self.inputs.mean.device)))
        return heads

    @classmethod
    def from_config(cls, dim: Any, config: dict[str, Any]) -> Self:
        """Build an unfitted quantizer from the JSON form of its sources and configuration."""
        sources = {name: source_from_json(value) for name, value in dim}
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
        return cls(sources, VqFusionConfig(**fields))

    def manifest(self) -> dict[str, Any]:
        """Sources and configuration in JSON form."""
        return self._manifest()

    def _manifest(self) -> dict[str, Any]:
        # A list of pairs: the order of the sources is that of the columns.
        sources = [[name, source_to_json(source)] for name, source in self.sources.items()]
        return {**super()._manifest(), "dim": sources}
