"""RqVae over seeds and learning rates, beside residual k-means: `python -m apps.bench.rq_vae_sweep`.

Per run: held-out error, CPU seconds of the fit, and the share of the codes of every level that the
catalog of all items uses. Each run has residual k-means of the same seed and bits beside it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from torchrec_sid.artifact import write_json
from torchrec_sid.quantizers import (
    CollapseError,
    ResidualKMeans,
    ResidualKMeansConfig,
    RqVae,
    RqVaeConfig,
)
from torchrec_sid.quantizers.usage import count_codes, usage_of

from ..cli import parse_config
from .real_items import load_embeddings, split_rows, unexplained


@dataclass(frozen=True)
class SweepConfig:
    """What to run."""

    data: str = "../shared/data"
    """Folder of log folders."""
    datasets: tuple[str, ...] = ("hm_week", "amazon_beauty")
    """Folders with an item_emb.npy."""
    learning_rates: tuple[float, ...] = (1e-4, 1e-3, 1e-2)
    """Learning rates."""
    seeds: int = 5
    """Seeds 0 .. SEEDS - 1, of the split and of both quantizers."""
    threads: int = 1
    """Threads; CPU seconds are only comparable with one."""
    rq_vae: RqVaeConfig = RqVaeConfig()
    """The rest of the configuration."""
    json: str | None = None
    """File for the rows."""


@dataclass(frozen=True)
class SweepRow:
    """One fit."""

    dataset: str
    seed: int
    learning_rate: float
    fvu: float | None
    """Held-out fraction of variance unexplained; None where the fit collapsed."""
    kmeans_fvu: float
    cpu_s: float
    kmeans_cpu_s: float
    least_used: float | None
    """Smallest share of used codes over the levels, on all items."""


def run(config: SweepConfig) -> Iterator[SweepRow]:
    """Fit and yield row after row."""
    torch.set_num_threads(config.threads)
    for dataset in config.datasets:
        x = load_embeddings(config.data, dataset)
        for seed in range(config.seeds):
            rows = split_rows(len(x), seed)
            fit, held_out = x[rows.fit], x[rows.held_out]
            levels = ResidualKMeansConfig(cardinalities=config.rq_vae.cardinalities, seed=seed)
            kmeans = ResidualKMeans(x.shape[1], levels)
            kmeans_seconds = _cpu_seconds(kmeans, fit)
            kmeans_fvu = unexplained(held_out, kmeans.decode(kmeans.encode(held_out)))
            for rate in config.learning_rates:
                quantizer = RqVae(x.shape[1], replace(config.rq_vae, learning_rate=rate, seed=seed))
                fvu = least = None
                began = time.process_time()
                try:
                    quantizer.fit(fit)
                except CollapseError:
                    seconds = time.process_time() - began
                else:
                    seconds = time.process_time() - began
                    fvu = unexplained(held_out, quantizer.decode(quantizer.encode(held_out)))
                    least = _least_used(quantizer, x)
                yield SweepRow(dataset, seed, rate, fvu, kmeans_fvu, seconds, kmeans_seconds, least)


def _cpu_seconds(quantizer: ResidualKMeans, x: Tensor) -> float:
    began = time.process_time()
    quantizer.fit(x)
    return time.process_time() - began


def _least_used(quantizer: RqVae, x: Tensor) -> float:
    return min(usage_of(count_codes(quantizer.encode(x), quantizer.spec.cardinalities)).used)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line; ``argv`` stands in for the arguments of the process."""
    config = parse_config(SweepConfig, __doc__, argv)
    rows: list[SweepRow] = []
    table = Table("set", "seed", "lr", "FVU", "of k-means", "CPU s", "of k-means", "least used")
    for row in run(config):
        rows.append(row)
        table.add_row(
            row.dataset,
            str(row.seed),
            f"{row.learning_rate:g}",
            "collapsed" if row.fvu is None else f"{row.fvu:.4f}",
            "" if row.fvu is None else f"{row.fvu / row.kmeans_fvu:.3f}",
            f"{row.cpu_s:.1f}",
            f"{row.cpu_s / row.kmeans_cpu_s:.2f}",
            "" if row.least_used is None else f"{row.least_used:.3f}",
        )
        if config.json:
            write_json(config.json, {"rows": [asdict(row) for row in rows]})
    Console().print(table)


if __name__ == "__main__":
    main()
