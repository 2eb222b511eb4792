"""`TrainingLoop`: batches through TorchRec's pipeline, with exact resume and evaluation by slice."""

from __future__ import annotations

import itertools
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from torchrec.distributed.train_pipeline import TrainPipelineBase, TrainPipelineSparseDist
from torchrec.distributed.types import ShardedModule
from torchrec.optim.keyed import KeyedOptimizer

from torchrec_sid.data.batch import RankingBatch
from torchrec_sid.data.prepared import SEGMENTS
from torchrec_sid.errors import SidError
from torchrec_sid.metrics import SLICES, SlicedMetrics, SliceMetrics
from torchrec_sid.models.dlrm import RankingOutput, by_task
from torchrec_sid.parallel.checkpoint import CheckpointManager
from torchrec_sid.parallel.ranks import Ranks
from torchrec_sid.parallel.state import apply_training_state, prepare_to_load, training_state
from torchrec_sid.training.early_stopping import EarlyStopping
from torchrec_sid.training.progress_line import TrainingProgress

logger = logging.getLogger(__name__)


class Batches(Protocol):
    """A sized stream of batches."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[RankingBatch]: ...


@dataclass(frozen=True)
class Position:
    """Where a run stands: what has been trained on, not what has been read ahead."""

    epoch: int = 0
    """Epochs completed."""
    batch: int = 0
    """Batches of the current epoch that were trained on."""
    step: int = 0
    """Optimizer steps in all."""


class TrainResult(NamedTuple):
    """What a call of :meth:`TrainingLoop.train` did."""

    position: Position
    """Where the run stands now."""
    steps: int
    """Steps done in this call."""
    seconds: float
    """Wall-clock seconds spent in them."""
    examples: int
    """Examples that this rank trained on."""
    data_wait: float
    """Seconds of them that this rank waited for its reader."""


class TrainingLoop:
    """Trains and evaluates a sharded model. Every rank makes one and calls it in step.

    Args:
        model: ``DistributedModelParallel`` around a module that returns ``(loss, RankingOutput)``.
        optimizer: the ``CombinedOptimizer`` of fused table and dense optimizers.
        device: where the model lives.
        ranks: the processes that train together; None: those of the default process group.
        checkpoints: where to save and from where to resume; None: neither.
        checkpoint_every: steps between two checkpoints; 0: only at the end of training.
        stopping: watches the validation; None: training is not validated.
        best: where the best state is kept, which training ends with; None: it ends with the last.
        metadata: saved with every checkpoint, JSON-serialisable.
        pipelined: distribute the ids of the next batch while this one is computed.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: KeyedOptimizer,
        device: torch.device,
        *,
        ranks: Ranks | None = None,
        checkpoints: CheckpointManager | None = None,
        checkpoint_every: int = 0,
        stopping: EarlyStopping | None = None,
        best: CheckpointManager | None = None,
        metadata: Mapping[str, Any] | None = None,
        pipelined: bool = True,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.device = device
        self.ranks = ranks or Ranks.open()
        self.checkpoints = checkpoints
        self.checkpoint_every = checkpoint_every
        self.stopping = stopping
        self.best = best
        self.metadata = dict(metadata or {})
        self.position = Position()
        self._saved = self._validated = 0
        self._loss: torch.Tensor | None = None
        self.pipeline: TrainPipelineSparseDist | None = None
        if pipelined and any(isinstance(module, ShardedModule) for module in model.modules()):
            # Transforms from SIDs to rows run a batch ahead only with pipeline_postproc.
            self.pipeline = TrainPipelineSparseDist(model, optimizer, device, pipeline_postproc=True)

    def resume(self) -> Position:
        """Continue from the newest checkpoint, if there is one; call it before :meth:`train`.

        Raises:
            SidError: the newest checkpoint does not fit this run or is damaged.
        """
        saved = self._load(self.checkpoints)
        if saved is not None:
            self.position = Position(**saved["position"])
            self._saved = self.position.step
            if self.stopping is not None and "stopping" in saved:
                self.stopping.load(saved["stopping"])
        return self.position

    def restore_best(self) -> Position | None:
        """Take the state with the best validation; None where none was kept.

        Raises:
            SidError: it does not fit this run or is damaged.
        """
        saved = self._load(self.best)
        return None if saved is None else Position(**saved["position"])

    def train(
        self,
        open_epoch: Callable[[int, int], Batches],
        epochs: int,
        *,
        max_steps: int | None = None,
        progress: TrainingProgress | None = None,
        on_step: Callable[[int, RankingOutput], None] | None = None,
        schedule: Callable[[int], None] | None = None,
        validate: Callable[[int], float | None] | None = None,
        validate_every: int = 0,
    ) -> TrainResult:
        """Train until ``epochs`` are complete, ``max_steps`` steps are done, or validation says stop.

        With ``stopping`` and ``best`` the model ends with the state that validated best.

        Args:
            open_epoch: ``(epoch, first_batch)`` -> the batches of that epoch from that one on. A rank with
                more of them than the others leaves out its last ones: no rank waits for one that is done.
            epochs: passes over the data, those before a resume included.
            max_steps: stop after this many steps in all.
            progress: where to show it.
            on_step: called after each step with its number (from 1) and output.
            schedule: called before each step with the number of steps done, to set learning rates.
            validate: called with the number of steps done; returns what ``stopping`` watches, the same on
                every rank.
            validate_every: steps between two calls, and one at the end; 0: at the end of each epoch.
        """
        self.model.train()
        if schedule is not None:
            schedule(self.position.step)
        first, started, examples, waits = self.position.step, time.perf_counter(), 0, _Waits()
        while self.position.epoch < epochs and not self._stops():
            batches = open_epoch(self.position.epoch, self.position.batch)
            left = self._limit(batches, max_steps)
            source = waits.watch(batches)
            while left > 0 and not self._stops():
                # The pipeline runs dry before an evaluation: it reads ahead from one iterator.
                size = min(left, _until(self.position.step, validate_every)) if validate else left
                for number, output in enumerate(self._progress(itertools.islice(source, size)), 1):
                    self._advance()
                    examples += len(output.labels)
                    self._loss = output.loss
                    step = self.position.step
                    if schedule is not None:
                        schedule(step)
                    if on_step is not None:
                        on_step(step, output)
                    if progress is not None and progress.due:
                        # Every rank trains on as many examples.
                        rate = examples * self.ranks.size / (time.perf_counter() - started)
                        progress.show(step, rate, float(output.loss))
                    if number < size:
                        self._save_if_due()
                left -= size
                if validate is not None and (step % validate_every == 0 if validate_every else not left):
                    self._validate(validate)
                self._save_if_due()
            if self._stops() or (max_steps is not None and self.position.step >= max_steps):
                break
            self.position = Position(self.position.epoch + 1, 0, self.position.step)
        steps = self.position.step - first
        seconds = time.perf_counter() - started
        if steps and validate is not None and self._validated != self.position.step:
            self._validate(validate)
        if steps:
            self.save()
        if self.stopping is not None:
            self.restore_best()
        return TrainResult(self.position, steps, seconds, examples, waits.seconds)

    def save(self) -> None:
        """Write a checkpoint of the current position, unless there is one already."""
        if self.checkpoints is None or self._saved == self.position.step:
            return
        self._saved = self.position.step
        self._write(self.checkpoints)

    def evaluate(
        self,
        batches: Batches,
        batch_size: int,
        on_batch: Callable[[RankingOutput], None] | None = None,
        tasks: Sequence[str] = (),
        groups: Mapping[str, Sequence[str]] | None = None,
    ) -> dict[str, SliceMetrics]:
        """Metrics by slice over ``batches``, the same on every rank; of further tasks over all rows.

        Args:
            batches: this rank's part of the evaluation.
            batch_size: rows per rank and batch.
            on_batch: called with what the model says of each batch.
            tasks: names of the model's heads after the first.
            groups: key -> names of its rows, of the features that the model's output is grouped by, in its
                order; adds ``KEY=NAME`` for each.

        Raises:
            SidError: a rank has fewer batches than another, on every rank: some rows would not count.
        """
        counts = self._counts(batches)
        if min(counts) < max(counts):
            raise SidError(
                "batches of the evaluation",
                f"{counts} by rank",
                "Pad with rows of weight 0, as BatchReader does.",
            )
        rows = len(batches) * batch_size * self.ranks.size
        slices: list[Mapping[str, tuple[str, ...]]] = [SLICES, *({name: SEGMENTS} for name in tasks)]
        heads = [SlicedMetrics(rows, batch_size, self.ranks, s, device=self.device) for s in slices]
        by_value = [
            SlicedMetrics(
                rows,
                batch_size,
                self.ranks,
                {f"{key}={name}": (name,) for name in names},
                names,
                self.device,
            )
            for key, names in (groups or {}).items()
        ]
        self.model.eval()
        with torch.no_grad():
            for output in self._progress(batches):
                if on_batch is not None:
                    on_batch(output)
                for head, logits, labels in zip(
                    heads, by_task(output.logits), by_task(output.labels), strict=True
                ):
                    head.update(
                        predictions=torch.sigmoid(logits.double()),
                        labels=labels,
                        weights=output.weights,
                        segment=output.segment,
                    )
                for metrics, row in zip(by_value, output.groups, strict=True):
                    metrics.update(
                        predictions=torch.sigmoid(by_task(output.logits)[0].double()),
                        labels=by_task(output.labels)[0],
                        weights=output.weights,
                        segment=row,
                    )
        return {name: found for part in (*heads, *by_value) for name, found in part.compute().items()}

    def _write(self, checkpoints: CheckpointManager) -> None:
        metadata = {**self.metadata, "position": asdict(self.position), "metrics": self._metrics()}
        if self.stopping is not None:
            metadata["stopping"] = self.stopping.state()
        checkpoints.save(self.position.step, training_state(self.model, self.optimizer), metadata)

    def _load(self, checkpoints: CheckpointManager | None) -> dict[str, Any] | None:
        """Take the newest state; what was saved with it, or None where there is none."""
        info = checkpoints.latest() if checkpoints is not None else None
        if checkpoints is None or info is None:
            return None
        prepare_to_load(self.optimizer)
        state = training_state(self.model, self.optimizer)
        saved = checkpoints.load(info, state)
        apply_training_state(self.model, self.optimizer, state)
        return saved

    def _save_if_due(self) -> None:
        if self.checkpoint_every and self.position.step % self.checkpoint_every == 0:
            self.save()

    def _validate(self, validate: Callable[[int], float | None]) -> None:
        value = validate(self.position.step)
        self._validated = self.position.step
        self.model.train()
        if self.stopping is not None and self.stopping.observe(self.position.step, value) and self.best:
            self._write(self.best)

    def _stops(self) -> bool:
        return self.stopping is not None and self.stopping.stop

    def _limit(self, batches: Batches, max_steps: int | None) -> int:
        """How many of the batches every rank trains on."""
        counts = self._counts(batches)
        limit = min(counts)
        if limit < max(counts):
            logger.warning("ranks have %d to %d batches; the last ones are left out", limit, max(counts))
        return limit if max_steps is None else min(limit, max_steps - self.position.step)

    def _metrics(self) -> dict[str, float]:
        """What a checkpoint says of the training: the last loss of rank 0."""
        return {} if self._loss is None else {"loss": float(self._loss)}

    def _counts(self, batches: Batches) -> list[int]:
        """Batches of every rank; a collective call."""
        return self.ranks.all(lambda: len(batches), where="batches")

    def _advance(self) -> None:
        at = self.position
        self.position = Position(at.epoch, at.batch + 1, at.step + 1)

    def _progress(self, batches: Iterable[RankingBatch]) -> Iterator[RankingOutput]:
        iterator = iter(batches)
        # A model without tables has nothing to distribute ahead; its pipeline serves one iterator.
        pipeline = self.pipeline or TrainPipelineBase(self.model, self.optimizer, self.device)
        while True:
            try:
                output = pipeline.progress(iterator)
            except StopIteration:
                return
            yield output


def _until(step: int, every: int) -> int:
    """Steps from ``step`` to the next multiple of ``every``; without one, as many as there are."""
    return every - step % every if every else sys.maxsize


class _Waits:
    """Time spent waiting for the next item of an iterator."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def watch(self, items: Iterable[RankingBatch]) -> Iterator[RankingBatch]:
        iterator = iter(items)
        while True:
            started = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            finally:
                self.seconds += time.perf_counter() - started
            yield item
