"""Every quantizer on the same data at the same bits: `python -m apps.bench.quantizers --json FILE`.

Real embeddings are those of every folder of --data with an item_emb.npy; `tree` is a planted topic tree.
Four fifths of the items are fitted, one fifth is held out; all systems run in one process on the same
number of threads, one after the other, in an order that rotates with the seed. A quarter of the held-out
items are queries: recall is the share of the ten nearest of the other held-out items that are among the
ten nearest by decoded codes.
"""

from __future__ import annotations

import logging
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Literal, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from torchrec_sid.artifact import write_json
from torchrec_sid.errors import SidError
from torchrec_sid.seeding import derived_generator

from ..cli import parse_config, plain_errors
from .planted_tree import planted_tree
from .quantizer_systems import Fitted, System, full_name, systems

_QUERIES = 1000
_TREE = "tree"


@dataclass(frozen=True)
class BenchConfig:
    """What to measure."""

    json: str | None = None
    """File for the rows."""
    data: str = "../shared/data"
    """Folder of log folders; those with an item_emb.npy are used."""
    datasets: tuple[str, ...] = ()
    """Names of folders, or `tree`; all of them by default."""
    systems: tuple[str, ...] = ()
    """Names of systems, or their beginnings, e.g. `torchrec_sid` or `faiss.RQ`; all by default."""
    bits: tuple[int, ...] = (24, 40)
    """Bits of a SID; multiples of 8."""
    seeds: int = 3
    """Seeds 0 .. SEEDS - 1, of the split and of the systems."""
    threads: int = 0
    """Threads of every system; 0 for one per core."""
    clock: Literal["wall", "cpu"] = "wall"
    """`cpu` counts the CPU seconds of the process: steadier where a machine is shared, with one thread."""
    tree_items: int = 100_000
    """Items of the planted tree."""
    quick: bool = False
    """One seed, 24 bits, at most 4,000 items a set; without semantic_id, whose fit alone takes minutes."""

    def __post_init__(self) -> None:
        if any(bits % 8 or bits < 16 for bits in self.bits):
            raise SidError("bits", str(self.bits), "Choose multiples of 8 from 16 on.")
        if self.seeds < 1:
            raise SidError("seeds", str(self.seeds), "Choose 1 or more.")


@dataclass(frozen=True)
class Row:
    """One system on one set at one seed."""

    dataset: str
    system: str
    bits: float
    fvu: float
    """Squared error on held-out items by their variance."""
    fit_s: float
    encode_items_per_s: float
    decoder_floats: int
    unique: int
    """Different SIDs of the held-out items."""
    recall10: float
    seed: int


class Split(NamedTuple):
    """One set, divided."""

    fit: Tensor
    """``[N, d]`` float32."""
    held_out: Tensor
    """``[n, d]`` float32."""
    queries: int
    """q: so many of the first held-out items are queries, the others are the base."""
    neighbours: Tensor
    """``[q, 10]`` int64, rows of the base."""


def main(argv: Sequence[str] | None = None) -> None:
    """Command line; ``argv`` stands in for the arguments of the process."""
    logging.basicConfig(level=logging.ERROR)
    console = Console()
    if not console.is_terminal:
        console = Console(width=150)
    rows: list[Row] = []
    with plain_errors():
        config = parse_config(BenchConfig, __doc__, argv)
        for row in run(config, console):
            rows.append(row)
            if config.json:  # after every row: a long run that is cut off keeps what it measured
                write_json(config.json, {"rows": [asdict(row) for row in rows]})
    for dataset in dict.fromkeys(row.dataset for row in rows):
        console.print(table(dataset, [row for row in rows if row.dataset == dataset]))


def run(config: BenchConfig, console: Console) -> Iterator[Row]:
    """Measure and yield row after row.

    Raises:
        SidError: no set or no system of that name.
    """
    threads = config.threads or os.cpu_count() or 1
    torch.set_num_threads(threads)
    _set_faiss_threads(threads)
    chosen = _chosen_systems(config)
    clock = time.perf_counter if config.clock == "wall" else time.process_time
    for name in _datasets(config):
        x = _load(config, name)
        for seed in range(1 if config.quick else config.seeds):
            split = _split(x, seed)
            for bits in (24,) if config.quick else config.bits:
                for number in range(len(chosen)):
                    system = chosen[(number + seed) % len(chosen)]
                    if system.largest is not None and len(split.fit) > system.largest:
                        continue
                    with console.status(f"{name}, {bits} bits, seed {seed}: {full_name(system)}"):
                        yield measure(name, system, split, bits, seed, clock)


