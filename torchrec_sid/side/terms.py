"""Learned and fixed terms of a history's events besides their SIDs: what was done, how long ago."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchrec_sid.devices import buffer_device
from torchrec_sid.errors import SidError

# Marks a value outside a term's range; the operator reports it with its event.
_INVALID = 255


@dataclass(frozen=True)
class EventTermsConfig:
    """Which terms enter the attention. All are off by default.

    Embedded terms are added to the decoded event vector, so that they act on key and value alike:
    ``x_i = D q_i + E_action[a_i] + E_age[bucket(age_i)] + E_position[bucket(position_i)]``.
    """

    num_actions: int = 0
    """Number of action types, at most 255; ``actions`` are then 0 .. num_actions - 1."""
    age_boundaries: tuple[float, ...] = ()
    """Ascending edges, in the unit of ``ages``; n edges make n + 1 buckets, at most 255."""
    age_buckets: int = 0
    """In place of edges: ``ages`` are bucket numbers already, 0 .. age_buckets - 1, at most 255."""
    position_buckets: int = 0
    """Buckets of the distance from the newest event, in powers of two: 0, 1, 2-3, 4-7, ...; the last
    takes all that is older."""
    recency_bias: bool = False
    """A learned score per head and age bucket (position bucket where there are no ages)."""
    alibi: bool = False
    """Subtract ``2^(-8 (h + 1) / heads)`` per event of distance from the newest (ALiBi, 2108.12409)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "age_boundaries", tuple(float(b) for b in self.age_boundaries))
        if not 0 <= self.num_actions <= 255:
            raise SidError("EventTermsConfig.num_actions", str(self.num_actions), "Choose 0 to 255.")
        if not 0 <= self.age_buckets <= 255 or (self.age_buckets and self.age_boundaries):
            raise SidError(
                "EventTermsConfig.age_buckets",
                f"{self.age_buckets} with {len(self.age_boundaries)} edges",
                "Choose 0 to 255, or give age_boundaries instead.",
            )
        if not 0 <= self.position_buckets <= 62:
            raise SidError(
                "EventTermsConfig.position_buckets", str(self.position_buckets), "Choose 0 to 62."
            )
        edges = self.age_boundaries
        if len(edges) > 254 or any(a >= b for a, b in zip(edges, edges[1:], strict=False)):
            raise SidError(
                "EventTermsConfig.age_boundaries", f"{len(edges)} edges", "Give at most 254, ascending."
            )
        if self.recency_bias and not (self.num_ages or self.position_buckets):
            raise SidError(
                "EventTermsConfig.recency_bias",
                "no buckets",
                "Set age_boundaries, age_buckets or position_buckets.",
            )

    @property
    def num_ages(self) -> int:
        """Buckets of the age, 0 where ages are not used."""
        return len(self.age_boundaries) + 1 if self.age_boundaries else self.age_buckets

    @property
    def sizes(self) -> tuple[int, ...]:
        """Values of each embedded term, in column order: action, age, position."""
        return tuple(size for size in (self.num_actions, self.num_ages, self.position_buckets) if size)


