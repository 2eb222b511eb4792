"""Features beside the item's id: rows of tables, numbers and vectors of the example and of its events."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchrec import (
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    EmbeddingCollection,
    EmbeddingConfig,
    KeyedJaggedTensor,
    PoolingType,
)

from torchrec_sid.errors import SidError
from torchrec_sid.models.attend import ChannelOutput, ItemChannel
from torchrec_sid.models.embedder import Embedder


@dataclass(frozen=True)
class TableInput:
    """A feature that looks rows up: one value of an example, several, or one of each event."""

    key: str
    """Its name in a batch."""
    table: str
    """Table; features that name the same one share its rows."""
    rows: int
    """Of the table."""
    dim: int
    """Width of a row."""


@dataclass(frozen=True)
class VectorInput:
    """A feature that is a vector, or one number, in ``rows`` of a batch."""

    key: str
    """Its name in a batch."""
    width: int
    """Numbers per example or event."""


class FeatureInputs(NamedTuple):
    """The features of a log, as a model reads them."""

    tables: tuple[TableInput, ...] = ()
    """Of the context, the user and the item."""
    vectors: tuple[VectorInput, ...] = ()
    """Likewise."""
    event_tables: tuple[TableInput, ...] = ()
    """Of each event of the history."""
    event_vectors: tuple[VectorInput, ...] = ()
    """Likewise."""

    @property
    def keys(self) -> tuple[str, ...]:
        """Batch fields, in order."""
        return tuple(part.key for group in self for part in group)


class FeatureFields(ItemChannel):
    """Features of the example, each as a field of the interaction. Values of one feature are averaged.

    Args:
        tables: features that look rows up.
        vectors: features that are vectors.
        dim: D, width of a field; rows and vectors of another width are projected.
        init_scale: table rows start uniform in +- this.
        device: where the parameters live.
    """

    def __init__(
        self,
        tables: Iterable[TableInput],
        vectors: Iterable[VectorInput],
        dim: int,
        init_scale: float,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(0)
        self.tables, self.vectors = tuple(tables), tuple(vectors)
        self.fields = len(self.tables) + len(self.vectors)
        configs = [
            EmbeddingBagConfig(
                name=f"t_feature_{name}",
                num_embeddings=parts[0].rows,
                embedding_dim=parts[0].dim,
                feature_names=[part.key for part in parts],
                pooling=PoolingType.MEAN,
                init_fn=partial(nn.init.uniform_, a=-init_scale, b=init_scale),
            )
            for name, parts in _by_table(self.tables).items()
        ]
        self.bags = EmbeddingBagCollection(tables=configs, device=device) if configs else None
        self.projections = _projections([*self.tables, *self.vectors], dim, device)

    def forward(self, features: KeyedJaggedTensor, rows: Mapping[str, Tensor]) -> ChannelOutput:
        """``[B, n, D]``: tables first."""
        fields = []
        if self.bags is not None:
            pooled = self.bags(features)
            fields = [self._field(part.key, pooled[part.key]) for part in self.tables]
        fields += [self._field(part.key, rows[part.key]) for part in self.vectors]
        return ChannelOutput(torch.stack(fields, dim=1))

    def _field(self, key: str, values: Tensor) -> Tensor:
        name = f"of_{key}"
        return self.projections[name](values) if name in self.projections else values


class EventFeatures(Embedder):
    """Features of the events of a history, added up; the candidate is a learned vector.

    Args:
        tables: features that look a row up for each event.
        vectors: features that are vectors or numbers.
        dim: D.
        init_scale: table rows start uniform in +- this.
        device: where the parameters live.
    """

    def __init__(
        self,
        tables: Iterable[TableInput],
        vectors: Iterable[VectorInput],
        dim: int,
        init_scale: float,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.tables, self.vectors = tuple(tables), tuple(vectors)
        groups = _by_table(self.tables)
        widths = {part.dim for part in self.tables}
        if len(widths) > 1:
            raise SidError(
                "features of the history", f"tables of widths {sorted(widths)}", "Give them one dim."
            )
        configs = [
            EmbeddingConfig(
                name=f"t_history_feature_{name}",
                num_embeddings=parts[0].rows,
                embedding_dim=parts[0].dim,
                feature_names=[part.key for part in parts],
                init_fn=partial(nn.init.uniform_, a=-init_scale, b=init_scale),
            )
            for name, parts in groups.items()
        ]
        self.sequences = EmbeddingCollection(tables=configs, device=device) if configs else None
        self.projections = _projections([*self.tables, *self.vectors], dim, device)
        self.candidate = nn.Parameter(torch.zeros(dim, device=device))

    def target(self, features: KeyedJaggedTensor, rows: Mapping[str, Tensor]) -> Tensor:
        """``[B, D]``."""
        return self.candidate.expand(features["history_action"].lengths().shape[0], -1)

    def events(self, features: KeyedJaggedTensor, rows: Mapping[str, Tensor]) -> Tensor:
        """``[events, D]``."""
        parts = []
        if self.sequences is not None:
            embedded = self.sequences(features)
            parts = [self._part(part.key, embedded[part.key].values()) for part in self.tables]
        parts += [self._part(part.key, rows[part.key]) for part in self.vectors]
        return torch.stack(parts).sum(dim=0)

    def _part(self, key: str, values: Tensor) -> Tensor:
        name = f"of_{key}"
        return self.projections[name](values) if name in self.projections else values


def _by_table(parts: Iterable[TableInput]) -> dict[str, list[TableInput]]:
    groups: dict[str, list[TableInput]] = {}
    for part in parts:
        first = groups.setdefault(part.table, [])
        if first and (first[0].rows, first[0].dim) != (part.rows, part.dim):
            raise SidError(
                f"table {part.table!r}",
                f"{first[0].rows} x {first[0].dim} and, for {part.key}, {part.rows} x {part.dim}",
                "Features of one table have the same rows and dim.",
            )
        first.append(part)
    return groups


def _projections(
    parts: Iterable[TableInput | VectorInput], dim: int, device: torch.device | None
) -> nn.ModuleDict:
    layers = {}
    for part in parts:
        width = part.dim if isinstance(part, TableInput) else part.width
        if width != dim or isinstance(part, VectorInput):
            layers[f"of_{part.key}"] = nn.Linear(width, dim, device=device)
    return nn.ModuleDict(layers)
