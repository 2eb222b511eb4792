"""SID tables against the raw-id tables they replace: `python -m apps.bench.tables [--quick] --json FILE`.

Every collection of a case has the same dimension and, but for `side`, which has none, the same number of
rows. In the cases `*_equal_lookups` the raw-id collection reads as many rows per item as the prefixes: the
difference is what the transform costs. In the cases `*_sharded` both run under DistributedModelParallel in
one process, with the optimizer fused into the backward pass, as in training.

`tokenise_*`: codes to piece ids, by tensors (packing included) and by the sentencepiece library from Python
(making the strings included, with the fastest way we know; one thread).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from torchrec_sid.artifact import write_json
from torchrec_sid.tables import PieceTrainerConfig, SidTokenizer, train_pieces
from torchrec_sid.tables.sentencepiece import to_sentences

from .alternating import alternate, peak_mb
from .tables_systems import Case, Items, System, make_systems, one_process, planted, shard

Work = Callable[[], object]


@dataclass(frozen=True)
class TablesBenchConfig:
    """What to run."""

    quick: bool = False
    """Small batches and vocabularies, three rounds."""
    json: str | None = None
    """File for the rows."""
    rounds: int = 9
    """Timed runs of each system."""
    dim: int = 32
    """D of every table."""
    device: str = "cpu"
    """Where everything but the sentencepiece library runs."""
    seed: int = 0
    """Of SIDs and ids."""
    clock: Literal["wall", "cpu"] = "wall"
    """cpu: of this process alone, for a busy machine; with one thread."""
    parts: tuple[str, ...] = ("bags", "history", "tokenise_4", "tokenise_8")
    """What to run of it."""


def collections_bench(
    config: TablesBenchConfig, kind: Literal["bags", "history"], items: Items
) -> list[dict[str, Any]]:
    """Every scheme against the raw-id collection it replaces."""
    device, shrink = torch.device(config.device), 16 if config.quick else 1
    case = (
        Case("bags_4096x10", kind, 4096 // shrink, 10)
        if kind == "bags"
        else Case("history_64x4096", kind, 64, 4096 // shrink)
    )
    made = make_systems(case, items, config.dim, config.seed, device)
    equal = {"raw_id": made.pop("raw_id_equal"), "hashed_prefix": made["hashed_prefix"]}
    rows = _measure(config, case.name, made)
    rows += _measure(config, f"{case.name}_equal_lookups", equal)
    with one_process(device):
        sharded = {name: shard(system, device) for name, system in equal.items()}
        rows += _measure(config, f"{case.name}_equal_lookups_sharded", sharded)
    return rows


def _measure(config: TablesBenchConfig, case: str, systems: Mapping[str, System]) -> list[dict[str, Any]]:
    passes: dict[str, dict[str, Work]] = {
        "forward": {name: system.forward for name, system in systems.items()},
        "forward+backward": {name: system.forward_backward for name, system in systems.items()},
    }
    rounds = 3 if config.quick else config.rounds
    return [row for name, works in passes.items() for row in _rows(config, case, name, works, rounds)]


def _rows(
    config: TablesBenchConfig, case: str, name: str, works: Mapping[str, Work], rounds: int
) -> list[dict[str, Any]]:
    device = torch.device(config.device)
    clock = time.process_time if config.clock == "cpu" else time.perf_counter
    times = alternate(works, rounds, device, clock)
    return [
        {"case": case, "system": key, "pass": name, "ms": ms, "peak_mb": peak_mb(works[key], device)}
        for key, ms in times.items()
    ]


def tokenise_bench(config: TablesBenchConfig, levels: int) -> list[dict[str, Any]]:
    """Codes ``[10^6, levels]`` to piece ids, unigram and BPE."""
    device = torch.device(config.device)
    count, known, size = (20_000, 5_000, 3_000) if config.quick else (1_000_000, 100_000, 50_000)
    items = planted(levels, 256 if levels == 4 else 128, known, size, config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    codes = items.codes[torch.randint(0, known, (count,), generator=generator)]
    on_device = codes.to(device)
    rows = []
    models: tuple[Literal["unigram", "bpe"], ...] = ("unigram", "bpe")
    for model in models:
        trained = model == items.pieces.config.model
        pieces = (
            items.pieces
            if trained
            else train_pieces(items.spec, items.codes, PieceTrainerConfig(size, model))
        )
        tokenizer, processor = SidTokenizer(pieces, device), pieces.processor()

        def by_tensor(tokenizer: SidTokenizer = tokenizer) -> Tensor:
            ids: Tensor = tokenizer(items.spec.pack(on_device, validate=False)).flat()
            return ids

        def by_library(processor: Any = processor) -> list[list[int]]:
            ids: list[list[int]] = processor.encode(to_sentences(items.spec, codes), num_threads=1)
            return ids

        if by_tensor().tolist() != [i for ids in by_library() for i in ids]:
            raise AssertionError("the two do not cut alike")
        works: dict[str, Work] = {"spm_tensor": by_tensor, "spm_python": by_library}
        rounds = max(3, config.rounds // 3)
        rows += _rows(config, f"tokenise_{levels}_levels_{model}", "forward", works, rounds)
    return rows


def main() -> None:
    """Run, print, and write the rows."""
    from ..cli import parse_config

    config = parse_config(TablesBenchConfig, __doc__)
    torch.manual_seed(config.seed)
    print(f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.2f}, torch {torch.__version__}")
    rows: list[dict[str, Any]] = []
    items: Items | None = None
    for part in config.parts:
        if part in ("bags", "history"):
            size = (5_000, 3_000) if config.quick else (200_000, 100_000)
            items = items or planted(4, 256, *size, config.seed)
            found = collections_bench(config, "bags" if part == "bags" else "history", items)
        else:
            found = tokenise_bench(config, int(part.removeprefix("tokenise_")))
        for row in found:
            shown = f"{row['case']:<40} {row['system']:<14} {row['pass']:<17}"
            print(f"{shown} {row['ms']:9.2f} ms {row['peak_mb']:9.1f} MB", flush=True)
        rows += found
        if config.json:
            write_json(Path(config.json), {"rows": rows})


if __name__ == "__main__":
    main()
