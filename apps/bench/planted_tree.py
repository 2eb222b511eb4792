"""A planted topic tree, whose right prefixes are known: `python -m apps.bench.planted_tree`.

Fits 3 x 256 codes on four fifths of the items and prints, for the others, the error, different SIDs, and
the purity of prefixes of one code (topics) and two codes (subtopics), greedy and with beams at encode time,
for ResidualKMeans and for faiss.ResidualQuantizer fitted with beam 1 and with its default beam.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from torchrec_sid.quantizers import ResidualKMeans, ResidualKMeansConfig

from ..cli import parse_config

_LEVELS = (256, 256, 256)


@dataclass(frozen=True)
class TreeConfig:
    """What to run."""

    items: int = 100_000
    """Items of the tree."""
    seeds: int = 3
    """Trees and fits with seeds 0 .. SEEDS - 1."""
    threads: int = 0
    """Threads of torch and faiss; 0 for one per core."""


class PlantedTree(NamedTuple):
    """What :func:`planted_tree` returns."""

    x: Tensor
    """``[N, d]`` float32, unit vectors."""
    topic: Tensor
    """``[N]`` int64, 64 of them."""
    subtopic: Tensor
    """``[N]`` int64, 16 per topic, numbered over all topics."""


def planted_tree(items: int, *, seed: int = 0, dim: int = 192, rank: int = 32) -> PlantedTree:
    """Items of a tree of 64 topics, 16 subtopics and 8 kinds each, popular by a power law, with noise.

    Tree and noise lie in a subspace of ``rank`` dimensions, as real embeddings nearly do. With 24 bits a
    greedy residual quantizer leaves about 0.215 of the variance; five sixths of that is noise.
    """
    generator = torch.Generator().manual_seed(1000 + seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, rank, generator=generator) / rank**0.5

    def popular(k: int) -> Tensor:
        return torch.multinomial(torch.arange(1.0, k + 1) ** -0.5, items, True, generator=generator)

    tree = draw(64), 0.5 * draw(64, 16), 0.55 * draw(64, 16, 8)
    a, b, c = popular(64), popular(16), popular(8)
    x = tree[0][a] + tree[1][a, b] + tree[2][a, b, c] + 0.5 * draw(items)
    x = torch.nn.functional.normalize(x, dim=1)
    basis = torch.linalg.qr(torch.randn(dim, rank, generator=generator)).Q
    return PlantedTree(x @ basis.T, a, a * 16 + b)


def purity(prefixes: Tensor, labels: Tensor) -> float:
    """Share of items that carry the commonest label of their prefix.

    Args:
        prefixes: ``[N, l]`` integers.
        labels: ``[N]`` int64.
    """
    _, group = prefixes.unique(dim=0, return_inverse=True)
    width = int(labels.max()) + 1
    pairs, size = (group * width + labels).unique(return_counts=True)
    commonest = torch.zeros(int(group.max()) + 1, dtype=torch.int64)
    commonest.scatter_reduce_(0, pairs // width, size, "amax")
    return float(commonest.sum()) / len(labels)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line; ``argv`` stands in for the arguments of the process."""
    config = parse_config(TreeConfig, __doc__, argv)
    threads = config.threads or os.cpu_count() or 1
    torch.set_num_threads(threads)
    table = Table(title=f"planted tree of {config.items:,} items, 24 bits")
    for heading in ("seed", "system", "encode beam", "fit s", "FVU", "unique", "purity 1", "purity 2"):
        table.add_column(heading, justify="left" if heading == "system" else "right")
    for seed in range(config.seeds):
        for row in _rows(config.items, seed, threads):
            table.add_row(str(seed), *row)
    console = Console()
    (console if console.is_terminal else Console(width=120)).print(table)


def _rows(items: int, seed: int, threads: int) -> Iterator[tuple[str, ...]]:
    tree = planted_tree(items, seed=seed)
    held = items // 5
    x, held_out = tree.x[held:].contiguous(), tree.x[:held].contiguous()

    def describe(name: str, beam: int, fit_s: float, codes: Tensor, decoded: Tensor) -> tuple[str, ...]:
        variance = (held_out - held_out.mean(0)).square().sum()
        return (
            name,
            str(beam),
            f"{fit_s:.2f}",
            f"{float((held_out - decoded).square().sum() / variance):.4f}",
            f"{len(codes.unique(dim=0)) / held:.3f}",
            f"{purity(codes[:, :1], tree.topic[:held]):.4f}",
            f"{purity(codes[:, :2], tree.subtopic[:held]):.4f}",
        )

    quantizer = ResidualKMeans(x.shape[1], ResidualKMeansConfig(cardinalities=_LEVELS, seed=seed))
    fit_s = quantizer.fit(x).seconds
    for beam in (1, 5, 16):
        codes = quantizer.encode(held_out, beam=beam)
        yield describe("torchrec_sid.ResidualKMeans", beam, fit_s, codes, quantizer.decode(codes))
    for fit_beam, encode_beams in ((1, (1, 5)), (5, (5,))):
        rq, fit_s = _fit_faiss(x, seed, fit_beam, threads)
        for beam in encode_beams:
            rq.max_beam_size = beam
            codes = rq.compute_codes(held_out.numpy())
            decoded = torch.from_numpy(rq.decode(codes))
            yield describe(
                f"faiss.RQ fitted with beam {fit_beam}", beam, fit_s, torch.from_numpy(codes), decoded
            )


def _fit_faiss(x: Tensor, seed: int, beam: int, threads: int) -> tuple[Any, float]:
    import faiss

    faiss.omp_set_num_threads(threads)
    rq: Any = faiss.ResidualQuantizer(x.shape[1], len(_LEVELS), 8)
    rq.cp.seed = seed + 1
    rq.max_beam_size = beam
    start = time.perf_counter()
    rq.train(x.numpy())
    return rq, time.perf_counter() - start


if __name__ == "__main__":
    main()
