"""`HistoryEncoder`: pre-norm causal self-attention over a jagged history."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchrec import KeyedJaggedTensor

from torchrec_sid.ages import HISTORY_AGES
from torchrec_sid.errors import SidError
from torchrec_sid.models.request_rows import RequestRows


@dataclass(frozen=True)
class EncoderConfig:
    """Shape of a :class:`HistoryEncoder`.

    Raises:
        SidError: a size below 1, or heads that do not divide ``dim``.
    """

    dim: int
    """D, width of event vectors in and out."""
    layers: int = 2
    heads: int = 4
    feedforward: int = 128
    """Hidden width of each layer's MLP."""
    actions: int = 8
    """Number of distinct actions an event may carry."""
    ages: int = HISTORY_AGES
    """Number of log2-seconds buckets of an event's age."""
    max_length: int = 64
    """Events per user that the batch holds at most."""

    def __post_init__(self) -> None:
        sizes = (
            self.dim,
            self.layers,
            self.heads,
            self.feedforward,
            self.actions,
            self.ages,
            self.max_length,
        )
        if min(sizes) < 1 or self.dim % self.heads:
            raise SidError("EncoderConfig", f"{self}", "Sizes are positive, and heads divide dim.")


class EncoderLayer(nn.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``; event i sees events 0 .. i.

    Args:
        config: sizes.
        device: where the parameters live.
    """

    def __init__(self, config: EncoderConfig, device: torch.device | None = None) -> None:
        super().__init__()
        self.heads = config.heads
        self.attention_norm = nn.LayerNorm(config.dim, device=device)
        self.query_key_value = nn.Linear(config.dim, 3 * config.dim, device=device)
        self.output = nn.Linear(config.dim, config.dim, device=device)
        self.mlp = nn.Sequential(
            nn.LayerNorm(config.dim, device=device),
            nn.Linear(config.dim, config.feedforward, device=device),
            nn.GELU(),
            nn.Linear(config.feedforward, config.dim, device=device),
        )

    def forward(self, events: Tensor) -> Tensor:
        """``[B, T, D]`` -> ``[B, T, D]``."""
        parts = self.query_key_value(self.attention_norm(events))
        batch, length, _ = events.shape
        query, key, value = parts.view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        events = events + self.output(attended.transpose(1, 2).flatten(2))
        return events + self.mlp(events)


class HistoryEncoder(nn.Module):
    """Contextual event vectors: layers of causal self-attention over content, action, age and position.

    Histories start at position 0 of the padded batch, so that the causal mask also hides the padding:
    no event sees beyond itself. Positions count from the oldest event kept.

    Args:
        config: sizes.
        device: where the parameters live.
    """

    def __init__(self, config: EncoderConfig, device: torch.device | None = None) -> None:
        super().__init__()
        self.config = config
        self.action = nn.Embedding(config.actions, config.dim, device=device)
        self.age = nn.Embedding(config.ages, config.dim, device=device)
        self.position = nn.Embedding(config.max_length, config.dim, device=device)
        for table in (self.action, self.age, self.position):
            nn.init.normal_(table.weight, std=0.05)
        self.layers = nn.ModuleList(EncoderLayer(config, device) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.dim, device=device)

    def forward(
        self, events: Tensor, features: KeyedJaggedTensor, rows: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Encode each history, one that several rows share once.

        Args:
            events: ``[events, D]``, user after user, oldest first.
            features: holds ``history_action`` and ``history_age``, int64, one value per event.
            rows: the batch's; they may hold a :class:`~torchrec_sid.models.request_rows.RequestRows`.

        Returns:
            ``[events, D]``.
        """
        actions = features["history_action"]
        lengths, offsets, requests = actions.lengths(), actions.offsets(), RequestRows.of(rows)
        if requests is not None:  # without the rows that hold no history
            lengths = requests.lengths(features)
            offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        events = events + self.action(actions.values()) + self.age(features["history_age"].values())
        whole = lengths.is_cuda or torch.compiler.is_compiling()
        bound = self.config.max_length if whole else max(1, int(lengths.max()))
        padded = torch.ops.fbgemm.jagged_to_padded_dense(events, [offsets], [bound], 0.0)
        padded = padded + self.position.weight[:bound]
        for layer in self.layers:
            padded = layer(padded)
        # As many rows as there were events, so that no size is read back from the device.
        flat: Tensor
        flat, _ = torch.ops.fbgemm.dense_to_jagged(self.norm(padded), [offsets], events.shape[0])
        return flat
