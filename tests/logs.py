"""A small synthetic log and SIDs for it, for tests of models, training and apps."""

from pathlib import Path

import torch
from torch import Tensor

from torchrec_sid.data.prepare import PrepareConfig, prepare
from torchrec_sid.data.prepared import PreparedLog
from torchrec_sid.data.synthetic import SyntheticConfig, write_synthetic
from torchrec_sid.spec import SidSpec

SMALL = SyntheticConfig(items=1000, users=200, events=12_000, topics=8, subtopics=4, dim=16)
SPEC = SidSpec((8, 8, 8))


def small_log(folder: Path) -> PreparedLog:
    """The log, written to ``folder / "log"`` and prepared in ``folder / "prepared"``."""
    write_synthetic(folder / "log", SMALL)
    return prepare(folder / "log", folder / "prepared", PrepareConfig(block_rows=64))


def random_sids(items: int) -> Tensor:
    """``[items]`` int64: packed SIDs that mean nothing."""
    codes = torch.randint(0, 8, (items, 3), generator=torch.Generator().manual_seed(7))
    return SPEC.pack(codes)
