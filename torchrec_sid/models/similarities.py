"""Similarity features for any item representation: how a candidate resembles what the user liked.

SIDE compares decoded digits (:class:`~torchrec_sid.side.similarity.SimilarityFeatures`). These do the same
for what others hold of an item: the content embedding (cosine), a hierarchical SID (levels before the first
difference), or its id alone (is it the same item?). A measure says how similar candidate and event are; the
pools over a history are those of SIDE, by the same names: so a comparison compares representations.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torchrec import KeyedJaggedTensor

from torchrec_sid.devices import buffer_device
from torchrec_sid.errors import SidError
from torchrec_sid.models.attend import ChannelOutput, ItemChannel
from torchrec_sid.models.request_rows import RequestRows
from torchrec_sid.models.target_attention import HistoryConfig
from torchrec_sid.side.kernels.similarity_problem import features_of_sums
from torchrec_sid.side.similarity import SimilarityConfig
from torchrec_sid.side.terms import events_from_newest
from torchrec_sid.spec import SidSpec

_PAIRS = 1 << 15
"""Pairs whose embeddings are gathered at a time."""


class ContentCosine(nn.Module):
    """Cosine of content embeddings, by item index.

    Args:
        content: ``[N, d]`` floating point, row = item index; kept in fp16 as a buffer that checkpoints
            leave out (it is data, not state).
        centred: subtract the mean item first, as SIDE's similarity features do.
        device: of the buffer.

    Raises:
        SidError: content that is not a matrix of finite floats.

    Example:
        >>> cosine = ContentCosine(torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0]]), centred=False)
        >>> cosine(torch.tensor([0, 0]), torch.tensor([1, 2])).tolist()
        [0.0, 1.0]
    """

    content: Tensor

    def __init__(self, content: Tensor, centred: bool = True, device: torch.device | None = None) -> None:
        super().__init__()
        if content.dim() != 2 or not content.dtype.is_floating_point or not bool(content.isfinite().all()):
            found = f"{content.dtype} of shape {tuple(content.shape)}"
            raise SidError("content", found, "Pass finite floats [N, d].")
        rows = content.float()
        rows = rows - rows.mean(dim=0) if centred else rows
        unit = rows / rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        self.register_buffer("content", unit.half().to(buffer_device(device)), persistent=False)

    def forward(self, candidates: Tensor, events: Tensor) -> Tensor:
        """Items ``[P]`` each -> ``[P]``; an item without content has cosine 0 with everything."""
        pairs = zip(candidates.split(_PAIRS), events.split(_PAIRS), strict=True)
        return torch.cat([(self.content[a].float() * self.content[b].float()).sum(1) for a, b in pairs])


class PrefixOverlap(nn.Module):
    """Share of the levels of two SIDs before the first difference; negative SIDs are like nothing.

    Args:
        spec: shape of the packed SIDs.

    Example:
        >>> spec = SidSpec((4, 4))
        >>> a, b = spec.pack(torch.tensor([[1, 2], [1, 2]])), spec.pack(torch.tensor([[1, 3], [0, 2]]))
        >>> PrefixOverlap(spec)(a, b).tolist()
        [0.5, 0.0]
    """

    def __init__(self, spec: SidSpec) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, candidates: Tensor, events: Tensor) -> Tensor:
        """Packed SIDs ``[P]`` int64 each -> ``[P]``."""
        equal = self.spec.unpack(candidates) == self.spec.unpack(events)
        equal = equal & ((candidates >= 0) & (events >= 0)).unsqueeze(-1)
        return equal.long().cumprod(-1).sum(-1) / self.spec.levels


class SameItem(nn.Module):
    """1 where the event is on the candidate itself, else 0.

    Example:
        >>> SameItem()(torch.tensor([3, 3]), torch.tensor([3, 5])).tolist()
        [1.0, 0.0]
    """

    def forward(self, candidates: Tensor, events: Tensor) -> Tensor:
        """Items ``[P]`` int64 each -> ``[P]``."""
        return (candidates == events).float()


def pool_similarities(
    similarity: Tensor, lengths: Tensor, labels: Tensor, config: SimilarityConfig, window: int | None = None
) -> Tensor:
    """Similarities of a candidate with each event of its history -> ``[B, n]`` features, no gradient.

    Args:
        similarity: ``[E]`` within -1 .. 1, user after user.
        lengths: ``[B]`` integers that sum to E.
        labels: ``[E]``: positive liked, negative disliked, zero neither.
        config: which pools; their names and order are ``config.names`` (agreement bins are not offered).
        window: pool the most recent events only; None: all.

    Raises:
        SidError: agreement bins.
    """
    if config.agreement_bins:
        raise SidError("SimilarityConfig.agreement_bins", str(config.agreement_bins), "Set 0 here.")
    events, users = similarity.shape[0], lengths.shape[0]
    user = torch.repeat_interleave(torch.arange(users, device=lengths.device), lengths, output_size=events)
    seen = torch.ones_like(similarity, dtype=torch.bool)
    if window is not None:
        seen = events_from_newest(lengths, events) < window
    times = seen.float()
    weights = [(t * (similarity - 1)).exp() * times for t in config.temperatures]
    sums = [times, similarity * times, *weights]
    shown = [seen]
    if config.labels:
        sums += [*(weight * labels for weight in weights), similarity * times * labels]
        shown += [seen & (labels > 0), seen & (labels < 0)]
    total = similarity.new_zeros(users, len(sums)).index_add(0, user, torch.stack(sums, 1))
    largest = torch.stack([similarity.masked_fill(~mask, -1.0) for mask in shown], 1)
    maxima = similarity.new_full((users, len(shown)), -1.0)
    maxima = maxima.scatter_reduce(0, user.unsqueeze(1).expand_as(largest), largest, "amax")
    return features_of_sums(total, maxima, config.temperatures, config.labels)


class SimilarityChannel(ItemChannel):
    """Numbers alone: similarity features of the candidate, for each window of recent events.

    Args:
        measure: ``[P]`` values of candidates, ``[P]`` of events -> ``[P]`` within -1 .. 1.
        fields: keys of the candidate and of the history in the KeyedJaggedTensor that it compares.
        dim: D, width of fields, of which this channel has none.
        history: how histories are summarised; None: there are no features.
        action_values: ``[actions]`` how much an action speaks for an item, within -1 .. 1.
        device: of the buffers.
    """

    action_values: Tensor

    def __init__(
        self,
        measure: nn.Module,
        fields: tuple[str, str],
        dim: int,
        history: HistoryConfig | None,
        action_values: Tensor,
        device: torch.device | None = None,
    ) -> None:
        self.config = SimilarityConfig()
        windows = () if history is None else history.windows
        super().__init__(fields=0, numbers=len(windows) * len(self.config.names))
        self.measure, self.keys, self.dim, self.windows = measure, fields, dim, windows
        self.register_buffer("action_values", action_values.float().to(buffer_device(device)))

    @torch.no_grad()
    def forward(self, features: KeyedJaggedTensor, rows: Mapping[str, Tensor]) -> ChannelOutput:
        """``[B, 0, D]``, and ``[B, k]`` features."""
        item, past = self.keys
        candidates = features[item].values()
        none = self.action_values.new_zeros(candidates.shape[0], 0, self.dim)
        if not self.windows:
            return ChannelOutput(none)
        action = features["history_action"]
        lengths, events, labels = (
            action.lengths(),
            features[past].values(),
            self.action_values[action.values()],
        )
        requests = RequestRows.of(rows)
        if requests is not None:
            lengths, at = requests.events_of_rows(features)
            events, labels = events[at], labels[at]
        paired = torch.repeat_interleave(candidates, lengths, output_size=events.shape[0])
        similarity = self.measure(paired, events)
        numbers = [
            pool_similarities(
                similarity, lengths, labels, self.config, None if window == self.windows[-1] else window
            )
            for window in self.windows
        ]
        return ChannelOutput(none, torch.cat(numbers, dim=1))
