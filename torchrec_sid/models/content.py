"""Content embeddings as an item feature: frozen vectors through a trained tower, in TorchRec's grammar."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchrec import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from torchrec_sid.devices import buffer_device
from torchrec_sid.errors import SidError


class ContentTower(nn.Module):
    """Frozen content embeddings of items, by index, through a two-layer MLP.

    The embeddings are centred and scaled to unit mean square once. The tower runs once per distinct item
    of a batch, not once per event.

    Args:
        content: ``[N, d]`` floating point, row = item index; kept in fp16 as a buffer that checkpoints
            leave out (it is data, not state).
        dim: D, the width of the output.
        hidden: width of the hidden layer.
        device: where parameters and buffer live.

    Raises:
        SidError: content that is not a non-empty matrix of finite numbers.
    """

    def __init__(
        self, content: Tensor, dim: int, hidden: int = 64, device: torch.device | None = None
    ) -> None:
        super().__init__()
        if content.dim() != 2 or not content.numel() or not content.dtype.is_floating_point:
            raise SidError(
                "content", f"{content.dtype} of shape {tuple(content.shape)}", "Pass floats [N, d]."
            )
        centred = content.float() - content.float().mean(dim=0)
        scale = centred.square().mean().sqrt()
        if not bool(torch.isfinite(scale)) or scale == 0:
            raise SidError("content", f"root mean square {scale}", "Pass finite, varied embeddings.")
        self.register_buffer(
            "content", (centred / scale).half().to(buffer_device(device)), persistent=False
        )
        self.content: Tensor
        self.tower = nn.Sequential(
            nn.Linear(content.shape[1], hidden, device=device),
            nn.ReLU(),
            nn.Linear(hidden, dim, device=device),
        )

    def forward(self, items: Tensor) -> Tensor:
        """Item indices ``[n]`` int64 -> ``[n, D]`` float32."""
        distinct, inverse = torch.unique(items, return_inverse=True)
        return self.tower(self.content[distinct].float())[inverse]


class ContentEmbeddingBagCollection(nn.Module):
    """KeyedJaggedTensor -> KeyedTensor of a feature with exactly one item per example.

    Args:
        feature: key of the feature, item indices.
        tower: what embeds an item.
    """

    def __init__(self, feature: str, tower: ContentTower) -> None:
        super().__init__()
        self.feature = feature
        self.tower = tower

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """The embedded feature, ``[B, D]``."""
        vectors = self.tower(features[self.feature].values())
        return KeyedTensor([self.feature], [vectors.shape[1]], vectors)


class ContentEmbeddingCollection(nn.Module):
    """KeyedJaggedTensor -> ``{feature: JaggedTensor}`` with one ``[D]`` vector per event.

    Args:
        feature: key of the feature, item indices.
        tower: what embeds an item.
    """

    def __init__(self, feature: str, tower: ContentTower) -> None:
        super().__init__()
        self.feature = feature
        self.tower = tower

    def forward(self, features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        """The embedded history, jagged like the feature."""
        jagged = features[self.feature]
        return {self.feature: JaggedTensor(self.tower(jagged.values()), lengths=jagged.lengths())}
