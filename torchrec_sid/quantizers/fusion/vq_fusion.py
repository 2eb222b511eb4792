"""`VqFusion`: one Semantic ID from several embeddings and categories."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.distributed as dist
from torch import Tensor

from torchrec_sid.errors import SidError
from torchrec_sid.quantizers.autoencoder import LinearPlusMlp
from torchrec_sid.quantizers.base import AdditiveDecoder, FitReport, Quantizer, register_quantizer
from torchrec_sid.quantizers.bottleneck import Bottleneck
from torchrec_sid.quantizers.collectives import Collectives
from torchrec_sid.quantizers.fusion.fusion_fit import FusionFit
from torchrec_sid.quantizers.fusion.fusion_model import FusionModel, VqFusionConfig
from torchrec_sid.quantizers.fusion.fusion_report import FusionMeter, SourceReport
from torchrec_sid.quantizers.fusion.heads import FusionHeads
from torchrec_sid.quantizers.fusion.source_rows import FusionData
from torchrec_sid.quantizers.fusion.sources import (
    CategorySource,
    FusionInputs,
    Source,
    source_from_json,
    source_to_json,
)
from torchrec_sid.quantizers.gradient_fit import FitOptions
from torchrec_sid.quantizers.renaming import CodeGroup, Renaming
from torchrec_sid.seeding import derived_generator
from torchrec_sid.spec import SidSpec
from torchrec_sid.streams import EmbeddingStream

_WIDEST_LATENT = 512


@register_quantizer
class VqFusion(Quantizer):
    """Several sources of an item, some of them missing, through one encoder into one SID.

    Named in "SIDE" (arXiv 2506.16698), whose losses are not public; these are ours. Every source is
    normalised to variance 1, their concatenation is encoded, quantized by residual codebooks and tied
    digits, and decoded by one head per source::

        sum_k w_k |x_k - g_k(z_hat)|^2 / Var(x_k) + sum_j v_j KL(p_j || softmax h_j(z_hat)) / H(mean p_j)
            + quantizer loss / Var(z) + lambda InfoNCE(co-engaged pairs) / log P

    so that each term is 1 for knowing nothing. Like :class:`RqVae` it starts at the closed-form solution
    and ends in the state with the lowest error on a fixed sample.

    As a quantizer of vectors it reads and decodes rows of :class:`~.sources.FusionInputs`, all sources side
    by side on one scale, followed by a flag per source (:meth:`rows`); :meth:`decode_sources` gives them
    back one by one.

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
        >>> {name: tuple(decoded.shape) for name, decoded in fusion.decode_sources(codes).items()}
        {'text': (600, 16), 'kind': (600, 2)}
    """

    kind: ClassVar[str] = "vq_fusion"
    layout_version: ClassVar[int] = 2  # of 1 the manifest's "dim" held the sources
    config_type: ClassVar[type[Any]] = VqFusionConfig
    fuses: ClassVar[bool] = True
    trains: ClassVar[bool] = True
    config: VqFusionConfig

    def __init__(
        self,
        sources: Mapping[str, Source],
        config: VqFusionConfig | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        config = VqFusionConfig() if config is None else config
        inputs = FusionInputs(sources, device=device)
        super().__init__(inputs.columns, config, device=device)
        self.inputs = inputs
        widest = inputs.dim
        latent = min(widest, _WIDEST_LATENT) if config.latent_dim is None else config.latent_dim
        if latent > widest:
            raise SidError("latent_dim", f"{latent} for {widest} columns", f"Use at most {widest}.")
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
        return vectors * bottleneck.dim + heads + self.dim

    @property
    def spec(self) -> SidSpec:
        """One level per codebook, then one per digit."""
        return SidSpec(self.bottleneck.cardinalities)

    @property
    def code_groups(self) -> tuple[CodeGroup, ...]:
        """Those of the bottleneck."""
        return self.bottleneck.code_groups

    def _rename(self, renaming: Renaming) -> None:
        self.bottleneck.rename(renaming)

    @property
    def model(self) -> FusionModel:
        """Its parts."""
        return FusionModel(self.inputs, self.encoder, self.bottleneck, self.heads)

    def rows(self, data: Any, *, name: str = "sources") -> EmbeddingStream:
        """Packed rows ``[n, D + K]`` of sources by name, of ``FusionData``, or as they are.

        Raises:
            SidError: as for :class:`FusionData`, or packed rows of another width.
        """
        if isinstance(data, Mapping):
            data = FusionData(data, self.sources)
        if not isinstance(data, FusionData):
            return super().rows(data, name=name)
        return EmbeddingStream(lambda: map(self.model.pack, data), self.dim, data.rows, name)

    def fit(
        self,
        data: Mapping[str, Any] | FusionData,
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
        opened = self._opened(data, present)
        fit = FusionFit(self.model, self.config, opened, pairs, Collectives(group))
        fit.run(self, {"kind": self.kind, **self.manifest()}, options)
        self.fitted.fill_(True)
        return FitReport(fit.rows, time.perf_counter() - began, fit.level_errors())

    def encode(self, x: Any, *, beam: int = 1, present: Mapping[str, Any] | None = None) -> Tensor:
        """Sources (what :meth:`rows` takes; some may be left out) -> codes ``[N, L]`` int64.

        Args:
            x: by source name, or packed rows.
            beam: hypotheses kept per level; 1 is greedy, as in training.
            present: by source name ``[N]`` bool.

        Raises:
            SidError: not fitted, an unknown source or category, a row without any source, bad values.
        """
        return super().encode(x if present is None else self._opened(x, present), beam=beam)

    def _encode(self, x: Tensor, beam: int) -> Tensor:
        return self.model.encode(x, beam=beam)

    def _decode(self, codes: Tensor) -> Tensor:
        """Packed rows of whole items: every flag is 1."""
        blocks = []
        for i, (source, out) in enumerate(
            zip(self.sources.values(), self.model.decode(codes), strict=True)
        ):
            if isinstance(source, CategorySource):
                out = self.inputs.normalise(i, out.softmax(dim=1))
            blocks.append(out * math.sqrt(source.weight))
        return torch.cat([*blocks, blocks[0].new_ones(len(codes), len(blocks))], dim=1)

    @torch.no_grad()
    def decode_sources(self, codes: Tensor) -> dict[str, Tensor]:
        """Codes ``[N, l]``, any prefix ``1 <= l <= L`` -> by source name float32 ``[N, width]``.

        Embeddings in their own units, categories as probabilities.

        Raises:
            SidError: not fitted, no or too many levels, a code outside its alphabet.
        """
        decoded = self.model.decode(self._checked(codes))
        return {
            name: out.softmax(dim=1) if isinstance(source, CategorySource) else self.inputs.restore(i, out)
            for i, ((name, source), out) in enumerate(zip(self.sources.items(), decoded, strict=True))
        }

    def additive_decoder(self) -> AdditiveDecoder:
        """That of the latent, from which the heads decode the sources."""
        self.require_fitted()
        return self.bottleneck.additive_decoder()

    def report(
        self,
        data: Mapping[str, Any] | FusionData,
        *,
        present: Mapping[str, Any] | None = None,
        beam: int = 1,
    ) -> dict[str, SourceReport]:
        """What the SID keeps of each source on held-out items, and what is kept without a quantizer."""
        self.require_fitted()
        meter = FusionMeter(self.model)
        for raw in self._opened(data, present):
            meter.add(raw, beam=beam)
        return meter.reports()

    def _opened(self, data: Any, present: Mapping[str, Any] | None) -> FusionData:
        return data if isinstance(data, FusionData) else FusionData(data, self.sources, present)

    @classmethod
    def from_manifest(cls, manifest: dict[str, Any]) -> Self:
        """Build an unfitted quantizer from the JSON form of its sources and configuration."""
        pairs = manifest["sources"] if "sources" in manifest else manifest["dim"]
        sources = {name: source_from_json(value) for name, value in pairs}
        return cls(sources, cls.config_from_json(manifest["config"]))

    def manifest(self) -> dict[str, Any]:
        """Sources and configuration in JSON form."""
        # A list of pairs: the order of the sources is that of the columns.
        sources = [[name, source_to_json(source)] for name, source in self.sources.items()]
        plain = super().manifest()
        return {**plain, "dim": sources} if self._layout == 1 else {**plain, "sources": sources}
