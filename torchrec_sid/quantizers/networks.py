"""Encoders and decoders that begin as a given linear map and learn what it misses."""

from __future__ import annotations

import torch
from torch import Tensor, nn


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
