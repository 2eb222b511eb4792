"""Discrete PCA on more items than fit in memory: `python -m apps.bench.dpca_scale --rows 10000000`.

Fits on a synthetic stream (generated batch by batch, anew in each pass), encodes it, writes the packed
SIDs to a file, and prints the rates and the largest resident memory of the process.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from torchrec_sid.artifact import write_json
from torchrec_sid.progress import track
from torchrec_sid.quantizers import DiscretePca, DiscretePcaConfig
from torchrec_sid.streams import open_stream

from ..cli import parse_config


@dataclass(frozen=True)
class ScaleConfig:
    """What to run."""

    rows: int = 10_000_000
    """Synthetic items."""
    dim: int = 128
    """Width of their embeddings."""
    trits: int = 25
    """Digits of a SID."""
    batch_size: int = 65_536
    """Items per batch."""
    seed: int = 0
    """Seed of the items."""
    json: str | None = None
    """File for the figures."""


def synthetic_items(config: ScaleConfig) -> Iterator[Tensor]:
    """Batches ``[n, dim]`` of a mixture of 1,000 Gaussians with decaying spectra."""
    generator = torch.Generator().manual_seed(config.seed)
    spread = torch.arange(1, config.dim + 1).float() ** -0.5
    centres = torch.randn(1000, config.dim, generator=generator) * spread
    for begin in range(0, config.rows, config.batch_size):
        n = min(config.batch_size, config.rows - begin)
        batch = torch.randn(n, config.dim, generator=generator).mul_(0.5).mul_(spread)
        yield batch.add_(centres[torch.randint(1000, (n,), generator=generator)])


def run(config: ScaleConfig) -> dict[str, float]:
    """Fit, encode and write; the figures by name (seconds, items per second, GiB, fraction)."""
    began = time.perf_counter()
    for _ in track(synthetic_items(config), "generating", show=sys.stderr.isatty()):
        pass
    generating = time.perf_counter() - began
    stream = open_stream(lambda: synthetic_items(config))
    quantizer = DiscretePca(config.dim, DiscretePcaConfig.trits(config.trits))
    report = quantizer.fit(stream, progress=sys.stderr.isatty())
    began = time.perf_counter()
    with tempfile.TemporaryFile() as file:
        for batch in track(stream, "encoding", show=sys.stderr.isatty()):
            file.write(quantizer.spec.pack_bytes(quantizer.encode(batch)).numpy().tobytes())
        written = file.tell()
    encoding = time.perf_counter() - began
    assert written == config.rows * quantizer.spec.nbytes
    return {
        "rows": config.rows,
        "dim": config.dim,
        "bytes_per_item": quantizer.spec.nbytes,
        "fvu": report.fvu[-1],
        "generate_s": generating,
        "fit_s": report.seconds,
        # A fit makes two passes over the stream, an encoding one; making the items is not their work.
        "fit_without_generation_s": report.seconds - 2 * generating,
        "encode_items_per_s": config.rows / encoding,
        "encode_without_generation_items_per_s": config.rows / max(encoding - generating, 1e-9),
        "max_resident_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def main() -> None:
    """Run and print one line of JSON."""
    config = parse_config(ScaleConfig, __doc__)
    figures = run(config)
    if config.json:
        write_json(Path(config.json), figures)
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
