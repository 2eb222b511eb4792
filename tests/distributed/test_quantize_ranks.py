"""`apps.quantize` on two processes: they train one quantizer, the first one writes."""

from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from apps.quantize import QuantizeConfig, help_along, quantize
from tests.apps.test_quantize import write_items
from tests.distributed.launch import run_ranks
from torchrec_sid.catalog import SidCatalog
from torchrec_sid.quantizers import ResidualKMeansConfig, RqVaeConfig, VqFusionConfig, load_quantizer

SMALL: dict[str, Any] = {
    "residual_kmeans": ResidualKMeansConfig((8, 8)),
    "rq_vae": RqVaeConfig(cardinalities=(8, 8), epochs=2, batch_size=32),
    "vq_fusion": VqFusionConfig(codebooks=(8,), stages=((4, 3),), epochs=2, batch_size=32, hidden=(16,)),
}


def _run(data: str, output: str, quantizer: Any) -> bool:
    config = QuantizeConfig(data, output, SMALL[quantizer], report=False)
    if dist.get_rank() > 0:
        assert dist.group.WORLD is not None
        help_along(config, dist.group.WORLD)
        return False
    quantize(config, group=dist.group.WORLD)
    return True


def test_processes_train_together_and_the_first_writes(tmp_path: Path) -> None:
    write_items(tmp_path / "data", np.arange(300))
    for quantizer in ("rq_vae", "vq_fusion", "residual_kmeans"):
        output = tmp_path / quantizer
        assert run_ranks(_run, 2, str(tmp_path / "data"), str(output), quantizer) == [True, False]
        fitted = load_quantizer(output / "quantizer.safetensors")
        catalog = SidCatalog.open(output / "catalog")
        assert len(catalog) == 300 and catalog.quantizer_fingerprint == fitted.fingerprint
    alone = QuantizeConfig(str(tmp_path / "data"), str(tmp_path / "alone"), SMALL["rq_vae"])
    other = quantize(alone).quantizer.fingerprint
    together = load_quantizer(tmp_path / "rq_vae" / "quantizer.safetensors").fingerprint
    assert together != other, "two processes take steps of twice the rows"
