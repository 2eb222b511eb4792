"""apps.quantize on an accelerator: every quantizer, fit to report."""

from pathlib import Path

import pytest
import torch

from apps.quantize import QuantizeConfig, quantize
from tests.logs import small_log
from torchrec_sid.quantizers import QUANTIZERS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("name", ["residual_kmeans", "discrete_pca", "rq_vae", "vq_fusion"])
def test_sids_of_the_card_are_those_of_the_cpu(name, tmp_path: Path) -> None:
    small_log(tmp_path)
    quantizer = QUANTIZERS[name].config_type()
    made = [
        quantize(QuantizeConfig(str(tmp_path / "log"), str(tmp_path / d), quantizer, device=d))
        for d in ("cuda", "cpu")
    ]
    assert made[0].quality.fvu == pytest.approx(made[1].quality.fvu, rel=0.05)
    ids = torch.arange(8)
    catalog = made[0].catalog
    again = quantize(
        QuantizeConfig(str(tmp_path / "log"), str(tmp_path / "again"), quantizer, device="cuda")
    )
    assert torch.equal(catalog.lookup(ids), again.catalog.lookup(ids))
