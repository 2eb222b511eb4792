"""`HistoryPools`: mean and gated sums of a history of packed SIDs, from one pass that decodes no event."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchrec_sid.side.features import SideFeatures


class HistoryPools(nn.Module):
    """Query-free summaries of each user's history.

    With features ``phi_i`` of the SIDs, actions ``a_i`` and ages ``g_i`` of a user's n events:

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
        device: of the parameters.
    """

    def __init__(
        self,
        feature_dim: int,
        dim: int,
        actions: int,
        ages: int,
        pools: int,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
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
        return 1 + self.gate.embedding_dim

    def forward(
        self, features: SideFeatures, history_bytes: Tensor, lengths: Tensor, actions: Tensor, ages: Tensor
    ) -> Tensor:
        """Summarise.

        Args:
            features: packed SIDs -> ``[n, F]``.
            history_bytes: ``[E, nbytes]`` uint8, user after user.
            lengths: ``[B]`` integers that sum to E.
            actions, ages: ``[E]`` int64.

        Returns:
            ``[B, 1 + pools, D]``: the mean, then the gated sums; zeros for an empty history.
        """
        users, values = lengths.shape[0], self.action.num_embeddings
        rows = torch.arange(users, device=lengths.device)
        user = torch.repeat_interleave(rows, lengths, output_size=history_bytes.shape[0])
        by_action = user * values + actions
        sums = features.group_sum(history_bytes, by_action, users * values).view(users, values, -1)
        by_age = user * self.age.num_embeddings + ages
        terms = _counts(by_action, users, values) @ self.action.weight
        terms = terms + _counts(by_age, users, self.age.num_embeddings) @ self.age.weight
        count = lengths.clamp_min(1).unsqueeze(1)
        mean = (self.projection(sums.sum(1)) + terms) / count
        gated = torch.einsum("baf,ap->bpf", sums, self.gate.weight) / count.sqrt().unsqueeze(2)
        return torch.cat([mean.unsqueeze(1), self.projection(gated)], dim=1)


def _counts(keys: Tensor, users: int, values: int) -> Tensor:
    """``[users, values]`` float32: how often each value occurs."""
    counts = torch.zeros(users * values, device=keys.device)
    return counts.index_add(0, keys, torch.ones(keys.shape, device=keys.device)).view(users, values)
