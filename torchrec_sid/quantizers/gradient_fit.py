"""The training loop shared by the gradient quantizers: deterministic, resumable, on one or more ranks."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchrec_sid.artifact import load_artifact, save_artifact
from torchrec_sid.errors import ArtifactError, SidError
from torchrec_sid.quantizers.bottleneck import Bottleneck, BottleneckOutput
from torchrec_sid.quantizers.collectives import Collectives
from torchrec_sid.quantizers.usage import CollapseError, UsageMonitor, live_readout
from torchrec_sid.seeding import derived_generator

_KIND = "gradient_fit"
_VERSION = 1
_MEASUREMENTS = 5
_READINGS = 40

Rows = tuple[Tensor, ...]
"""Aligned tensors, the same number of rows each."""


class ShufflePosition(NamedTuple):
    """Where a run over the data stands; all that a checkpoint needs."""

    pass_index: int
    """Complete passes before this one."""
    batch: int
    """Batches taken from this pass."""


class ShuffledBatches:
    """Endless shuffled batches from a stream that is read anew in each pass.

    A buffer of rows is filled, permuted and cut into batches; the permutation depends on the seed, the
    pass and the place alone, so that a run continued at a :class:`ShufflePosition` sees what it
    would have seen. The last batch of a pass may be smaller.

    Args:
        start: starts a pass over aligned tensors.
        batch_size: rows per batch.
        buffer_rows: rows shuffled together; bounds the memory.
        seed: seed of the permutations.
    """

    def __init__(
        self, start: Callable[[], Iterable[Rows]], *, batch_size: int, buffer_rows: int, seed: int
    ) -> None:
        self._start = start
        self._batch_size = batch_size
        self._buffer_rows = max(buffer_rows, batch_size)
        self._seed = seed
        self.position = ShufflePosition(0, 0)

    def fingerprint(self, ranks: Collectives) -> str:
        """SHA-256 (hex) of the rows of every rank in their order; a collective call, reads them once."""
        columns: list[Any] = []
        for rows in self._start():
            columns = columns or [hashlib.sha256(f"{t.dtype} {t.shape[1:]}".encode()) for t in rows]
            for digest, tensor in zip(columns, rows, strict=True):
                data = tensor.detach().cpu().contiguous()
                digest.update(data.reshape(-1).view(torch.uint8).numpy().data)
        mine = hashlib.sha256(b"".join(digest.digest() for digest in columns)).digest()
        shares = torch.zeros(ranks.size, len(mine), dtype=torch.int64)
        shares[ranks.rank] = torch.tensor(list(mine))
        ranks.sum_([shares])
        return hashlib.sha256(bytes(shares.flatten().tolist())).hexdigest()

    def __iter__(self) -> Iterator[Rows]:
        while True:
            skip = self.position.batch
            for index, batch in enumerate(self._one_pass(self.position.pass_index)):
                if index >= skip:
                    self.position = ShufflePosition(self.position.pass_index, index + 1)
                    yield batch
            self.position = ShufflePosition(self.position.pass_index + 1, 0)

    def _one_pass(self, pass_index: int) -> Iterator[Rows]:
        for place, (rows, last) in enumerate(self._buffers()):
            generator = derived_generator(self._seed, f"shuffle pass {pass_index} buffer {place}")
            order = torch.randperm(len(rows[0]), generator=generator).to(rows[0].device)
            full = len(order) if last else len(order) - len(order) % self._batch_size
            for begin in range(0, full, self._batch_size):
                picked = order[begin : begin + self._batch_size]
                yield tuple(t[picked] for t in rows)

    def _buffers(self) -> Iterator[tuple[Rows, bool]]:
        """Buffers of a multiple of the batch size, and whether it is the last one, which may be ragged."""
        held: list[Rows] = []
        count = 0
        for rows in self._start():
            held.append(rows)
            count += len(rows[0])
            while count > self._buffer_rows:
                joined = _join(held)
                size = self._buffer_rows - self._buffer_rows % self._batch_size
                yield tuple(t[:size] for t in joined), False
                held = [tuple(t[size:] for t in joined)]
                count -= size
        if count:
            yield _join(held), True


def _join(pieces: list[Rows]) -> Rows:
    return (
        pieces[0] if len(pieces) == 1 else tuple(torch.cat(column) for column in zip(*pieces, strict=True))
    )


@dataclass(frozen=True)
class TrainingConfig:
    """How long and how fast a gradient quantizer trains.

    Raises:
        SidError: a field out of range.
    """

    epochs: float = 6.0
    """Passes over the data."""
    batch_size: int = 512
    """Items per step and rank."""
    learning_rate: float = 1e-3
    """Adam's, for decoders; warms up over a tenth of the steps (at most 50) and falls to 0 as a cosine."""
    encoder_rate: float = 0.1
    """The encoder's learning rate as a fraction: codes are assigned by what it does, so it moves slowly."""
    buffer_rows: int = 65_536
    """Items shuffled together, and the sample that the fit starts from."""
    collapse_below: float = 0.25
    """Stop once a level's perplexity falls below this fraction of what it was at the start; 0 never."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "buffer_rows"):
            if getattr(self, name) < 1:
                raise SidError(name, f"{getattr(self, name)}", "Use 1 or more.")
        for name in ("epochs", "encoder_rate", "collapse_below"):
            if not getattr(self, name) >= 0:
                raise SidError(name, f"{getattr(self, name)}", "Use 0 or more.")
        if not self.learning_rate > 0:
            raise SidError("learning_rate", f"{self.learning_rate}", "Use a number above 0, e.g. 1e-3.")


class Step(NamedTuple):
    """What a model makes of a training batch."""

    loss: Tensor
    """Scalar with gradient."""
    z: Tensor
    """``[N, d]``, what went into the bottleneck."""
    quantized: BottleneckOutput
    """What came out of it."""


class Trainee(NamedTuple):
    """A model as the loop sees it."""

    module: nn.Module
    """Whose state is trained, checkpointed and kept."""
    bottleneck: Bottleneck
    """Part of ``module``."""
    encoder: list[nn.Parameter]
    """Parameters that learn at ``encoder_rate`` times the learning rate."""
    decoder: list[nn.Parameter]
    """Parameters that learn at the full rate; codebooks that are parameters have their own."""
    step: Callable[[Rows, int], Step]
    """The loss of a batch; the integer seeds what is random in it, and differs from step to step."""
    measure: Callable[[], float]
    """Error on a fixed sample, the same on every rank; the state with the lowest one is kept."""
    manifest: dict[str, Any]
    """What the fit is of (kind, dim, configuration); a checkpoint of another fit is refused."""


@dataclass(frozen=True)
class FitOptions:
    """What the caller of a fit may ask for beside the data."""

    progress: bool = False
    """Show a bar with loss, usage and perplexity per level; they are logged as well."""
    checkpoint: str | Path | None = None
    """File from which an interrupted fit continues; on several ranks, on a disk they share."""
    checkpoint_every: int = 500
    """Steps between writes of that file."""

    def resumes(self, ranks: Collectives) -> bool:
        """Whether there is something to continue from; rank 0 decides."""
        return ranks.agree(self.checkpoint is not None and Path(self.checkpoint).is_file())


def train(
    title: str,
    trainee: Trainee,
    start: Callable[[], Iterable[Rows]],
    *,
    rows: int,
    config: TrainingConfig,
    seed: int,
    ranks: Collectives,
    options: FitOptions,
) -> None:
    """Train a model from its start, or from its checkpoint, for the epochs of its configuration.

    Args:
        title: of the progress bar.
        trainee: the model.
        start: starts a pass over this rank's rows.
        rows: items of all ranks.
        config: see :class:`TrainingConfig`.
        seed: of everything random in training.
        ranks: the processes of the fit.
        options: see :class:`FitOptions`.

    Raises:
        CollapseError: usage collapsed, or the loss is not finite.
        ArtifactError: the checkpoint belongs to another fit.
    """
    steps = math.ceil(config.epochs * rows / (config.batch_size * ranks.size))
    batches = ShuffledBatches(
        start, batch_size=config.batch_size, buffer_rows=config.buffer_rows, seed=seed
    )
    trainee.module.train()
    fit = GradientFit(trainee, batches, config, steps=steps, ranks=ranks, seed=seed)
    fit.run(title, options)
    trainee.module.eval()


class GradientFit:
    """One run of training, from a start or from a checkpoint.

    Args:
        trainee: the model, already at its start.
        batches: this rank's data.
        config: see :class:`TrainingConfig`.
        steps: optimizer steps in total, the same on every rank.
        ranks: the processes of the fit.
        seed: of dead-code resets.
    """

    def __init__(
        self,
        trainee: Trainee,
        batches: ShuffledBatches,
        config: TrainingConfig,
        *,
        steps: int,
        ranks: Collectives,
        seed: int,
    ) -> None:
        self._trainee, self._batches, self._config = trainee, batches, config
        self._steps, self._ranks, self._seed = steps, ranks, seed
        # A group each for encoder, decoder and every codebook, each with a rate of its own.
        codebooks = [[codebook] for codebook in trainee.bottleneck.parameters()]
        groups = [trainee.encoder, trainee.decoder, *codebooks]
        self._parameters = [parameter for group in groups for parameter in group]
        self._optimizer = torch.optim.Adam([{"params": group} for group in groups])
        self._rates: list[float] = []
        self._step = 0
        self._best_error = math.inf
        self._best: dict[str, Tensor] = {}
        self._data = ""

    def run(self, title: str, options: FitOptions) -> None:
        """Train, keep the state with the lowest measured error, and leave the model in it.

        Raises:
            CollapseError: usage collapsed, or the loss is not finite.
            ArtifactError: the checkpoint belongs to another fit.
        """
        checkpoint, every = options.checkpoint, options.checkpoint_every
        if checkpoint is not None:
            self._data = self._batches.fingerprint(self._ranks)
        if checkpoint is not None and options.resumes(self._ranks):
            self._resume(checkpoint)
        else:
            self._keep_if_best()
        self._rates = self._full_rates()
        monitor = self._monitor()
        batches = iter(self._batches)
        rows = self._config.batch_size * self._ranks.size
        window = max(math.ceil(monitor.window_rows / rows), self._steps // _READINGS, 1)
        measure_every = max(1, self._steps // _MEASUREMENTS)
        with live_readout(
            title, self._steps, start=self._step, show=options.progress and self._ranks.rank == 0
        ) as report:
            while self._step < self._steps:
                output = self._train(next(batches))
                monitor.add(output.quantized.codes)
                ending = self._step == self._steps
                reading = monitor.read(self._ranks, self._step) if self._step % window == 0 else None
                report(self._step, self._mean_loss(output.loss), reading)
                if self._step % measure_every == 0 or ending:
                    self._keep_if_best()
                if checkpoint is not None and (self._step % every == 0 or ending):
                    self._save(checkpoint)
        self._trainee.module.load_state_dict(self._best)

    def _train(self, batch: Rows) -> Step:
        scale = self._schedule()
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * scale
        seed = self._seed * 1_000_003 + self._step
        output = self._trainee.step(batch, seed)
        self._optimizer.zero_grad(set_to_none=True)
        output.loss.backward()
        self._ranks.mean_gradients_(self._parameters)
        before = [codebook.detach().clone() for codebook in self._trainee.bottleneck.parameters()]
        self._optimizer.step()
        self._trainee.bottleneck.temper(before)
        self._step += 1
        self._trainee.bottleneck.follow(output.z, output.quantized, self._ranks, seed)
        return output

    def _full_rates(self) -> list[float]:
        """Per group; those of codebooks follow the size of their codewords, known after the start only."""
        config, bottleneck = self._config, self._trainee.bottleneck
        codebooks = len(self._optimizer.param_groups) - 2
        rates = [config.learning_rate * config.encoder_rate, config.learning_rate]
        return rates + [bottleneck.config.codebook_rate] * codebooks

    def _schedule(self) -> float:
        warm = max(1, min(50, self._steps // 10))
        return min(1.0, (self._step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * self._step / self._steps))

    def _mean_loss(self, loss: Tensor) -> float:
        """Over ranks, so that all of them stop together if it is not finite."""
        mean = loss.detach().clone()
        self._ranks.sum_([mean])
        value = float(mean) / self._ranks.size
        if not math.isfinite(value):
            raise CollapseError(
                f"loss after step {self._step}", f"{value}", "Lower learning_rate; the data are finite."
            )
        return value

    def _monitor(self) -> UsageMonitor:
        bottleneck = self._trainee.bottleneck
        start = bottleneck.start_perplexity.tolist()
        return UsageMonitor(bottleneck.cardinalities, start, self._config.collapse_below)

    @torch.no_grad()
    def _keep_if_best(self) -> None:
        error = self._trainee.measure()
        if error < self._best_error:
            self._best_error = error
            self._best = {k: v.detach().clone() for k, v in self._trainee.module.state_dict().items()}

    def _save(self, path: str | Path) -> None:
        """Rank 0 writes; the state is the same everywhere, and so is the position."""
        if self._ranks.rank != 0:
            return
        tensors = {f"model.{k}": v for k, v in all_tensors(self._trainee.module).items()}
        tensors |= {f"best.{k}": v for k, v in self._best.items()}
        for index, state in self._optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{index}.{name}": value for name, value in state.items()}
        config = {
            "fit": self._trainee.manifest,
            "steps": self._steps,
            "ranks": self._ranks.size,
            "data": self._data,
            "step": self._step,
            "position": list(self._batches.position),
            "best_error": self._best_error,
        }
        save_artifact(path, kind=_KIND, version=_VERSION, config=config, tensors=tensors)

    def _resume(self, path: str | Path) -> None:
        saved = load_artifact(path, kind=_KIND, version=_VERSION)
        expected = {"fit": self._trainee.manifest, "steps": self._steps, "ranks": self._ranks.size}
        for name, value in {**_plain(expected), "data": self._data}.items():
            found = saved.config.get(name, "not stated")
            if found != value:
                raise ArtifactError(
                    str(path),
                    f"{name} of the checkpoint is {found}, of this fit {value}",
                    "Continue with the same configuration, data and processes, or remove the file.",
                )
        with torch.no_grad():
            state = _part(saved.tensors, "model.")
            for name, tensor in all_tensors(self._trainee.module).items():
                tensor.copy_(state[name])
        self._best = _part(saved.tensors, "best.")
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in _part(saved.tensors, "adam.").items():
            index, field = name.split(".")
            moments.setdefault(int(index), {})[field] = tensor
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self._step = int(saved.config["step"])
        self._batches.position = ShufflePosition(*saved.config["position"])
        self._best_error = float(saved.config["best_error"])


def trainable(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """All parameters of several modules."""
    return [parameter for module in modules for parameter in module.parameters()]


def all_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, those included that are not part of the fitted quantizer."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _plain(value: Any) -> Any:
    """As JSON reads it back: tuples become lists."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (tuple, list)) else value
