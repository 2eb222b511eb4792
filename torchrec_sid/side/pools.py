"""`HistoryPools`: mean and gated sums of a history of packed SIDs, from one pass that decodes no event."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor, nn

from torchrec_sid.side.features import SideFeatures
from torchrec_sid.side.terms import events_from_newest


class HistoryPools(nn.Module):
    """Query-free summaries of each user's history, over windows of its most recent events.

    With features ``phi_i`` of the SIDs, actions ``a_i`` and ages ``g_i`` of the n events in a window:

        mean = (1/n) sum_i (W phi_i + action[a_i] + age[g_i])
        pool_p = (1/sqrt(n)) sum_i gate[a_i, p] W phi_i

    A weight depends on an event's action alone, so features are summed by action first: the work and the
    gradients of everything learned are per user, whatever the length of the history.

    Args:
        feature_dim: F, of the features that are summed.
        dim: D, width of each summary.
        actions: number of distinct actions.
        ages: number of buckets of an event's age.
        pools: number of gated sums.
        windows: most recent events that each group of summaries sees, ascending; the last is the longest
            history.
        device: of the parameters.
    """

    def __init__(
        self,
        feature_dim: int,
        dim: int,
        actions: int,
        ages: int,
        pools: int,
        windows: Sequence[int],
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.windows = tuple(windows)
        self.projection = nn.Linear(feature_dim, dim, bias=False, device=device)
        self.action = nn.Embedding(actions, dim, device=device)
        self.age = nn.Embedding(ages, dim, device=device)
        self.gate = nn.Embedding(actions, pools, device=device)
        nn.init.normal_(self.action.weight, std=0.1)
        nn.init.normal_(self.age.weight, std=0.05)
        nn.init.normal_(self.gate.weight, std=0.5)

    @property
    def summaries(self) -> int:
        """Number of ``[B, D]`` summaries that :meth:`forward` returns."""
        return len(self.windows) * (1 + self.gate.embedding_dim)

    def forward(
        self, features: SideFeatures, history_bytes: Tensor, lengths: Tensor, actions: Tensor, ages: Tensor
    ) -> Tensor:
        """Summarise.

        Args:
            features: packed SIDs -> ``[n, F]``.
            history_bytes: ``[E, nbytes]`` uint8, user after user, each user's oldest first.
            lengths: ``[B]`` integers that sum to E.
            actions, ages: ``[E]`` int64.

        Returns:
            ``[B, windows (1 + pools), D]``: means, then gated sums; zeros for an empty history.
        """
        users, slots, values = lengths.shape[0], len(self.windows), self.action.num_embeddings
        rows = torch.arange(users, device=lengths.device)
        slot = torch.repeat_interleave(rows, lengths, output_size=history_bytes.shape[0]) * slots
        if slots > 1:
            edges = torch.tensor(self.windows[:-1], device=lengths.device)
            slot = slot + torch.bucketize(events_from_newest(lengths, slot.shape[0]), edges, right=True)
        by_action = slot * values + actions
        sums = features.group_sum(history_bytes, by_action, users * slots * values)
        # Slots are disjoint, windows nested.
        sums = sums.view(users, slots, values, -1).cumsum(1)
        action_counts = _counts(by_action, (users, slots, values))
        ages = slot * self.age.num_embeddings + ages
        age_counts = _counts(ages, (users, slots, self.age.num_embeddings))
        count = action_counts.sum(2, keepdim=True).clamp_min(1)
        terms = action_counts @ self.action.weight + age_counts @ self.age.weight
        means = (self.projection(sums.sum(2)) + terms) / count
        gated = torch.einsum("bwaf,ap->bwpf", sums, self.gate.weight) / count.sqrt().unsqueeze(3)
        return torch.cat([means, self.projection(gated).flatten(1, 2)], dim=1)


def _counts(keys: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """``[users, windows, values]`` float32: how often each value occurs in a window."""
    flat = torch.zeros(prod(shape), device=keys.device)
    return flat.index_add(0, keys, torch.ones(keys.shape, device=keys.device)).view(shape).cumsum(1)
