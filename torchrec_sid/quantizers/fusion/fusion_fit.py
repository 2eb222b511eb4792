"""The fit of a fused quantizer: statistics, start, training step, errors by level."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from torchrec_sid.errors import SidError
from torchrec_sid.quantizers.autoencoder import pass_gradient
from torchrec_sid.quantizers.bottleneck import BottleneckOutput, start_bottleneck
from torchrec_sid.quantizers.collectives import Collectives
from torchrec_sid.quantizers.dpca_fit import top_directions
from torchrec_sid.quantizers.fusion.fusion_model import FusionModel, VqFusionConfig
from torchrec_sid.quantizers.fusion.heads import info_nce, source_errors
from torchrec_sid.quantizers.fusion.source_rows import FusionData
from torchrec_sid.quantizers.gradient_fit import (
    FitOptions,
    Rows,
    Step,
    Trainee,
    all_tensors,
    train,
    trainable,
)
from torchrec_sid.quantizers.sample import StreamMoments, stream_moments
from torchrec_sid.seeding import derived_generator
from torchrec_sid.streams import EmbeddingStream

_MEASURED_ROWS = 4096


class FusionFit:
    """One fit of a fused quantizer to its data.

    Args:
        model: what is fitted.
        config: how.
        data: the items.
        pairs: ``[P, 2]`` int64 rows of co-engaged items, or None.
        ranks: the processes of the fit.

    Raises:
        SidError: pairs of another shape, or outside the data.
    """

    def __init__(
        self,
        model: FusionModel,
        config: VqFusionConfig,
        data: FusionData,
        pairs: Tensor | None,
        ranks: Collectives,
    ) -> None:
        self._model, self._config, self._data = model, config, data
        self._pairs, self._ranks = pairs, ranks
        self._weights = model.source_weights
        self.rows = 0
        if pairs is not None:
            _check_pairs(pairs, data)

    def run(self, module: nn.Module, manifest: dict[str, Any], options: FitOptions) -> None:
        """Fit the statistics, start in closed form or at the checkpoint, and train.

        Args:
            module: holds the parts of the model; its state is broadcast, checkpointed and kept.
            manifest: what the fit is of; a checkpoint of another one is refused.
            options: see :class:`FitOptions`.
        """
        config = self._config
        self.rows = self._model.inputs.fit((raw for (raw,) in self._own_raw()), self._ranks)
        moments = self._moments()
        if not options.resumes(self._ranks):
            self._start(moments)
            self._ranks.broadcast_(all_tensors(module).values())
        if not bool(moments.covariance.any()):
            return
        train(
            "VQ fusion",
            self._trainee(module, manifest, moments.sample[:_MEASURED_ROWS]),
            self._own_rows,
            rows=self.rows,
            config=config,
            seed=config.seed,
            ranks=self._ranks,
            options=options,
        )

    @torch.no_grad()
    def level_errors(self) -> tuple[float, ...]:
        """Mean over sources, by weight, of their errors after each level, over the rows of all ranks."""
        model = self._model
        levels = len(model.bottleneck.cardinalities)
        total = torch.zeros(levels, len(self._weights), dtype=torch.float64, device=self._weights.device)
        count = torch.zeros_like(total[0])
        for (packed,) in self._own_rows():
            present = torch.stack([part.present.sum() for part in model.inputs.split(packed)])
            codes = model.encode(packed)
            for depth in range(1, levels + 1):
                total[depth - 1] += self._errors(packed, codes[:, :depth]) * present
            count += present
        self._ranks.sum_([total, count])
        mean = (total / count.clamp(min=1)) @ self._weights.double() / self._weights.sum().double()
        return tuple(mean.tolist())

    def _own_raw(self) -> Iterator[Rows]:
        return self._ranks.own_rows((raw,) for raw in self._data)

    def _own_rows(self) -> Iterator[Rows]:
        return ((self._model.pack(raw),) for (raw,) in self._own_raw())

    def _moments(self) -> StreamMoments:
        """Of the packed rows of all ranks; the covariance without the flags, ``[D, D]``."""
        inputs, config = self._model.inputs, self._config
        stream = EmbeddingStream(
            lambda: (packed for (packed,) in self._own_rows()), inputs.columns, None, "sources"
        )
        kept = max(1, config.buffer_rows // self._ranks.size)
        device = inputs.mean.device
        moments = stream_moments(stream, sample_rows=kept, seed=config.seed, device=device)
        merged = self._ranks.merge_moments(moments)
        return merged._replace(covariance=merged.covariance[: inputs.dim, : inputs.dim])

    @torch.no_grad()
    def _start(self, moments: StreamMoments) -> None:
        """The encoder is a PCA, the bottleneck the closed form behind it, the heads its inverse."""
        model = self._model
        directions = top_directions(moments.covariance, model.bottleneck.dim).float()
        model.encoder.linear.weight.zero_()[:, : model.inputs.dim] = directions
        model.inputs.fit_imputation(moments.covariance, moments.rows)
        z = model.latents(moments.sample)
        step = self._config.batch_size * self._ranks.size
        start_bottleneck(model.bottleneck, z, rows_per_step=step, seed=self._config.seed)
        sample, codes = moments.sample[:_MEASURED_ROWS], model.bottleneck.encode(z[:_MEASURED_ROWS])
        depths = range(1, codes.shape[1] + 1)
        z_hats = [model.bottleneck.decode(codes[:, :depth]) for depth in depths]
        model.heads.start(directions, z_hats, model.inputs.split(sample))

    def _trainee(self, module: nn.Module, manifest: dict[str, Any], sample: Tensor) -> Trainee:
        model = self._model
        pairs = None if self._pairs is None else len(self._pairs)
        return Trainee(
            module=module,
            bottleneck=model.bottleneck,
            encoder=trainable([model.encoder]),
            decoder=trainable([model.heads]),
            step=lambda batch, seed: self._step(batch[0], seed),
            measure=lambda: self._measure(sample),
            manifest={**manifest, "pairs": pairs},
        )

    @torch.no_grad()
    def _measure(self, sample: Tensor) -> float:
        """The losses of the sources, and of pairs where there are some, on fixed items."""
        model = self._model
        error = float(self._errors(sample, model.encode(sample)) @ self._weights)
        if self._pairs is None or not self._config.contrastive_weight:
            return error
        some = self._pairs[:_MEASURED_ROWS].split(self._config.contrastive_batch)
        batches = [pairs for pairs in some if len(pairs) > 1] or [self._pairs]
        contrast = sum(float(self._contrast(pairs)) for pairs in batches) / len(batches)
        return error + self._config.contrastive_weight * contrast

    def _step(self, packed: Tensor, seed: int) -> Step:
        model, config = self._model, self._config
        generator = derived_generator(seed, f"vq_fusion.step rank {self._ranks.rank}")
        z = model.latents(packed)
        quantized: BottleneckOutput = model.bottleneck(z)
        decoded = model.heads(self._through(z, quantized))
        errors = source_errors(model.inputs, decoded, model.inputs.split(packed))
        loss = errors @ self._weights + quantized.loss
        if config.source_dropout and len(self._weights) > 1:
            loss = loss + self._consistency(packed, z, generator)
        if self._pairs is not None and config.contrastive_weight:
            draw = torch.randint(len(self._pairs), (config.contrastive_batch,), generator=generator)
            loss = loss + config.contrastive_weight * self._contrast(self._pairs[draw])
        return Step(loss, z, quantized)

    def _through(self, z: Tensor, quantized: BottleneckOutput) -> Tensor:
        z_hat = pass_gradient(z, quantized.z_hat, self._config.gradient)
        # Codebooks that are parameters learn from the heads as well; adds 0.
        return z_hat + (quantized.z_hat - quantized.z_hat.detach())

    def _consistency(self, packed: Tensor, z: Tensor, generator: torch.Generator) -> Tensor:
        """Distance of the latents of items with hidden sources from their whole latents, over Var(z).

        The codebooks see whole items only: hidden sources in their averages would pull codewords to
        where no whole item is.
        """
        model = self._model
        hidden = model.inputs.drop(packed, self._config.source_dropout, generator)
        changed = (hidden != packed).any(dim=1)
        distance = (model.latents(hidden[changed]) - z[changed].detach()).square().sum()
        return distance / len(z) / model.bottleneck.variance.clamp(min=1e-12)

    def _contrast(self, pairs: Tensor) -> Tensor:
        packed = self._model.pack(self._data.gather(pairs.T.reshape(-1)))
        z = self._model.latents(packed)
        left, right = self._through(z, self._model.bottleneck(z)).chunk(2)
        return info_nce(left, right, self._config.contrastive_temperature)

    @torch.no_grad()
    def _errors(self, packed: Tensor, codes: Tensor) -> Tensor:
        """Per source ``[K]``, of packed rows decoded from codes ``[N, l]``."""
        decoded = self._model.decode(codes)
        return source_errors(self._model.inputs, decoded, self._model.inputs.split(packed))


def _check_pairs(pairs: Tensor, data: FusionData) -> None:
    if pairs.dim() != 2 or pairs.shape[1] != 2 or pairs.dtype != torch.int64 or not len(pairs):
        raise SidError("pairs", f"{pairs.dtype} {tuple(pairs.shape)}", "Pass [P, 2] int64 row numbers.")
    if data.rows is not None and (int(pairs.min()) < 0 or int(pairs.max()) >= data.rows):
        raise SidError(
            "pairs",
            f"rows {int(pairs.min())}..{int(pairs.max())}",
            f"The data have rows 0..{data.rows - 1}.",
        )
    data.gather(pairs[0])  # refuses streams before any work
