"""The trainable form of residual quantization: codebooks, then tied digits, between encoder and decoder.

It starts at the closed-form solution of :class:`~torchrec_sid.quantizers.dpca.DiscretePca` (residual
k-means where there are only codebooks) and follows the moving latents. Codewords are parameters that
learn from their residuals and, together, from what is decoded; or they are moving means. Moving averages
of two moments give a tied digit stage its best decoder, so that its directions stay orthonormal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from torchrec_sid.errors import SidError
from torchrec_sid.quantizers.base import AdditiveDecoder, walk_levels
from torchrec_sid.quantizers.collectives import Collectives
from torchrec_sid.quantizers.digits import RoundDigits, code_tables, encode_digits
from torchrec_sid.quantizers.dpca import DiscretePca, DiscretePcaConfig
from torchrec_sid.quantizers.dpca_fit import DigitMoments, best_decoder
from torchrec_sid.quantizers.kmeans import assign, cluster_sums, sum_by_code
from torchrec_sid.quantizers.renaming import CodeGroup, Renaming, code_groups
from torchrec_sid.quantizers.residual_kmeans import ResidualKMeans, ResidualKMeansConfig
from torchrec_sid.quantizers.usage import count_codes, usage_of
from torchrec_sid.seeding import derived_generator

_TINY = 1e-30
_MEASURED_ROWS = 8192
_LEAST_GAIN = 1e-3  # of the variance; a level below it is not judged


@dataclass(frozen=True)
class BottleneckConfig:
    """How a :class:`Bottleneck` follows its encoder.

    Raises:
        SidError: a field out of range.
    """

    codebook_update: str = "gradient"
    """``"gradient"``: codewords are parameters that learn from their residuals and from the decoder;
    ``"ema"``: moving means of their residuals alone."""
    codebook_rate: float = 0.2
    """Adam's learning rate for codebooks that follow gradients, as a fraction of the root mean square that
    an entry has over their codewords; ``learning_rate`` is for networks, whose scale is another."""
    ema_decay: float = 0.99
    """Decay per step of the moving averages, 0 <= decay < 1."""
    commitment: float = 0.25
    """beta, the weight of |r_l - sg(e)|^2 (van den Oord 2017)."""
    reset_below: float = 0.02
    """A code with fewer assignments per step than this fraction of the mean, batch / K, is dead: it moves
    to a random residual of the batch, and its moving averages with it. 0 never resets."""

    def __post_init__(self) -> None:
        if self.codebook_update not in ("ema", "gradient"):
            raise SidError("codebook_update", repr(self.codebook_update), "Use 'ema' or 'gradient'.")
        if not 0 <= self.ema_decay < 1:
            raise SidError("ema_decay", f"{self.ema_decay}", "Use 0 <= decay < 1, e.g. 0.99.")
        if not self.codebook_rate >= 0:
            raise SidError("codebook_rate", f"{self.codebook_rate}", "Use 0 or more, e.g. 0.2.")
        if self.commitment < 0 or not 0 <= self.reset_below < 1:
            raise SidError(
                "commitment, reset_below",
                f"{self.commitment}, {self.reset_below}",
                "Use a commitment of 0 or more and a reset threshold in [0, 1).",
            )


class BottleneckOutput(NamedTuple):
    """What :meth:`Bottleneck.forward` returns."""

    codes: Tensor
    """``[N, L]`` int64."""
    z_hat: Tensor
    """``[N, d]``; with gradient to the codebooks if they are parameters, none to z."""
    loss: Tensor
    """Scalar: commitment and codebook terms, each over the variance of z."""
    inputs: tuple[Tensor, ...]
    """r_l, what each codebook and then each digit stage was given: ``[N, d]`` without gradient."""


class Bottleneck(nn.Module):
    """Residual codebooks and tied digit stages that move with their input.

    Args:
        dim: d, the width of the latents.
        codebooks: codewords per codebook, first to last.
        stages: ``(m, alphabet)`` of the digit stages that follow.
        config: see :class:`BottleneckConfig`.
        device: where the state lives.
    """

    prior: Tensor
    """``[codebooks]``, pseudo-assignments per step to the origin: shrinks codewords of few points."""
    word_scale: Tensor
    """``[codebooks, d]``, root mean square of each entry of the codewords that items get at the start."""
    cross: Tensor
    """``[C, d]`` float64, moving average of E[q r^T] per digit."""
    square: Tensor
    """``[C, C]`` float64, moving average of E[q q^T] within each stage."""
    basis: Tensor
    """``[C, d]``, directions times scales of the digits."""
    variance: Tensor
    """Scalar, moving average of E|z - mean z|^2."""
    start_perplexity: Tensor
    """``[L]``, perplexity of each level before training; what usage is compared with."""
    center: Tensor
    """``[d]``, subtracted from z before the first codebook; the mean of z at the start."""

    def __init__(
        self,
        dim: int,
        codebooks: tuple[int, ...],
        stages: tuple[tuple[int, int], ...],
        config: BottleneckConfig,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.sizes, self.digit_stages, self.config = dim, codebooks, stages, config
        self.alphabets = tuple(a for m, a in stages for _ in range(m))
        self.cardinalities = (*codebooks, *self.alphabets)
        digits = len(self.alphabets)
        for level, size in enumerate(codebooks):
            table = torch.zeros(size, dim, device=device)
            if config.codebook_update == "gradient":
                self.register_parameter(f"codebook_{level}", nn.Parameter(table))
            else:
                self.register_buffer(f"codebook_{level}", table)
            # Assignments per step, a moving average; a code without any stays free.
            self.register_buffer(f"count_{level}", torch.zeros(size, device=device))
        self.register_buffer("basis", torch.zeros(digits, dim, device=device))
        self.register_buffer("center", torch.zeros(dim, device=device))
        # What only training needs is in its checkpoints, not in the fitted quantizer.
        for name, value in self._training_state(device):
            self.register_buffer(name, value, persistent=False)

    def _training_state(self, device: torch.device | str | None) -> Iterator[tuple[str, Tensor]]:
        digits, double = len(self.alphabets), torch.float64
        for level, size in enumerate(self.sizes):
            yield f"total_{level}", torch.zeros(size, self.dim, device=device)
        yield "prior", torch.zeros(len(self.sizes), device=device)
        yield "word_scale", torch.zeros(len(self.sizes), self.dim, device=device)
        yield "cross", torch.zeros(digits, self.dim, dtype=double, device=device)
        yield "square", torch.zeros(digits, digits, dtype=double, device=device)
        yield "variance", torch.ones((), device=device)
        yield "start_perplexity", torch.ones(len(self.cardinalities), device=device)

    def codebook(self, level: int) -> Tensor:
        """``[K, d]`` of a codebook (0-based)."""
        table: Tensor = getattr(self, f"codebook_{level}")
        return table

    def used(self, level: int) -> Tensor:
        """``[K]`` bool: codes that :meth:`encode` may choose."""
        return self.get_buffer(f"count_{level}") > 0

    def forward(self, z: Tensor) -> BottleneckOutput:
        """Quantize latents ``[N, d]`` greedily, with the losses of training."""
        residual = z - self.center
        z_hat = self.center.expand_as(z)
        codes, inputs = [], []
        loss = z.new_zeros(())
        for level in range(len(self.sizes)):
            codebook = self.codebook(level)
            chosen = assign(residual.detach(), codebook.detach(), self.used(level)).codes
            word = codebook[chosen]
            inputs.append(residual.detach())
            loss = loss + self._pull(residual, word) + self._shrink(level, len(z))
            z_hat = z_hat + word
            residual = residual - word.detach()
            codes.append(chosen[:, None])
        for rows, (_, alphabet) in zip(self._stage_rows(), self.digit_stages, strict=True):
            t = residual.detach() @ _encoder(rows).T
            q = RoundDigits(alphabet)(t)
            inputs.append(residual.detach())
            word = q @ rows
            loss = loss + self._pull(residual, word)
            z_hat = z_hat + word
            residual = residual - word
            codes.append(q.to(torch.int64) + alphabet // 2)
        return BottleneckOutput(torch.cat(codes, dim=1), z_hat, loss, tuple(inputs))

    def _pull(self, residual: Tensor, word: Tensor) -> Tensor:
        """Commitment, and where codebooks are parameters their own pull, as fractions of Var(z)."""
        terms = self.config.commitment * (residual - word.detach()).square().sum(1).mean()
        if word.requires_grad:
            terms = terms + (residual.detach() - word).square().sum(1).mean()
        return terms / self.variance.clamp(min=_TINY)

    def _shrink(self, level: int, rows: int) -> Tensor:
        """Pull of the pseudo-assignments on codebooks that are parameters; averages have it built in.

        Twice, because a codeword is fitted twice: to its residuals, and to what is decoded.
        """
        codebook = self.codebook(level)
        if not codebook.requires_grad:
            return codebook.new_zeros(())
        pull = 2 * self.prior[level] / rows * codebook.square().sum()
        return pull / self.variance.clamp(min=_TINY)

    @torch.no_grad()
    def encode(self, z: Tensor, *, beam: int = 1) -> Tensor:
        """Latents ``[N, d]`` -> codes ``[N, L]`` int64."""
        centred = z - self.center
        levels = range(len(self.sizes))
        books, used = [self.codebook(i) for i in levels], [self.used(i) for i in levels]
        if beam > 1:
            used += [torch.ones(a, dtype=torch.bool, device=z.device) for a in self.alphabets]
            return walk_levels(centred, (*books, *code_tables(self.basis, self.alphabets)), used, beam)
        columns = [walk_levels(centred, books, used)] if books else []
        if self.alphabets:
            for level in levels:
                centred = centred - books[level][columns[0][:, level]]
            digits = encode_digits(centred, self.basis, self.digit_stages).digits
            halves = torch.tensor([a // 2 for a in self.alphabets], device=z.device)
            columns.append(digits.to(torch.int64) + halves)
        return torch.cat(columns, dim=1)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes ``[N, l]`` of any prefix -> latents ``[N, d]``."""
        z_hat = self.center.expand(len(codes), -1).clone()
        for level in range(min(len(self.sizes), codes.shape[1])):
            z_hat += self.codebook(level)[codes[:, level]]
        for column, rows in enumerate(self.basis[: max(codes.shape[1] - len(self.sizes), 0)]):
            digits = codes[:, len(self.sizes) + column] - self.alphabets[column] // 2
            z_hat += digits[:, None] * rows
        return z_hat

    @property
    def code_groups(self) -> tuple[CodeGroup, ...]:
        """A codebook each, then a stage of digits each."""
        return code_groups(self.sizes, self.digit_stages)

    @torch.no_grad()
    def rename(self, renaming: Renaming) -> None:
        """Put codewords and directions where a renaming of a fitted quantizer wants them.

        What only training needs is not renamed: a fit does not go on from here.
        """
        books = len(self.sizes)
        for level, order in enumerate(renaming.codes[:books]):
            for rows in (self.codebook(level), self.get_buffer(f"count_{level}")):
                rows.copy_(rows[order.to(rows.device)])
        self.basis.copy_(renaming.directions(self.basis, books))

    def additive_decoder(self) -> AdditiveDecoder:
        """:meth:`decode` as a sum over levels; digits as one direction each."""
        books = [self.codebook(level) for level in range(len(self.sizes))]
        tables = (*books, *(row[None] for row in self.basis))
        return AdditiveDecoder(self.center.detach().cpu(), tuple(t.detach().cpu() for t in tables))

    @torch.no_grad()
    def follow(self, z: Tensor, output: BottleneckOutput, ranks: Collectives, seed: int) -> int:
        """After a training step: move averages and codewords, reset dead codes; returns how many.

        A collective call; every rank ends with the same bits.

        Args:
            z: ``[N, d]`` latents of the step on this rank.
            output: what :meth:`forward` made of them.
            ranks: the processes of the fit.
            seed: picks the replacements; another one per step, the same on every rank.
        """
        keep = self.config.ema_decay
        centred = z.detach() - self.center
        rows = torch.tensor(float(len(z)), device=z.device)
        spread = centred.square().sum()
        fresh = [self._cluster_sums(level, output) for level in range(len(self.sizes))]
        moments = [self._digit_moments(stage, output) for stage in range(len(self.digit_stages))]
        ranks.sum_([rows, spread, *(t for pair in (*fresh, *moments) for t in pair)])
        self.variance.lerp_(spread / rows, 1 - keep)
        for level, (count, total) in enumerate(fresh):
            self.get_buffer(f"count_{level}").lerp_(count, 1 - keep)
            self.get_buffer(f"total_{level}").lerp_(total, 1 - keep)
            if self.config.codebook_update == "ema":
                self._set_means(level)
        start = 0
        for stage, (cross, square) in enumerate(moments):
            part = slice(start, start + len(cross))
            self.cross[part].lerp_(cross / rows, 1 - keep)
            self.square[part, part] = self.square[part, part].lerp(square / rows, 1 - keep)
            self._set_digits(stage, part)
            start = part.stop
        return sum(self._reset(i, output, float(rows), ranks, seed) for i in range(len(self.sizes)))

    @torch.no_grad()
    def temper(self, before: Sequence[Tensor]) -> None:
        """Scale a unit step of Adam from the codebooks ``before`` it by the size of each entry.

        Adam moves every entry alike; most directions of a latent hold next to nothing, and there a step
        of the size of the others would be all noise.
        """
        for level, (old, new) in enumerate(zip(before, self.parameters(), strict=True)):
            new.copy_(old + (new - old) * self.word_scale[level])

    def _cluster_sums(self, level: int, output: BottleneckOutput) -> tuple[Tensor, Tensor]:
        codes, size = output.codes[:, level], self.sizes[level]
        count = torch.bincount(codes, minlength=size).to(torch.float32)
        return count, sum_by_code(output.inputs[level], codes, size)

    def _set_means(self, level: int) -> None:
        count, total = self.get_buffer(f"count_{level}"), self.get_buffer(f"total_{level}")
        means = total / (count + self.prior[level]).clamp(min=_TINY)[:, None]
        self.codebook(level).copy_(torch.where(count[:, None] > 0, means, self.codebook(level)))

    def _digit_moments(self, stage: int, output: BottleneckOutput) -> tuple[Tensor, Tensor]:
        before = len(self.sizes) + sum(m for m, _ in self.digit_stages[:stage])
        width, alphabet = self.digit_stages[stage]
        q = (output.codes[:, before : before + width] - alphabet // 2).to(torch.float32)
        residual = output.inputs[len(self.sizes) + stage]
        return (q.T @ residual).double(), (q.T @ q).double()

    def _set_digits(self, stage: int, part: slice) -> None:
        rows = self.basis[part].double()
        scales = rows.norm(dim=1)
        if not bool((scales > 0).all()):
            return  # a constant input: the digits stay 0
        moments = DigitMoments(self.cross[part].T, self.square[part, part])
        decoder = best_decoder(moments, rows / scales[:, None], scales)
        self.basis[part] = (decoder.directions * decoder.scales[:, None]).float()

    @torch.no_grad()
    def _reset(
        self, level: int, output: BottleneckOutput, rows: float, ranks: Collectives, seed: int
    ) -> int:
        count, total = self.get_buffer(f"count_{level}"), self.get_buffer(f"total_{level}")
        mean = rows / self.sizes[level]
        dead = ((count < self.config.reset_below * mean) & (count > 0)).nonzero().squeeze(1)
        if not len(dead):
            return 0
        # Each rank offers as many random rows as are needed; all ranks then draw alike from all of them.
        own = output.inputs[level]
        mine = derived_generator(seed, f"reset level {level} rank {ranks.rank}")
        offered = ranks.gather_rows(own[torch.randperm(len(own), generator=mine)[: len(dead)]])
        shared = derived_generator(seed, f"reset level {level}")
        picked = offered[torch.randperm(len(offered), generator=shared)[: len(dead)]]
        dead = dead[: len(picked)]
        self.codebook(level)[dead] = picked
        # The averages move with the code, or the next update would put it back where it died.
        count[dead] = mean
        total[dead] = picked * (mean + self.prior[level])
        return len(dead)

    def _stage_rows(self) -> tuple[Tensor, ...]:
        return self.basis.split([m for m, _ in self.digit_stages])


def _encoder(rows: Tensor) -> Tensor:
    return rows / rows.square().sum(1, keepdim=True).clamp(min=_TINY)


@torch.no_grad()
def start_bottleneck(bottleneck: Bottleneck, z: Tensor, *, rows_per_step: int, seed: int) -> None:
    """Residual k-means and closed-form digits on latents, as the state of a bottleneck.

    Args:
        bottleneck: overwritten.
        z: ``[S, d]`` latents of a sample of the items; a few hundred per code are plenty.
        rows_per_step: rows of a training step over all ranks, the unit of the moving averages.
        seed: of k-means.
    """
    first, basis = _closed_form(bottleneck, z, seed)
    step = rows_per_step / len(z)
    bottleneck.center.copy_(z.mean(0) if first is None else first.mean)
    residual = z - bottleneck.center
    bottleneck.variance.copy_(residual.square().sum(1).mean())
    chosen = None if first is None else first.encode(z)
    for level, size in enumerate(bottleneck.sizes):
        assert chosen is not None
        codes = chosen[:, level]
        sums = cluster_sums(residual, codes, size)
        bottleneck.get_buffer(f"count_{level}").copy_(sums.count * step)
        bottleneck.get_buffer(f"total_{level}").copy_(sums.total * step)
        bottleneck.prior[level] = sums.prior_count() * step
        bottleneck.codebook(level).copy_(sums.centroids(1.0))
        words = bottleneck.codebook(level)[codes]
        bottleneck.word_scale[level] = words.square().mean(0).sqrt()
        residual = residual - words
    bottleneck.basis.copy_(basis)
    if bottleneck.digit_stages:
        _start_moments(bottleneck, residual)
    bottleneck.start_perplexity.copy_(_perplexity_that_counts(bottleneck, z[:_MEASURED_ROWS]))


def _closed_form(bottleneck: Bottleneck, z: Tensor, seed: int) -> tuple[ResidualKMeans | None, Tensor]:
    if bottleneck.digit_stages:
        config = DiscretePcaConfig(
            stages=bottleneck.digit_stages, codebooks=bottleneck.sizes, sample_rows=len(z), seed=seed
        )
        digits = DiscretePca(bottleneck.dim, config, device=z.device)
        digits.fit(z)
        return digits.first, digits.basis
    kmeans = ResidualKMeans(
        bottleneck.dim,
        ResidualKMeansConfig(cardinalities=bottleneck.sizes, seed=seed, buffer_rows=len(z)),
        device=z.device,
    )
    kmeans.fit(z)
    return kmeans, bottleneck.basis


def _perplexity_that_counts(bottleneck: Bottleneck, z: Tensor) -> Tensor:
    """Perplexity per level, ``[L]``; 1 for a level that explains nothing, whose usage says nothing."""
    codes = bottleneck.encode(z)
    perplexity = usage_of(count_codes(codes, bottleneck.cardinalities)).perplexity
    left = [float((z - bottleneck.center).square().sum())]
    for depth in range(1, codes.shape[1] + 1):
        left.append(float((z - bottleneck.decode(codes[:, :depth])).square().sum()))
    gains = [before - after for before, after in pairwise(left)]
    return torch.tensor(
        [p if g > _LEAST_GAIN * left[0] else 1.0 for p, g in zip(perplexity, gains, strict=True)]
    )


def _start_moments(bottleneck: Bottleneck, residual: Tensor) -> None:
    """The moments of the digits that the start gives, so that the first updates do not forget it."""
    for part, rows, q in _stages(bottleneck, residual):
        bottleneck.cross[part] = (q.T @ residual).double() / len(residual)
        bottleneck.square[part, part] = (q.T @ q).double() / len(residual)
        residual = residual - q @ rows


def _stages(bottleneck: Bottleneck, residual: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    digits = encode_digits(residual, bottleneck.basis, bottleneck.digit_stages).digits
    start = 0
    for width, _ in bottleneck.digit_stages:
        part = slice(start, start + width)
        yield part, bottleneck.basis[part], digits[:, part]
        start += width
