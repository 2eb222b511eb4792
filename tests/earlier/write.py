"""Write small artefacts of every kind. The files beside this one were made by it at df61d2b.

Run it from a checkout of the release whose artefacts are wanted: ``PYTHONPATH=. python write.py FOLDER``.
"""

import sys
from pathlib import Path

import torch

from torchrec_sid.catalog import SidCatalog
from torchrec_sid.parallel.checkpoint import CheckpointManager
from torchrec_sid.quantizers import ResidualKMeans, ResidualKMeansConfig
from torchrec_sid.spec import SidSpec
from torchrec_sid.tables.pieces import PieceTrainerConfig, train_pieces

MARK = "ab" * 32


def write_all(folder: Path) -> None:
    spec = SidSpec((8, 4, 4))
    ids = torch.arange(100, 140)
    codes = torch.stack([(ids * 5 + level) % k for level, k in enumerate(spec.cardinalities)], 1)
    catalog = SidCatalog.create(folder / "catalog", spec, ids[:30], codes[:30], MARK)
    catalog.append(ids[30:], codes[30:], MARK)
    quantizer = ResidualKMeans(4, ResidualKMeansConfig(cardinalities=(4, 2)))
    quantizer.fit(torch.arange(160.0).reshape(40, 4).sin())
    quantizer.save(folder / "quantizer.safetensors")
    train_pieces(spec, codes, PieceTrainerConfig(40)).save(folder / "pieces.safetensors")
    state = {"model": {"w": torch.arange(6.0)}, "optimizer": {"lr": 0.5, "name": "sgd"}}
    with CheckpointManager(folder / "checkpoints", identity={"catalog": MARK}) as manager:
        manager.save(3, state, {"epoch": 1, "best": float("inf")}, local={"x": torch.ones(2)})


if __name__ == "__main__":
    write_all(Path(sys.argv[1]))
