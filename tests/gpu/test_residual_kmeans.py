"""ResidualKMeans on an accelerator: deterministic there, and as good as on the CPU."""

import pytest
import torch

from torchrec_sid.quantizers import ResidualKMeans, ResidualKMeansConfig

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CONFIG = ResidualKMeansConfig(cardinalities=(64, 64, 64), buffer_rows=6_000)


def points(rows: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    middles = torch.randn(200, 48, generator=torch.Generator().manual_seed(9))
    topic = torch.randint(200, (rows,), generator=generator)
    return middles[topic] + 0.4 * torch.randn(rows, 48, generator=generator)


def fvu(quantizer: ResidualKMeans, x: torch.Tensor, beam: int = 1) -> float:
    left = x - quantizer.decode(quantizer.encode(x, beam=beam)).cpu()
    return float(left.square().sum() / (x - x.mean(0)).square().sum())


def test_cuda_is_deterministic_and_as_good_as_the_cpu() -> None:
    x, held_out = points(10_000, 0), points(2_000, 1)
    quantizers = [ResidualKMeans(48, CONFIG, device=device) for device in ("cuda", "cuda", "cpu")]
    for quantizer in quantizers:
        quantizer.fit(x)
    first, again, cpu = quantizers
    assert first.codebook(2).is_cuda and first.encode(held_out).is_cuda
    assert first.fingerprint == again.fingerprint
    for beam in (1, 5):
        assert fvu(first, held_out, beam) == pytest.approx(fvu(cpu, held_out, beam), rel=0.02)


def test_a_quantizer_fitted_on_the_cpu_encodes_the_same_on_cuda() -> None:
    x = points(5_000, 0)
    quantizer = ResidualKMeans(48, CONFIG)
    quantizer.fit(x)
    codes = quantizer.encode(x)
    moved = quantizer.to("cuda")
    # Rounding may break a tie between two nearest codewords the other way.
    assert float((moved.encode(x).cpu() == codes).all(1).float().mean()) > 0.999
    assert torch.allclose(moved.decode(codes).cpu(), quantizer.cpu().decode(codes), atol=1e-5)