class EventTerms(nn.Module):
    """The embeddings of event terms, and the bytes by which events refer to them.

    Args:
        config: which terms.
        dim: d, dimension of the decoded event vector.
        heads: attention heads.
        device: of parameters and buffers.
    """

    boundaries: Tensor
    slopes: Tensor

    def __init__(
        self, config: EventTermsConfig, dim: int, heads: int, *, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.config, self.heads = config, heads
        place = buffer_device(device)
        # No empty parameter: it would get no gradient, which DistributedDataParallel takes for an error.
        self.embedding: nn.Parameter | None = None
        if config.sizes:
            self.embedding = nn.Parameter(torch.empty(sum(config.sizes), dim, device=device))
        self.register_buffer(
            "boundaries",
            torch.tensor(config.age_boundaries, dtype=torch.float32, device=place),
            persistent=False,
        )
        slopes = torch.tensor([2.0 ** (-8 * (h + 1) / heads) for h in range(heads)], device=place)
        self.register_buffer("slopes", slopes, persistent=False)
        self.recency: nn.Parameter | None = None
        if config.recency_bias:
            self.recency = nn.Parameter(torch.empty(heads, self._recency_range[1], device=device))
        self.reset_parameters()

    @property
    def _recency_range(self) -> tuple[int, int]:
        """First feature and number of features of the term that the recency bias reads."""
        config = self.config
        return config.num_actions, config.num_ages or config.position_buckets

    def reset_parameters(self) -> None:
        """Small random embeddings, no recency bias."""
        if self.embedding is not None:
            nn.init.normal_(self.embedding, std=0.02)
        if self.recency is not None:
            nn.init.zeros_(self.recency)

    def columns(
        self, lengths: Tensor, events: int, actions: Tensor | None, ages: Tensor | None
    ) -> list[Tensor]:
        """One ``[E]`` uint8 column per embedded term.

        Raises:
            SidError: a configured term that is missing, one that is not configured, or another shape.
        """
        config, columns = self.config, []
        if _present("actions", actions, config.num_actions > 0, events):
            assert actions is not None
            columns.append(_numbers("actions", actions, config.num_actions))
        if _present("ages", ages, config.num_ages > 0, events):
            assert ages is not None
            if config.age_buckets:
                columns.append(_numbers("ages", ages, config.age_buckets))
            else:
                # A NaN age falls into the last bucket: unknown is treated as oldest.
                bucket = torch.bucketize(ages.to(torch.float32), self.boundaries, right=True)
                columns.append(bucket.to(torch.uint8))
        if config.position_buckets:
            distance = events_from_newest(lengths, events)
            bucket = (torch.log2(distance.clamp_min(1).to(torch.float64)) + 1e-9).to(torch.int64) + 1
            bucket = torch.where(distance > 0, bucket, 0).clamp_max(config.position_buckets - 1)
            columns.append(bucket.to(torch.uint8))
        return columns

    def score_rows(self, query: Tensor, first: int) -> Tensor:
        """Add the recency bias to the queries: ``[B, m, heads, F]``, terms from feature ``first`` on."""
        if self.recency is None:
            return query
        start, size = self._recency_range
        before, after = first + start, query.shape[-1] - first - start - size
        return query + nn.functional.pad(self.recency, (before, after))

    def bias(self, lengths: Tensor, events: int) -> Tensor | None:
        """The ALiBi term ``[E, heads]`` float32, if it is on."""
        if not self.config.alibi:
            return None
        return -events_from_newest(lengths, events).to(torch.float32).unsqueeze(1) * self.slopes


def _present(name: str, values: Tensor | None, wanted: bool, events: int) -> bool:
    if wanted and values is None:
        raise SidError(
            name, "missing", "The configuration of the event terms asks for them: pass [events]."
        )
    if not wanted and values is not None:
        raise SidError(
            name,
            "given, but no event term uses them",
            "Set num_actions, age_boundaries or age_buckets in EventTermsConfig, or leave them out.",
        )
    if values is not None and tuple(values.shape) != (events,):
        raise SidError(name, f"shape {tuple(values.shape)}", f"Pass one per event: [{events}].")
    return wanted


def _numbers(name: str, values: Tensor, size: int) -> Tensor:
    """``[E]`` integers -> uint8, 255 where they are outside ``0 .. size - 1``."""
    if values.dtype.is_floating_point or values.dtype == torch.bool:
        raise SidError(name, f"dtype {values.dtype}", f"Pass integers 0 .. {size - 1}.")
    # Clamped first: 256 must not wrap around to 0.
    return torch.where(values < 0, _INVALID, values.clamp(max=_INVALID)).to(torch.uint8)


def events_from_newest(lengths: Tensor, events: int) -> Tensor:
    """``[E]`` int64: how many events of its history came after each event; 0 for the last."""
    ends = lengths.cumsum(0) - 1
    return torch.repeat_interleave(ends, lengths, output_size=events) - torch.arange(
        events, device=lengths.device
    )
