"""Error against bytes of Discrete PCA, plain and after k-means stages: `python -m apps.bench.dpca_curve`.

Beside them residual k-means, as far as its bytes go, and where the curves cross. The last columns compare
the fits at equal bits: CPU seconds and decoder numbers.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from rich.console import Console
from rich.table import Table

from torchrec_sid.artifact import write_json
from torchrec_sid.quantizers import DiscretePca, DiscretePcaConfig, ResidualKMeans, ResidualKMeansConfig

from ..cli import parse_config
from .planted_tree import planted_tree
from .real_items import load_embeddings, split_rows, unexplained


@dataclass(frozen=True)
class CurveConfig:
    """What to run."""

    data: str = "../shared/data"
    """Folder of log folders."""
    datasets: tuple[str, ...] = ("tree", "hm_week", "amazon_beauty")
    """Folders with an item_emb.npy, or `tree`, the planted tree."""
    nbytes: tuple[int, ...] = (4, 5, 8, 12, 16, 24, 32, 40, 64, 80)
    """Bytes of a SID; five trits a byte."""
    kmeans_bytes: tuple[int, ...] = (4, 5, 8)
    """Bytes of residual k-means, one level of 256 a byte."""
    first: tuple[int, ...] = (1, 2)
    """k-means stages of 256 codes, one byte each, before the trits of the mixed rows."""
    tree_items: int = 100_000
    """Items of the planted tree."""
    seed: int = 0
    """Seed of the split and of the quantizers."""
    threads: int = 1
    """Threads; CPU seconds are only comparable with one."""
    json: str | None = None
    """File for the rows."""


@dataclass(frozen=True)
class CurveRow:
    """One quantizer."""

    dataset: str
    system: str
    nbytes: int
    fvu: float
    cpu_s: float
    decoder_floats: int
    items_per_s: float


def run(config: CurveConfig) -> Iterator[CurveRow]:
    """Fit and yield row after row."""
    torch.set_num_threads(config.threads)
    for dataset in config.datasets:
        tree = dataset == "tree"
        x = planted_tree(config.tree_items).x if tree else load_embeddings(config.data, dataset)
        rows = split_rows(len(x), config.seed)
        for name, nbytes, quantizer, floats in _quantizers(config, x.shape[1]):
            began = time.process_time()
            quantizer.fit(x[rows.fit])
            seconds = time.process_time() - began
            held_out = x[rows.held_out]
            began = time.process_time()
            codes = quantizer.encode(held_out)
            rate = len(held_out) / (time.process_time() - began)
            error = unexplained(held_out, quantizer.decode(codes))
            yield CurveRow(dataset, name, nbytes, error, seconds, floats, rate)


def _quantizers(
    config: CurveConfig, dim: int
) -> Iterator[tuple[str, int, DiscretePca | ResidualKMeans, int]]:
    for nbytes in config.nbytes:
        if nbytes in config.kmeans_bytes:
            levels = ResidualKMeansConfig(cardinalities=(256,) * nbytes, seed=config.seed)
            yield "k-means", nbytes, ResidualKMeans(dim, levels), (256 * nbytes + 1) * dim
        trits = 5 * nbytes
        plain = DiscretePcaConfig.trits(trits, seed=config.seed)
        yield "DPCA", nbytes, DiscretePca(dim, plain), (trits + 1) * dim
        for first in config.first:
            trits = 5 * (nbytes - first)
            mixed = DiscretePcaConfig.trits(trits, codebooks=(256,) * first, seed=config.seed)
            yield f"{first} x 256 + DPCA", nbytes, DiscretePca(dim, mixed), (trits + 256 * first + 1) * dim


def main(argv: Sequence[str] | None = None) -> None:
    """Command line; ``argv`` stands in for the arguments of the process."""
    config = parse_config(CurveConfig, __doc__, argv)
    rows: list[CurveRow] = []
    for row in run(config):
        rows.append(row)
        if config.json:
            write_json(config.json, {"rows": [asdict(row) for row in rows]})
    for dataset in config.datasets:
        Console().print(table([row for row in rows if row.dataset == dataset]))


def table(rows: Sequence[CurveRow]) -> Table:
    """One set: error by bytes and system, then fit and decoder against k-means of the same bytes."""
    names = list(dict.fromkeys(row.system for row in rows))
    found = {(row.system, row.nbytes): row for row in rows}
    ratios = ("fit k-means / DPCA", "decoder k-means / DPCA", "DPCA items/s")
    out = Table("bytes", *names, *ratios, title=rows[0].dataset)
    for nbytes in dict.fromkeys(row.nbytes for row in rows):
        errors = [found.get((name, nbytes)) for name in names]
        plain, kmeans = found[("DPCA", nbytes)], found.get(("k-means", nbytes))
        out.add_row(
            str(nbytes),
            *("" if row is None else f"{row.fvu:.4f}" for row in errors),
            "" if kmeans is None else f"{kmeans.cpu_s / plain.cpu_s:.1f}",
            "" if kmeans is None else f"{kmeans.decoder_floats / plain.decoder_floats:.0f}",
            f"{plain.items_per_s:,.0f}",
        )
    return out


if __name__ == "__main__":
    main()
