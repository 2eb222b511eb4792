"""What the gradient quantizers put around their bottleneck: networks that begin as a given linear map, and
the gradient that their encoder gets through an output that jumps.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

GradientName = Literal["straight_through", "rotation"]


class LinearPlusMlp(nn.Module):
    """``y = A x + MLP(x)``, where the last layer of the MLP starts at zero.

    With A from a PCA the network is the PCA at the start, so that a fit begins at the closed-form
    solution and its gradients are those of a working quantizer. A random encoder is what starves the
    codebooks of the usual RQ-VAE.

    Args:
        inputs: width of x.
        outputs: width of y.
        hidden: widths of the MLP's layers; none leaves the linear map alone.
        generator: initialises the hidden layers.
        device: where the parameters live.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        hidden: tuple[int, ...],
        *,
        generator: torch.Generator,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=False, device=device)
        layers: list[nn.Module] = []
        width = inputs
        for size in hidden:
            layer = nn.Linear(width, size, device=device)
            _initialise(layer, generator)
            layers += [layer, nn.GELU()]
            width = size
        self.mlp = None
        if hidden:
            last = nn.Linear(width, outputs, device=device)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            self.mlp = nn.Sequential(*layers, last)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, inputs]`` -> ``[N, outputs]``."""
        y: Tensor = self.linear(x)
        return y if self.mlp is None else y + self.mlp(x)


@torch.no_grad()
def _initialise(layer: nn.Linear, generator: torch.Generator) -> None:
    # Drawn on the CPU, so that every device starts from the same numbers.
    bound = layer.in_features**-0.5
    for tensor in (layer.weight, layer.bias):
        if tensor.device.type != "meta":
            tensor.copy_((torch.rand(tensor.shape, generator=generator) * 2 - 1) * bound)


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
