"""Real item embeddings for the benches: a fifth of the items, drawn by the seed, is held out."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from torchrec_sid.errors import SidError
from torchrec_sid.seeding import derived_generator


class Rows(NamedTuple):
    """Rows of a set of items, ``[N]`` int64 each."""

    fit: Tensor
    held_out: Tensor


def load_embeddings(data: str, dataset: str, file: str = "item_emb.npy") -> Tensor:
    """``[N, d]`` float32 of a log folder.

    Raises:
        SidError: the folder has no such file.
    """
    path = Path(data) / dataset / file
    if not path.is_file():
        raise SidError(
            str(path), "no such file", "Point --data at the folder of log folders; see docs/data.md."
        )
    return torch.from_numpy(np.load(path).astype(np.float32))


def split_rows(rows: int, seed: int) -> Rows:
    """Four fifths to fit, one fifth held out."""
    order = torch.randperm(rows, generator=derived_generator(seed, "bench split"))
    return Rows(order[rows // 5 :], order[: rows // 5])


def unexplained(x: Tensor, rebuilt: Tensor) -> float:
    """Fraction of the variance of ``x`` ``[N, d]`` that ``rebuilt`` leaves unexplained."""
    return float((x - rebuilt).square().sum() / (x - x.mean(0)).square().sum())