def measure(
    dataset: str,
    system: System,
    split: Split,
    bits: int,
    seed: int,
    clock: Callable[[], float] = time.perf_counter,
) -> Row:
    """Fit one system and measure it."""
    start = clock()
    fitted = system.fit(split.fit, bits, seed)
    fit_s = clock() - start
    codes, seconds = _encode(fitted, split.held_out, clock)
    decoded = fitted.decode(codes)
    left = (split.held_out - decoded).square().sum()
    variance = (split.held_out - split.held_out.mean(0)).square().sum()
    found = _nearest(split.held_out[: split.queries], decoded[split.queries :])
    hits = (found.unsqueeze(2) == split.neighbours.unsqueeze(1)).any(2).float().mean()
    return Row(
        dataset=dataset,
        system=full_name(system),
        bits=round(float(fitted.bits), 1),
        fvu=float(left / variance),
        fit_s=fit_s,
        encode_items_per_s=len(split.held_out) / seconds,
        decoder_floats=fitted.decoder_floats,
        unique=len(codes.unique(dim=0)),
        recall10=float(hits),
        seed=seed,
    )


def _encode(fitted: Fitted, x: Tensor, clock: Callable[[], float]) -> tuple[Tensor, float]:
    """Codes, and the median of three timings."""
    codes = fitted.encode(x)
    seconds = []
    for _ in range(3):
        start = clock()
        codes = fitted.encode(x)
        seconds.append(clock() - start)
    return codes, sorted(seconds)[1]


def table(dataset: str, rows: Sequence[Row]) -> Table:
    """Means over the seeds, in the form of faiss's bench_quantizer."""
    out = Table(title=f"{dataset}: {1 + max(row.seed for row in rows)} seed(s)")
    out.add_column("system")
    for heading in (
        "bits",
        "bytes",
        "decoder floats",
        "fit s",
        "encode items/s",
        "FVU",
        "unique",
        "recall@10",
    ):
        out.add_column(heading, justify="right")
    groups: dict[tuple[int, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[-(-int(row.bits + 0.99) // 8), row.system].append(row)
    for (nbytes, system), same in sorted(groups.items(), key=lambda item: item[0][0]):
        out.add_row(
            system,
            f"{same[0].bits:g}",
            str(nbytes),
            f"{same[0].decoder_floats:,}",
            f"{fmean(row.fit_s for row in same):,.2f}",
            f"{fmean(row.encode_items_per_s for row in same):,.0f}",
            f"{fmean(row.fvu for row in same):.4f}",
            f"{fmean(row.unique for row in same):,.0f}",
            f"{fmean(row.recall10 for row in same):.3f}",
        )
    return out


def _datasets(config: BenchConfig) -> list[str]:
    root = Path(config.data)
    names = sorted(path.parent.name for path in root.glob("*/item_emb.npy"))
    for name in config.datasets:
        if name not in (*names, _TREE):
            raise SidError("datasets", name, f"Choose from {[*names, _TREE]}.")
    return list(config.datasets) or [*names, _TREE]


def _chosen_systems(config: BenchConfig) -> list[System]:
    every = [s for s in systems() if not (config.quick and s.name.startswith("semantic_id"))]
    chosen = [s for s in every if not config.systems or full_name(s).startswith(tuple(config.systems))]
    if not chosen:
        raise SidError("systems", str(config.systems), f"Choose from {[full_name(s) for s in every]}.")
    return chosen


def _load(config: BenchConfig, name: str) -> Tensor:
    limit = 4_000 if config.quick else None
    if name == _TREE:
        return planted_tree(min(config.tree_items, limit or config.tree_items)).x
    values = np.load(Path(config.data) / name / "item_emb.npy", mmap_mode="r")
    return torch.from_numpy(np.array(values[:limit], dtype=np.float32))


def _split(x: Tensor, seed: int) -> Split:
    order = torch.randperm(len(x), generator=derived_generator(seed, "bench.split"))
    held = len(x) // 5
    fit, held_out = x[order[held:]].contiguous(), x[order[:held]].contiguous()
    queries = min(_QUERIES, held // 4)
    return Split(fit, held_out, queries, _nearest(held_out[:queries], held_out[queries:]))


def _nearest(queries: Tensor, base: Tensor) -> Tensor:
    """Rows of the ten nearest of ``base``: ``[q, 10]``."""
    distance = torch.addmm(base.square().sum(1), queries, base.T, alpha=-2)
    return distance.topk(10, largest=False).indices


def _set_faiss_threads(threads: int) -> None:
    try:
        import faiss
    except ImportError as error:
        raise SidError("faiss", "not installed", "Run pip install 'torchrec-sid[bench]'.") from error
    faiss.omp_set_num_threads(threads)


if __name__ == "__main__":
    main()
