"""`RqVae`: an encoder, residual codebooks and a decoder, trained together."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.distributed as dist
from torch import Tensor

from torchrec_sid.errors import SidError
from torchrec_sid.quantizers.autoencoder import GradientName, LinearPlusMlp, pass_gradient
from torchrec_sid.quantizers.base import (
    AdditiveDecoder,
    FitReport,
    Quantized,
    Quantizer,
    register_quantizer,
)
from torchrec_sid.quantizers.bottleneck import Bottleneck, BottleneckConfig, start_bottleneck
from torchrec_sid.quantizers.collectives import Collectives
from torchrec_sid.quantizers.dpca_fit import top_directions
from torchrec_sid.quantizers.gradient_fit import (
    FitOptions,
    Rows,
    Step,
    Trainee,
    TrainingConfig,
    all_tensors,
    train,
    trainable,
)
from torchrec_sid.quantizers.renaming import CodeGroup, Renaming
from torchrec_sid.quantizers.sample import StreamMoments, stream_moments
from torchrec_sid.seeding import derived_generator
from torchrec_sid.spec import SidSpec
from torchrec_sid.streams import EmbeddingData, EmbeddingStream

_WIDEST_LATENT = 512
_MEASURED_ROWS = 4096


@dataclass(frozen=True)
class RqVaeConfig(BottleneckConfig, TrainingConfig):
    """Shape and training of an :class:`RqVae`; :meth:`published` gives the published shape.

    Raises:
        SidError: a field out of range.
    """

    cardinalities: tuple[int, ...] = (256, 256, 256)
    """K_l per level."""
    latent_dim: int | None = None
    """Width of the latents; None is d, at most 512."""
    hidden: tuple[int, ...] = (256,)
    """Widths of the hidden layers of encoder and decoder; none leaves both linear."""
    gradient: GradientName = "straight_through"
    """What the encoder learns from: ``"straight_through"`` or ``"rotation"``."""
    seed: int = 0
    """Seed of every random choice."""

    def __post_init__(self) -> None:
        BottleneckConfig.__post_init__(self)
        TrainingConfig.__post_init__(self)
        object.__setattr__(self, "cardinalities", SidSpec(self.cardinalities).cardinalities)
        object.__setattr__(self, "hidden", tuple(int(h) for h in self.hidden))
        if any(h < 1 for h in self.hidden) or (self.latent_dim is not None and self.latent_dim < 1):
            raise SidError("hidden, latent_dim", f"{self.hidden}, {self.latent_dim}", "Use widths above 0.")
        if self.gradient not in ("straight_through", "rotation"):
            raise SidError("gradient", repr(self.gradient), "Use 'straight_through' or 'rotation'.")

    @classmethod
    def published(cls, **changes: Any) -> Self:
        """The shape of "Better Generalization with Semantic IDs" (arXiv 2306.08121).

        L = 8 levels of K = 2048 codes, one hidden layer of width 256, latents of 256, beta = 0.25, dead
        codes moved to items of the batch. Made for 10^7 items and more.
        """
        shape: dict[str, Any] = {"cardinalities": (2048,) * 8, "hidden": (256,), "latent_dim": 256}
        return cls(**(shape | changes))


@register_quantizer
class RqVae(Quantizer):
    """Residual vector quantization of a learned latent (van den Oord 2017; Lee 2022, arXiv 2203.01941).

    The fit starts at residual k-means: encoder and decoder begin as the PCA of the data, the codebooks as
    k-means of its coordinates, and the state with the lowest error on a fixed sample is kept, so that the
    result is that of :class:`ResidualKMeans` or better on that sample. Loss, each term a fraction of the
    variance of its target::

        |x - x_hat|^2 / Var(x) + sum_l (beta |r_l - sg(e_l)|^2 [+ |sg(r_l) - e_l|^2]) / Var(z)

    with the bracket only if codebooks follow gradients.

    Args:
        dim: d, the width of the embeddings.
        config: see :class:`RqVaeConfig`.
        device: where the state lives and the fit runs.

    Example:
        >>> x = torch.randn(600, 16, generator=torch.Generator().manual_seed(0))
        >>> quantizer = RqVae(16, RqVaeConfig(cardinalities=(16, 16), epochs=2, batch_size=128))
        >>> report = quantizer.fit(x)
        >>> quantizer.encode(x).shape, quantizer.decode(quantizer.encode(x)).shape
        (torch.Size([600, 2]), torch.Size([600, 16]))
    """

    kind: ClassVar[str] = "rq_vae"
    config_type: ClassVar[type[Any]] = RqVaeConfig
    trains: ClassVar[bool] = True
    config: RqVaeConfig

    mean: Tensor
    """``[d]``, subtracted first."""
    scale: Tensor
    """Scalar, the root of the total variance of the data."""

    def __init__(
        self, dim: int, config: RqVaeConfig | None = None, *, device: torch.device | str | None = None
    ) -> None:
        config = RqVaeConfig() if config is None else config
        super().__init__(dim, config, device=device)
        self.register_buffer("mean", torch.zeros(dim, device=device))
        self.register_buffer("scale", torch.ones((), device=device))
        latent = min(dim, _WIDEST_LATENT) if config.latent_dim is None else config.latent_dim
        if latent > dim:
            raise SidError("latent_dim", f"{latent} for {dim} dimensions", f"Use at most {dim}.")
        generator = derived_generator(config.seed, "rq_vae.networks")
        self.encoder = LinearPlusMlp(dim, latent, config.hidden, generator=generator, device=device)
        self.decoder = LinearPlusMlp(latent, dim, config.hidden, generator=generator, device=device)
        self.bottleneck = Bottleneck(latent, config.cardinalities, (), config, device=device)

    @property
    def decoder_floats(self) -> int:
        """Numbers that decoding needs: codebooks, decoder, mean and scale."""
        codebooks = sum(self.bottleneck.sizes) * self.bottleneck.dim + self.bottleneck.dim
        return codebooks + sum(p.numel() for p in self.decoder.parameters()) + self.dim + 1

    @property
    def spec(self) -> SidSpec:
        """The shape of the SIDs it makes."""
        return SidSpec(self.config.cardinalities)

    @property
    def code_groups(self) -> tuple[CodeGroup, ...]:
        """Those of the bottleneck."""
        return self.bottleneck.code_groups

    def _rename(self, renaming: Renaming) -> None:
        self.bottleneck.rename(renaming)

    def forward(self, x: Tensor) -> Quantized:
        """Embeddings ``[N, d]`` -> codes, reconstruction and training loss, with gradients."""
        step = self._step((x.to(self.mean.device),))
        reconstruction = self._decode_latent(step.quantized.z_hat)
        return Quantized(step.quantized.codes, reconstruction, step.loss)

    def fit(
        self,
        data: EmbeddingData | EmbeddingStream,
        *,
        progress: bool = False,
        checkpoint: str | Path | None = None,
        checkpoint_every: int = 500,
        group: dist.ProcessGroup | None = None,
    ) -> FitReport:
        """Train from embeddings; the same data, seed and number of processes give the same quantizer.

        Args:
            data: anything :func:`~torchrec_sid.streams.open_stream` takes; read once per epoch,
                once before and once after.
            progress: show a bar with loss, usage and perplexity per level; they are logged as well.
            checkpoint: file from which an interrupted fit continues, with the result it would have had.
            checkpoint_every: steps between writes of that file.
            group: fit together with the other ranks of this process group. Each rank passes the same data
                and reads its share of the rows; all ranks end with the same bits.

        Raises:
            SidError: bad data, or another dimension than ``dim``.
            CollapseError: usage collapsed or the loss diverged; the message says what to change.
            ArtifactError: the checkpoint belongs to another fit.
        """
        began = time.perf_counter()
        ranks, options = Collectives(group), FitOptions(progress, checkpoint, checkpoint_every)
        stream = self.rows(data)

        def own_rows() -> Iterator[Rows]:
            return ranks.own_rows((batch,) for batch in stream)

        own = EmbeddingStream(lambda: (batch for (batch,) in own_rows()), self.dim, None, stream.name)
        moments = self._moments(own, ranks)
        variance = float(moments.covariance.trace())
        if not options.resumes(ranks):
            self._start(moments, ranks)
        if variance > 0:
            trainee = self._trainee(moments.sample[:_MEASURED_ROWS])
            config = self.config
            train(
                "RQ-VAE",
                trainee,
                own_rows,
                rows=moments.rows,
                config=config,
                seed=config.seed,
                ranks=ranks,
                options=options,
            )
        self.fitted.fill_(True)
        fvu = self._measure_levels(own, ranks, variance * moments.rows)
        return FitReport(moments.rows, time.perf_counter() - began, fvu)

    def _moments(self, own: EmbeddingStream, ranks: Collectives) -> StreamMoments:
        rows = max(1, self.config.buffer_rows // ranks.size)
        moments = stream_moments(own, sample_rows=rows, seed=self.config.seed, device=self.mean.device)
        return ranks.merge_moments(moments)

    @torch.no_grad()
    def _start(self, moments: StreamMoments, ranks: Collectives) -> None:
        """Encoder and decoder are the PCA, the codebooks residual k-means of its coordinates."""
        variance = float(moments.covariance.trace())
        self.mean.copy_(moments.mean)
        self.scale.fill_(math.sqrt(variance) if variance > 0 else 1.0)
        directions = top_directions(moments.covariance, self.bottleneck.dim)
        self.encoder.linear.weight.copy_(directions)
        self.decoder.linear.weight.copy_(directions.T)
        z = self.encoder(self._normalise(moments.sample))
        step = self.config.batch_size * ranks.size
        start_bottleneck(self.bottleneck, z, rows_per_step=step, seed=self.config.seed)
        ranks.broadcast_(all_tensors(self).values())

    def _trainee(self, sample: Tensor) -> Trainee:
        return Trainee(
            module=self,
            bottleneck=self.bottleneck,
            encoder=trainable([self.encoder]),
            decoder=trainable([self.decoder]),
            step=lambda batch, _: self._step(batch),
            measure=lambda: self._sample_error(sample),
            manifest={"kind": self.kind, **self.manifest()},
        )

    def _step(self, batch: Rows) -> Step:
        x = self._normalise(batch[0].to(self.mean.device))
        z = self.encoder(x)
        quantized = self.bottleneck(z)
        z_hat = pass_gradient(z, quantized.z_hat, self.config.gradient)
        if quantized.z_hat.requires_grad:
            # Codebooks that are parameters learn from the reconstruction as well; adds 0.
            z_hat = z_hat + (quantized.z_hat - quantized.z_hat.detach())
        error = (x - self.decoder(z_hat)).square().sum(1).mean()
        return Step(error + quantized.loss, z, quantized)

    def _normalise(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.scale

    def _decode_latent(self, z_hat: Tensor) -> Tensor:
        decoded: Tensor = self.mean + self.scale * self.decoder(z_hat)
        return decoded

    @torch.no_grad()
    def _sample_error(self, sample: Tensor) -> float:
        x = sample.to(self.mean.device)
        z = self.encoder(self._normalise(x))
        left = x - self._decode_latent(self.bottleneck.decode(self.bottleneck.encode(z)))
        return float(left.square().sum(dtype=torch.float64))

    def _encode(self, x: Tensor, beam: int) -> Tensor:
        return self.bottleneck.encode(self.encoder(self._normalise(x)), beam=beam)

    def _decode(self, codes: Tensor) -> Tensor:
        return self._decode_latent(self.bottleneck.decode(codes))

    def additive_decoder(self) -> AdditiveDecoder:
        """As for every quantizer where the decoder is linear; else that of the latent."""
        self.require_fitted()
        return self.bottleneck.additive_decoder() if self.config.hidden else super().additive_decoder()

    @torch.no_grad()
    def _measure_levels(self, own: EmbeddingStream, ranks: Collectives, total: float) -> tuple[float, ...]:
        """Fraction of the variance unexplained after each level, over the rows of all ranks."""
        error = torch.zeros(self.spec.levels, dtype=torch.float64, device=self.mean.device)
        for batch in own:
            x = batch.to(self.mean.device)
            codes = self.encode(x)
            for depth in range(1, self.spec.levels + 1):
                error[depth - 1] += (x - self.decode(codes[:, :depth])).square().sum(dtype=torch.float64)
        ranks.sum_([error])
        return tuple((error / total).tolist()) if total > 0 else (0.0,) * self.spec.levels
