"""`ItemEmbedder`: a vector for the candidate and one for every event of the history."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from torch import Tensor, nn
from torchrec import JaggedTensor, KeyedJaggedTensor

from torchrec_sid.side.features import SideFeatures


class Embedder(nn.Module):
    """What turns a candidate and the events of its history into vectors."""

    def target(self, features: KeyedJaggedTensor, rows: Mapping[str, Tensor]) -> Tensor:
        """The candidate, ``[B, D]``."""
        raise NotImplementedError

    def events(self, features: KeyedJaggedTensor, rows: Mapping[str, Tensor]) -> Tensor:
        """All events, one user's after the other, ``[events, D]``."""
        raise NotImplementedError


class ItemEmbedder(Embedder):
    """Two collections with the interface of TorchRec's: one pools the candidate, one embeds the history.

    Args:
        candidate: KeyedJaggedTensor -> KeyedTensor ``[B, D]`` of one feature.
        history: KeyedJaggedTensor -> ``{history_feature: JaggedTensor}``, values ``[events, D]``.
        history_feature: key of the history.
    """

    def __init__(self, candidate: nn.Module, history: nn.Module | None, history_feature: str) -> None:
        super().__init__()
        self.candidate = candidate
        self.history = history
        self.history_feature = history_feature

    def target(self, features: KeyedJaggedTensor, rows: Mapping[str, Tensor]) -> Tensor:
        """The candidate, ``[B, D]``."""
        return self.candidate(features).values()

    def events(self, features: KeyedJaggedTensor, rows: Mapping[str, Tensor]) -> Tensor:
        """All events, one user's after the other, ``[events, D]``."""
        assert self.history is not None
        embedded: JaggedTensor = self.history(features)[self.history_feature]
        return embedded.values()


class SideEmbedder(Embedder):
    """A linear map of SIDE features, for encoders that need a vector per event. No table.

    Args:
        features: packed SIDs -> ``[n, F]``.
        projection: ``F -> D``, shared by candidate and history.
    """

    def __init__(self, features: SideFeatures, projection: nn.Linear) -> None:
        super().__init__()
        self.features = features
        self.projection = projection

    def forward(self, sids: Tensor) -> Tensor:
        """Packed SIDs ``[n, nbytes]`` uint8 -> ``[n, D]``."""
        return self.projection(self.features(sids))

    # Through forward: TorchRec's tracer takes this module for a leaf, and would look into its parts.
    def target(self, features: KeyedJaggedTensor, rows: Mapping[str, Tensor]) -> Tensor:
        """The candidate, ``[B, D]``."""
        return self(rows["item_bytes"])

    def events(self, features: KeyedJaggedTensor, rows: Mapping[str, Tensor]) -> Tensor:
        """All events, ``[events, D]``."""
        return self(rows["history_bytes"])


class SumOfEmbedders(Embedder):
    """Several embedders of the same width as one: their vectors are added.

    Args:
        parts: at least one.
    """

    def __init__(self, parts: Sequence[Embedder]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def target(self, features: KeyedJaggedTensor, rows: Mapping[str, Tensor]) -> Tensor:
        """The candidate, ``[B, D]``."""
        vectors = [part.target(features, rows) for part in self._parts()]
        return sum(vectors[1:], vectors[0])

    def events(self, features: KeyedJaggedTensor, rows: Mapping[str, Tensor]) -> Tensor:
        """All events, ``[events, D]``."""
        vectors = [part.events(features, rows) for part in self._parts()]
        return sum(vectors[1:], vectors[0])

    def _parts(self) -> list[Embedder]:
        return [cast(Embedder, part) for part in self.parts]
