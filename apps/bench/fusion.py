"""One fused SID against one SID per source of half the bits: `python -m apps.bench.fusion`.

ml1m: title and genres, and the plot (two embeddings). hm_week: text, and the product type (a category).
Prints what each SID keeps of each source on held-out items, and how often the first code stays when a
source is missing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from torchrec_sid.artifact import write_json
from torchrec_sid.quantizers import CategorySource, EmbeddingSource, VqFusion, VqFusionConfig
from torchrec_sid.quantizers.fusion.fusion_report import CategoryReport, SourceReport
from torchrec_sid.quantizers.fusion.sources import Source

from ..cli import parse_config
from .real_items import load_embeddings, split_rows


@dataclass(frozen=True)
class FusionBenchConfig:
    """What to run."""

    data: str = "../shared/data"
    """Folder of log folders."""
    datasets: tuple[str, ...] = ("ml1m", "hm_week")
    """Of those two."""
    seeds: int = 3
    """Seeds 0 .. SEEDS - 1, of the split and of the fits."""
    threads: int = 1
    """Threads."""
    epochs: float = VqFusionConfig.epochs
    """Of every fit."""
    json: str | None = None
    """File for the rows."""


@dataclass(frozen=True)
class FusionRow:
    """What one SID keeps of one source."""

    dataset: str
    seed: int
    sid: str
    """``fused`` or ``alone``."""
    source: str
    bits: float
    fvu: float | None = None
    fvu_ceiling: float | None = None
    top1: float | None = None
    top1_ceiling: float | None = None
    kl: float | None = None
    kl_ceiling: float | None = None
    first_code_without: float | None = None
    """Share of held-out items whose first code stays when this source is missing."""


def run(config: FusionBenchConfig) -> Iterator[FusionRow]:
    """Fit and yield row after row."""
    torch.set_num_threads(config.threads)
    for dataset in config.datasets:
        sources, data = _load(config, dataset)
        for seed in range(config.seeds):
            rows = split_rows(len(next(iter(data.values()))), seed)
            fit = {name: values[rows.fit] for name, values in data.items()}
            held_out = {name: values[rows.held_out] for name, values in data.items()}
            whole = VqFusionConfig(epochs=config.epochs, seed=seed)
            fused = _fitted(sources, whole, fit)
            codes = fused.encode(held_out)
            for name, report in fused.report(held_out).items():
                rest = {other: values for other, values in held_out.items() if other != name}
                stays = float((fused.encode(rest)[:, 0] == codes[:, 0]).float().mean())
                yield replace(_row(dataset, seed, "fused", name, 39.9, report), first_code_without=stays)
            for name, source in sources.items():
                # 16 + 3.2 bits: half of the 39.9 bits of the default.
                half = replace(whole, codebooks=(256, 256), stages=((2, 3),))
                alone = _fitted({name: source}, half, {name: fit[name]})
                report = alone.report({name: held_out[name]})[name]
                yield _row(dataset, seed, "alone", name, 19.2, report)


def _load(config: FusionBenchConfig, dataset: str) -> tuple[dict[str, Source], dict[str, Tensor]]:
    text = load_embeddings(config.data, dataset)
    if dataset == "ml1m":
        plot = load_embeddings(config.data, dataset, "item_emb_plot.npy")
        return {"text": EmbeddingSource(384), "plot": EmbeddingSource(384)}, {"text": text, "plot": plot}
    import pyarrow.parquet as pq

    column = pq.read_table(Path(config.data) / dataset / "items.parquet", columns=["product_type_name"])
    names, labels = np.unique(np.array(column[0].to_pylist(), dtype=str), return_inverse=True)
    data = {"text": text, "product type": torch.from_numpy(labels)}
    return {"text": EmbeddingSource(384), "product type": CategorySource(len(names))}, data


def _fitted(sources: dict[str, Source], config: VqFusionConfig, data: dict[str, Tensor]) -> VqFusion:
    fusion = VqFusion(sources, config)
    fusion.fit(data)
    return fusion


def _row(dataset: str, seed: int, sid: str, name: str, bits: float, report: SourceReport) -> FusionRow:
    if isinstance(report, CategoryReport):
        kept = {k: getattr(report, k) for k in ("top1", "top1_ceiling", "kl", "kl_ceiling")}
    else:
        kept = {k: getattr(report, k) for k in ("fvu", "fvu_ceiling")}
    return FusionRow(dataset, seed, sid, name, bits, **kept)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line; ``argv`` stands in for the arguments of the process."""
    config = parse_config(FusionBenchConfig, __doc__, argv)
    rows: list[FusionRow] = []
    names = list(FusionRow.__dataclass_fields__)
    out = Table(*names)
    for row in run(config):
        rows.append(row)
        values = (getattr(row, name) for name in names)
        out.add_row(*("" if v is None else f"{v:.4f}" if isinstance(v, float) else str(v) for v in values))
        if config.json:
            write_json(config.json, {"rows": [asdict(row) for row in rows]})
    Console(width=170).print(out)


if __name__ == "__main__":
    main()
