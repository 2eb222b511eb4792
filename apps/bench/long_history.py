"""Long histories in the ranking backbone: `python -m apps.bench.long_history [--quick] --json FILE`.

Trains the same ranker with three kinds of item channel on the same examples, each with `history` past
events: `side` (code-space attention over packed SIDs), `side_decoded` (the same parameters and the same
function, by decoding every event and attending over keys and values), and `dense` (frozen embeddings
through a learned tower, gathered per event). Examples per second of a whole training step (forward,
backward, optimizer) are given twice: with batches in memory, and with a `BatchReader` that reads them from
the prepared log in the same process. Normalised entropy is that of the test split after the same steps.
"""

from __future__ import annotations

import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torchrec_sid.artifact import write_json
from torchrec_sid.data.batch import RankingBatch
from torchrec_sid.data.prepare import PrepareConfig, prepare
from torchrec_sid.data.prepared import PreparedLog
from torchrec_sid.data.reader import BatchReader
from torchrec_sid.data.synthetic import SyntheticConfig, write_synthetic
from torchrec_sid.metrics import SlicedMetrics
from torchrec_sid.models.build import Ranking, RankingConfig, build_ranking
from torchrec_sid.models.stores import ContentStore, SideStore
from torchrec_sid.quantizers import DiscretePca, DiscretePcaConfig
from torchrec_sid.side import CodeSpaceAttention, FrozenBasis
from torchrec_sid.training.log_features import log_sizes
from torchrec_sid.training.run import batch_config

from .alternating import peak_mb

ARMS = ("side", "side_decoded", "dense")
_FULL_FROM = 0.75


@dataclass(frozen=True)
class LongHistoryConfig:
    """What to run."""

    quick: bool = False
    """Histories of 256 events, few steps."""
    json: str | None = None
    """File for the results."""
    history: int = 4096
    """Events of each history; 256 with --quick."""
    items: int = 5_000
    """Items of the log."""
    batch_size: int = 32
    """Examples per step."""
    trits: int = 25
    """Digits of the SIDs of SIDE."""
    dims: int = 384
    """Of the item embeddings."""
    steps: int = 8
    """Steps of each timing; 3 with --quick."""
    train_steps: int = 60
    """Steps before normalised entropy is measured; 10 with --quick."""
    test_batches: int = 20
    """Batches of the test split; 4 with --quick."""
    seed: int = 0
    """Of the log and of the parameters."""


class DecodedAttention(nn.Module):
    """A code-space attention's function from decoded events: keys and values of every event, then SDPA.

    Args:
        attention: the parameters; shared, not copied.
        basis: the frozen decoder.
    """

    def __init__(self, attention: CodeSpaceAttention, basis: FrozenBasis) -> None:
        super().__init__()
        self.attention, self.layout = attention, basis.layout

    def forward(
        self, candidates: Tensor, history_bytes: Tensor, lengths: Tensor, actions: Tensor, ages: Tensor
    ) -> Tensor:
        """Arguments and result as of ``CodeSpaceAttention``; no history may be empty."""
        own, heads = self.attention, self.attention.config.num_heads
        x = self.layout.expand_digits(history_bytes) @ own.rows
        if own.mean is not None:
            x = x + own.mean
        assert own.terms.embedding is not None
        sizes = own.terms.config.sizes
        starts = itertools.accumulate(sizes, initial=0)
        columns = own.terms.columns(lengths, len(x), actions, ages)
        for start, size, column in zip(starts, sizes, columns, strict=False):
            x = x + nn.functional.embedding(column.long(), own.terms.embedding[start : start + size])
        offsets, longest = lengths.cumsum(0) - lengths, int(lengths.max())
        place = torch.arange(longest)
        mask = place < lengths.unsqueeze(1)
        at = (offsets.unsqueeze(1) + place).clamp_max(len(x) - 1)

        def split(values: Tensor) -> Tensor:
            return values.unflatten(-1, (heads, -1)).transpose(1, 2)

        attended = nn.functional.scaled_dot_product_attention(
            split(own.query(candidates)),
            split(own.key(x)[at]),
            split(own.value(x)[at]),
            None if bool(mask.all()) else mask[:, None, None],
        )
        return own.output(attended.transpose(1, 2).flatten(-2))


