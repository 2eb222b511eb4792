"""Gradient quantizers fitted by two processes: bit-equal codebooks after start, averages and resets."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.distributed.launch import run_ranks
from tests.quantizers.test_rq_vae import SMALL, bent_clusters, error
from tests.quantizers.test_vq_fusion import SMALL as FUSION
from tests.quantizers.test_vq_fusion import SOURCES, items
from torchrec_sid.artifact import fingerprint
from torchrec_sid.quantizers import RqVae, RqVaeConfig, VqFusion
from torchrec_sid.quantizers.bottleneck import Bottleneck, BottleneckConfig, start_bottleneck
from torchrec_sid.quantizers.collectives import Collectives
from torchrec_sid.quantizers.fusion.fusion_fit import FusionFit
from torchrec_sid.quantizers.fusion.source_rows import FusionData
from torchrec_sid.quantizers.gradient_fit import all_tensors
from torchrec_sid.quantizers.usage import UsageMonitor, count_codes, usage_of

CONFIG = dataclasses.replace(SMALL, batch_size=32)


def _bits(module: torch.nn.Module) -> str:
    return fingerprint("state", 1, {}, all_tensors(module))


def _fit(config: RqVaeConfig, rows: int) -> tuple[str, float, int]:
    x = bent_clusters(rows)
    torch.manual_seed(dist.get_rank())  # the global generator must not matter
    quantizer = RqVae(12, config)
    report = quantizer.fit(lambda: iter(x.split(100)), group=dist.group.WORLD)
    return _bits(quantizer), error(quantizer, x), report.rows


def test_a_fit_by_two_processes_ends_with_the_same_bits() -> None:
    for change in ({"epochs": 0.0}, {}, {"reset_below": 0.5}, {"codebook_update": "ema"}):
        config = dataclasses.replace(CONFIG, **change)
        (bits, left, rows), other = run_ranks(_fit, 2, config, 401)
        assert (bits, left, rows) == other, change
        assert rows == 401
        alone = RqVae(12, dataclasses.replace(config, batch_size=64))
        alone.fit(bent_clusters(401))
        assert left < 1.1 * error(alone, bent_clusters(401))


def _fuse() -> tuple[str, tuple[float, ...]]:
    data = items(301)
    present = {"image": torch.arange(301) % 5 > 0}
    fusion = VqFusion(SOURCES, dataclasses.replace(FUSION, batch_size=32))
    pairs = torch.arange(300).view(-1, 2)
    report = fusion.fit(data, present=present, pairs=pairs, group=dist.group.WORLD)
    return _bits(fusion), report.fvu


def test_a_fusion_by_two_processes_ends_with_the_same_bits() -> None:
    first, second = run_ranks(_fuse, 2)
    assert first == second
    assert first[1][-1] < first[1][0] < 1


def _resume(path: str) -> list[str]:
    x = bent_clusters(201)
    marks = []
    for _ in range(2):  # the second fit finds the first one's checkpoint, complete
        quantizer = RqVae(12, CONFIG)
        quantizer.fit(x, checkpoint=path, checkpoint_every=4, group=dist.group.WORLD)
        marks.append(_bits(quantizer))
    return marks


def test_two_processes_continue_from_one_checkpoint(tmp_path: Path) -> None:
    first, second = run_ranks(_resume, 2, str(tmp_path / "fit.safetensors"))
    assert first == second
    assert first[0] == first[1]


def _follow() -> list[tuple[str, int, float]]:
    """Each rank sees other latents; rank 1 has fewer of them."""
    rank = dist.get_rank()
    ranks = Collectives(dist.group.WORLD)
    z = bent_clusters(300, seed=rank)[: 300 - 120 * rank]
    bottleneck = Bottleneck(
        12, (16, 8), ((3, 3),), BottleneckConfig(codebook_update="ema", reset_below=0.1)
    )
    start_bottleneck(bottleneck, z, rows_per_step=300, seed=0)
    ranks.broadcast_(all_tensors(bottleneck).values())
    states: list[tuple[str, int, float]] = [(_bits(bottleneck), 0, 0.0)]
    bottleneck.codebook(0)[5] = 1e4
    bottleneck.count_0[5], bottleneck.total_0[5] = 1e-6, 0.01
    for step in range(4):
        output = bottleneck(z)
        resets = bottleneck.follow(z, output, ranks, step)
        states.append((_bits(bottleneck), resets, float(bottleneck.count_0.sum())))
    return states


def test_codebooks_averages_and_resets_agree_bit_by_bit() -> None:
    first, second = run_ranks(_follow, 2)
    assert first == second
    assert first[1][1] >= 1, "the dead code was not reset"
    assert len({bits for bits, _, _ in first}) == len(first), "nothing moved"
    # The averages count the rows of both ranks: 480 a step, towards which they move.
    assert first[-1][2] > 300


def _shares() -> dict[str, Any]:
    ranks = Collectives(dist.group.WORLD)
    data = torch.arange(23)
    own = [batch[0] for batch in ranks.own_rows((piece,) for piece in data.split(5))]
    gathered = ranks.gather_rows(torch.full((ranks.rank + 1, 2), float(ranks.rank)))
    counted = [torch.tensor([1.0 + ranks.rank]), torch.tensor([[2]])]
    ranks.sum_(counted)
    return {
        "own": torch.cat(own).tolist(),
        "gathered": gathered[:, 0].tolist(),
        "sums": [int(c) for c in counted],
    }


def test_ranks_share_the_rows_without_overlap() -> None:
    first, second = run_ranks(_shares, 2)
    assert first["own"] == list(range(0, 23, 2))
    assert second["own"] == list(range(1, 23, 2))
    assert first["gathered"] == second["gathered"] == [0.0, 1.0, 1.0]
    assert first["sums"] == second["sums"] == [3, 4]


def _measured() -> dict[str, Any]:
    """What a fit on two ranks says of itself, beside what one process finds in the same quantizer."""
    ranks = Collectives(dist.group.WORLD)
    x = bent_clusters(301)
    quantizer = RqVae(12, dataclasses.replace(CONFIG, epochs=0.0))
    report = quantizer.fit(x, group=dist.group.WORLD)
    total = (x - x.mean(0)).square().sum()
    depths = range(1, quantizer.spec.levels + 1)
    codes = quantizer.encode(x)
    alone = [float((x - quantizer.decode(codes[:, :d])).square().sum() / total) for d in depths]
    monitor = UsageMonitor((8, 4), (1.0, 1.0), 0.0)
    every = torch.stack([torch.arange(40) % 8, torch.arange(40) % 20 // 5], 1)
    monitor.add(every[ranks.rank :: 2][: 12 + 8 * ranks.rank])
    seen = torch.cat([every[0::2][:12], every[1::2]])
    return {
        "fvu": (list(report.fvu), alone),
        "usage": (monitor.read(ranks, 1), usage_of(count_codes(seen, (8, 4)))),
    }


def test_ranks_measure_what_one_process_does() -> None:
    for found in run_ranks(_measured, 2):
        assert found["fvu"][0] == pytest.approx(found["fvu"][1], rel=1e-4)
        assert found["usage"][0] == found["usage"][1]


def _noise() -> dict[str, Any]:
    ranks = Collectives(dist.group.WORLD)
    config = dataclasses.replace(FUSION, epochs=0.0, source_dropout=0.5)
    data = items(301)
    fusion = VqFusion(SOURCES, config)
    report = fusion.fit(data, group=dist.group.WORLD)
    opened = FusionData(data, SOURCES)
    packed = fusion.model.pack(next(iter(opened)))
    losses = [
        float(FusionFit(fusion.model, config, opened, None, r)._step(packed, 7).loss)
        for r in (ranks, Collectives(None))
    ]
    alone = FusionFit(fusion.model, config, opened, None, Collectives(None)).level_errors()
    return {"loss": losses[0], "alone": losses[1], "errors": (report.fvu, alone)}


def test_a_fusion_measures_as_one_process_does_and_ranks_hide_other_sources() -> None:
    first, second = run_ranks(_noise, 2)
    for found in (first, second):
        assert found["errors"][0] == pytest.approx(found["errors"][1], rel=1e-4)
    assert first["loss"] != second["loss"], "both ranks hid the same sources of the same items"
    assert first["alone"] == second["alone"] == first["loss"]
