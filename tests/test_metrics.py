"""NE, AUC and calibration by slice against direct formulas."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import binary_cross_entropy

from torchrec_sid.metrics import SLICES, SlicedMetrics


def _measure(p: Tensor, y: Tensor, w: Tensor, segment: Tensor, batch: int) -> dict:
    metrics = SlicedMetrics(rows=len(p), batch_size=batch)
    for part in torch.arange(len(p)).split(batch):
        metrics.update(predictions=p[part], labels=y[part], weights=w[part], segment=segment[part])
    return metrics.compute()


def _auc(p: Tensor, y: Tensor) -> float:
    """Share of (positive, negative) pairs in the right order."""
    return float((p[y == 1][:, None] > p[y == 0][None]).double().mean())


@given(st.integers(0, 10_000), st.integers(1, 5))
def test_metrics_equal_their_formulas(seed: int, batches: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = 40 * batches
    # No ties: TorchRec's AUC orders tied predictions as they come.
    p = 0.01 + 0.98 * torch.rand(rows, generator=generator, dtype=torch.float64)
    y = (torch.rand(rows, generator=generator) < 0.4).double()
    weights = (torch.rand(rows, generator=generator) < 0.9).double()
    segment = torch.randint(0, 4, (rows,), generator=generator)
    found = _measure(p, y, weights, segment, 40)
    for name, members in SLICES.items():
        codes = [("head", "torso", "tail", "cold").index(member) for member in members]
        inside = torch.isin(segment, torch.tensor(codes)) & (weights > 0)
        pi, yi = p[inside], y[inside]
        assert found[name].rows == int(inside.sum())
        if not 0 < yi.mean() < 1:
            assert found[name].ne is None
            continue
        entropy = binary_cross_entropy(yi.mean().expand_as(yi), yi)
        loss = binary_cross_entropy(pi, yi)
        assert found[name].ne == pytest.approx(float(loss / entropy), rel=1e-6)
        assert found[name].logloss == pytest.approx(float(loss), rel=1e-6)
        assert found[name].calibration == pytest.approx(float(pi.mean() / yi.mean()), rel=1e-6)
        assert found[name].auc == pytest.approx(_auc(pi, yi), abs=1e-6)


def test_a_slice_without_rows_has_no_metrics() -> None:
    p = torch.tensor([0.2, 0.8])
    found = _measure(p, torch.tensor([0.0, 1.0]), torch.ones(2), torch.zeros(2, dtype=torch.int64), 2)
    assert found["cold"].rows == 0
    assert found["cold"].ne is None and found["cold"].auc is None
    assert found["head"].auc == 1.0


def test_predicting_the_base_rate_has_ne_one() -> None:
    y = torch.tensor([1.0, 0.0, 0.0, 0.0] * 25)
    found = _measure(torch.full((100,), 0.25), y, torch.ones(100), torch.zeros(100, dtype=torch.int64), 50)
    assert math.isclose(found["all"].ne, 1.0, rel_tol=1e-6)