@dataclass(frozen=True)
class World:
    """A prepared log, and its items in the forms that the arms read."""

    log: PreparedLog
    basis: FrozenBasis
    item_bytes: Tensor
    content: Tensor
    config: LongHistoryConfig

    @classmethod
    def make(cls, config: LongHistoryConfig, folder: Path) -> World:
        """Write and prepare a log whose later training examples and test examples have full histories."""
        users = 16 if config.quick else 48
        # 80% of the events train; from _FULL_FROM of those on, users have `history` events before them.
        per_user = 2 * config.history
        synthetic = SyntheticConfig(
            items=config.items,
            users=users,
            events=users * per_user,
            sources=("content",),
            dim=config.dims,
            activity=0.0,
            max_history=4 * per_user,
            seed=config.seed,
        )
        source = write_synthetic(folder / "log", synthetic)
        log = prepare(source, folder / "prepared", PrepareConfig(shuffle_window=256))
        content = torch.from_numpy(np.array(source.embedding_matrix("content"))).float()
        quantizer = DiscretePca(config.dims, DiscretePcaConfig.trits(config.trits))
        quantizer.fit(content)
        item_bytes = quantizer.spec.pack_bytes(quantizer.encode(content))
        return cls(log, FrozenBasis.from_quantizer(quantizer), item_bytes, content, config)

    def build(self, arm: str) -> Ranking:
        """The ranker of an arm; equal seeds give ``side`` and ``side_decoded`` equal parameters."""
        torch.manual_seed(self.config.seed)
        model = RankingConfig(arm="dense" if arm == "dense" else "side", history_length=self.config.history)
        stores = (SideStore(self.basis, values={"bytes": self.item_bytes}), ContentStore(self.content))
        ranking = build_ranking(model, log_sizes(self.log, model.dim), stores)
        if arm == "side_decoded":
            channel: Any = ranking.module.model.channels["side"]
            channel.attentions = nn.ModuleList(
                DecodedAttention(attention, self.basis) for attention in channel.attentions
            )
        return ranking

    def read(self, ranking: Ranking, split: str) -> Iterator[RankingBatch]:
        """Batches in which every history is full: of the end of ``train``, or of another split."""
        config = self.config
        reader = BatchReader(
            self.log,
            split,
            batch_config(ranking, config.batch_size, config.history),
            item_values=ranking.item_values,
            drop_last=True,
        )
        if split == "train":
            reader.start_batch = int(_FULL_FROM * reader.batches)
        return (batch for batch in reader if int(batch.history_lengths.min()) == config.history)


def trainer(ranking: Ranking) -> Callable[[RankingBatch], None]:
    """A training step: forward, backward, Adam."""
    optimizer = torch.optim.Adam(ranking.module.parameters(), lr=2e-3)

    def step(batch: RankingBatch) -> None:
        optimizer.zero_grad()
        loss, _ = ranking.module(batch)
        loss.backward()
        optimizer.step()

    return step


def throughput(world: World) -> list[dict[str, Any]]:
    """Examples per second of each arm, a step of each in turn."""
    config = world.config
    rankings = {arm: world.build(arm) for arm in ARMS}
    steps = {arm: trainer(ranking) for arm, ranking in rankings.items()}
    batches = {
        arm: list(itertools.islice(world.read(ranking, "train"), config.steps + 1))
        for arm, ranking in rankings.items()
    }
    readers = {arm: world.read(ranking, "train") for arm, ranking in rankings.items()}
    seconds: dict[str, dict[str, list[float]]] = {arm: {"memory": [], "reader": []} for arm in ARMS}
    for number in range(config.steps + 1):
        for arm in ARMS:
            for source in ("memory", "reader"):
                began = time.perf_counter()
                steps[arm](batches[arm][number] if source == "memory" else next(readers[arm]))
                if number:  # the first step allocates and compiles
                    seconds[arm][source].append(time.perf_counter() - began)
    return [
        {
            "arm": arm,
            "history": config.history,
            "batch_size": config.batch_size,
            "examples_per_second": config.batch_size / median(seconds[arm]["memory"]),
            "examples_per_second_with_reader": config.batch_size / median(seconds[arm]["reader"]),
            "peak_mb": peak_mb(lambda arm=arm: steps[arm](batches[arm][0]), torch.device("cpu")),  # type: ignore[misc]
            "bytes_per_event": rankings[arm].bytes_per_event,
        }
        for arm in ARMS
    ]


def quality(world: World) -> dict[str, float]:
    """Normalised entropy of each arm on the test split, after the same steps on the same examples."""
    config, found = world.config, {}
    for arm in ARMS:
        ranking = world.build(arm)
        step = trainer(ranking)
        for batch in itertools.islice(world.read(ranking, "train"), config.train_steps):
            step(batch)
        ranking.module.eval()
        rows = config.test_batches * config.batch_size
        metrics = SlicedMetrics(rows=rows, batch_size=config.batch_size)
        for batch in itertools.islice(world.read(ranking, "test"), config.test_batches):
            with torch.no_grad():
                _, output = ranking.module(batch)
            metrics.update(
                predictions=output.logits.sigmoid(),
                labels=output.labels,
                weights=output.weights,
                segment=output.segment,
            )
        entropy = metrics.compute()["all"].ne
        assert entropy is not None
        found[arm] = entropy
    return found


def main() -> None:
    """Run, print, and write the results."""
    from ..cli import parse_config

    config = parse_config(LongHistoryConfig, __doc__)
    if config.quick:
        config = replace(config, history=256, steps=3, train_steps=10, test_batches=4)
    print(f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.2f}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        world = World.make(config, Path(folder))
        rows = throughput(world)
        entropy = quality(world)
    side = rows[0]
    print(f"histories of {config.history} events, {config.batch_size} examples a step, one process")
    for row in rows:
        row["ne"] = entropy[row["arm"]]
        ratios = (
            side[name] / row[name] for name in ("examples_per_second", "examples_per_second_with_reader")
        )
        memory, reader = ratios
        print(
            f"{row['arm']:14}{row['examples_per_second']:9.1f} examples/s (side x {memory:.1f}), "
            f"{row['examples_per_second_with_reader']:9.1f} with the reader (x {reader:.1f}), "
            f"peak {row['peak_mb']:7.1f} MB, {row['bytes_per_event']} B an event, NE {row['ne']:.6f}"
        )
    if config.json:
        write_json(Path(config.json), {"rows": rows})


if __name__ == "__main__":
    main()
