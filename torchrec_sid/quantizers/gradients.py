"""Gradients through a quantizer: what the encoder is told about an output that jumps."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

GradientName = Literal["straight_through", "rotation"]


def pass_gradient(z: Tensor, z_hat: Tensor, how: GradientName) -> Tensor:
    """``z_hat`` in the forward pass, with a gradient towards ``z`` in the backward pass.

    Args:
        z: ``[N, d]``, what was quantized.
        z_hat: ``[N, d]``, its quantization; receives no gradient from here.
        how: see :func:`straight_through` and :func:`rotation`.
    """
    return rotation(z, z_hat) if how == "rotation" else straight_through(z, z_hat)


def straight_through(z: Tensor, z_hat: Tensor) -> Tensor:
    """The gradient of ``z_hat`` goes to ``z`` unchanged (Bengio 2013, arXiv 1308.3432)."""
    return z + (z_hat - z).detach()


def rotation(z: Tensor, z_hat: Tensor) -> Tensor:
    """``z_hat`` as a fixed rotation and scaling of ``z`` (Fifty 2024, arXiv 2410.06424).

    The gradient turns with the angle between the two and scales with ``|z_hat| / |z|``. With u and v their
    unit vectors and w the unit vector of u + v, the rotation is ``1 - 2 w w^T + 2 v u^T``.
    """
    fixed, target = z.detach(), z_hat.detach()
    u, v = F.normalize(fixed, dim=1), F.normalize(target, dim=1)
    w = F.normalize(u + v, dim=1)
    length = fixed.norm(dim=1, keepdim=True)
    ratio = target.norm(dim=1, keepdim=True) / length.clamp(min=1e-12)
    turned = z - 2 * (z * w).sum(1, keepdim=True) * w + 2 * (z * u).sum(1, keepdim=True) * v
    # Forward this is z_hat up to rounding; the last term makes it exact, and right for z = 0.
    out = ratio * turned
    return out + (target - out).detach()
