"""Side and similarity features: `python -m apps.bench.side [--quick] --json FILE`.

Rivals: for side features, one learned 3-row table per digit through an EmbeddingBagCollection of the same
width; for similarity features, decoding every event and pooling padded cosines in PyTorch.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from torchrec_sid import SidSpec
from torchrec_sid.artifact import write_json
from torchrec_sid.side import (
    FrozenBasis,
    SideFeatures,
    SideFeaturesConfig,
    SimilarityConfig,
    SimilarityFeatures,
)
from torchrec_sid.side.features import Kind

from .alternating import alternate, peak_mb

CPU = torch.device("cpu")
KINDS: tuple[Kind, ...] = ("digits", "one_hot", "basis")
BACKENDS: tuple[Literal["cpu", "torch"], ...] = ("cpu", "torch")


@dataclass(frozen=True)
class SideBenchConfig:
    """What to run."""

    quick: bool = False
    """Few events, three rounds."""
    json: str | None = None
    """File for the rows."""
    rounds: int = 7
    """Timed runs of each system."""
    seed: int = 0
    """Of codes and directions."""


def features(config: SideBenchConfig) -> list[dict[str, Any]]:
    """Packed bytes -> features, against learned tables per digit."""
    from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor

    events, rows = 5_000 if config.quick else 200_000, []
    for digits in (25, 80):
        generator = torch.Generator().manual_seed(config.seed)
        spec, basis = _basis(digits, 384, generator)
        codes = torch.randint(3, (events, digits), generator=generator)
        data = spec.pack_bytes(codes)
        works: dict[str, Callable[[], object]] = {}
        for kind in KINDS:
            side = SideFeatures(spec, SideFeaturesConfig(kind), basis=basis)
            works[f"side_{kind}"] = partial(side, data)
        names = [f"digit_{i}" for i in range(digits)]
        collection = EmbeddingBagCollection(
            tables=[
                EmbeddingBagConfig(name=f"t_{n}", embedding_dim=2, num_embeddings=3, feature_names=[n])
                for n in names
            ]
        )
        ones = torch.ones(events * digits, dtype=torch.int64)
        batch = KeyedJaggedTensor.from_lengths_sync(names, codes.T.reshape(-1).contiguous(), ones)
        works["tables_per_digit"] = partial(collection, batch)
        times = alternate(_quiet(works), _rounds(config), CPU)
        rows += [
            {"digits": digits, "events": events, "system": name, "ms": ms} for name, ms in times.items()
        ]
    return rows


def similarity(config: SideBenchConfig) -> list[dict[str, Any]]:
    """One candidate per user: the compiled kernel, plain PyTorch, and decoding every event."""
    rows = []
    for digits, users, length in ((25, 1024, 256), (80, 1024, 256), (25, 64, 4096)):
        users = max(1, users // 20) if config.quick else users
        generator = torch.Generator().manual_seed(config.seed)
        spec, basis = _basis(digits, 384, generator)
        codes = torch.randint(3, (users * length, digits), generator=generator)
        wanted = torch.randint(3, (users, digits), generator=generator)
        lengths = torch.full((users,), length)
        labels = torch.randint(-1, 2, (users * length,), generator=generator).float()
        arguments = (spec.pack_bytes(wanted), spec.pack_bytes(codes), lengths, labels)
        works: dict[str, Callable[[], object]] = {}
        for backend in BACKENDS:
            module = SimilarityFeatures(basis, SimilarityConfig())
            module.backend = backend
            works[f"similarity_{backend}"] = partial(module, *arguments)
        works["decode_and_pool"] = partial(_decode_and_pool, basis, *arguments)
        torch.testing.assert_close(
            module(*arguments)[:, 2 + 3 : 2 + 6],
            _decode_and_pool(basis, *arguments),
            rtol=1e-3,
            atol=1e-4,
        )
        times = alternate(_quiet(works), _rounds(config), CPU)
        for name, ms in times.items():
            rows.append(
                {
                    "digits": digits,
                    "users": users,
                    "length": length,
                    "system": name,
                    "ms": ms,
                    "peak_mb": peak_mb(_quiet(works)[name], CPU),
                }
            )
    return rows


def _decode_and_pool(
    basis: FrozenBasis, wanted: Tensor, history: Tensor, lengths: Tensor, labels: Tensor
) -> Tensor:
    """Labels pooled by softmax of the cosine at three temperatures, the direct way (equal lengths)."""
    rows, layout = basis.rows(), basis.layout
    users = len(lengths)
    x = torch.nn.functional.normalize(layout.expand_digits(history) @ rows, dim=-1).view(
        users, -1, basis.dim
    )
    t = torch.nn.functional.normalize(layout.expand_digits(wanted) @ rows, dim=-1)
    cosine = (x @ t.unsqueeze(2)).squeeze(2)
    return torch.stack(
        [((cosine * h).softmax(-1) * labels.view(users, -1)).sum(-1) for h in (3.0, 10.0, 30.0)], -1
    )


def _basis(digits: int, dims: int, generator: torch.Generator) -> tuple[SidSpec, FrozenBasis]:
    spec = SidSpec((3,) * digits)
    return spec, FrozenBasis.from_digits(spec, torch.randn(digits, dims, generator=generator))


def _quiet(works: dict[str, Callable[[], object]]) -> dict[str, Callable[[], object]]:
    def wrap(work: Callable[[], object]) -> Callable[[], object]:
        def run() -> object:
            with torch.no_grad():
                return work()

        return run

    return {name: wrap(work) for name, work in works.items()}


def _rounds(config: SideBenchConfig) -> int:
    return 3 if config.quick else config.rounds


def main() -> None:
    """Run, print, and write the rows."""
    from ..cli import parse_config

    config = parse_config(SideBenchConfig, __doc__)
    print(f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.2f}, torch {torch.__version__}")
    report = {"features": features(config), "similarity": similarity(config)}
    for name, rows in report.items():
        print(f"\n{name}")
        for row in rows:
            shown = {k: f"{v:.2f}" if isinstance(v, float) else v for k, v in row.items()}
            print("  " + ", ".join(f"{key} {value}" for key, value in shown.items()))
    if config.json:
        write_json(Path(config.json), report)


if __name__ == "__main__":
    main()
