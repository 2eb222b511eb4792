"""Collections that take SIDs where TorchRec's take raw ids: a transform, then the stock collection.

They compose and never subclass: TorchRec's sharders match the stock classes by exact type and find
them at any depth, so that a model with one of these shards, pipelines, checkpoints and exports like
the model it was made from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
from torchrec.modules.embedding_modules import (
    EmbeddingBagCollection,
    EmbeddingCollection,
    get_embedding_names_by_table,
)
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from torchrec_sid.errors import SidError
from torchrec_sid.tables.catalog_map import Catalog, CatalogMap
from torchrec_sid.tables.combine import CombineBags, CombineEvents
from torchrec_sid.tables.configs import SidEmbeddingBagConfig, SidEmbeddingConfig
from torchrec_sid.tables.layout import plan_layout
from torchrec_sid.tables.transform import SidTransform

Catalogs = Catalog | CatalogMap | Mapping[str, Catalog | CatalogMap] | None
"""One catalog for every feature of SIDs, or one per feature; a feature without one carries packed SIDs.

Collections that are given the same :class:`~torchrec_sid.tables.catalog_map.CatalogMap` hold it once."""


class SidEmbeddingBagCollection(nn.Module):
    """``EmbeddingBagCollection`` over SIDs: KJT -> KeyedTensor, usable wherever the stock one is.

    The KJT carries one int64 per item: its packed SID (``SidSpec.pack``), or its raw id where there is a
    catalog. -1 is the unknown item: every SID table has one row for it.

    Args:
        tables: :class:`SidEmbeddingBagConfig` for features that carry SIDs and TorchRec's own
            ``EmbeddingBagConfig`` for features that keep raw ids, in the order of the output.
        is_weighted: the KJT carries one weight per value, as in TorchRec.
        device: where the tables live; may be meta.
        catalog: see :data:`Catalogs`.
        adapter: run on the batch first, for codes in other forms: ``PackFeatures``, ``PackValues``.
        output_order: keys of the result in the order they shall have; None: table by table, as in TorchRec.

    Raises:
        SidError: configurations that contradict each other; at forward, values that do not fit them.

    Example:
        >>> from torchrec_sid import HashedPrefix, SidEmbeddingBagConfig, SidSpec
        >>> spec = SidSpec((16, 16))
        >>> ebc = SidEmbeddingBagCollection(tables=[
        ...     SidEmbeddingBagConfig(name="t_item", embedding_dim=8, feature_names=["item", "history"],
        ...                           scheme=HashedPrefix(depth=2), spec=spec),
        ...     EmbeddingBagConfig(name="user", embedding_dim=8, num_embeddings=100)])
        >>> batch = KeyedJaggedTensor.from_lengths_sync(
        ...     keys=["item", "history", "user"], lengths=torch.tensor([1, 2, 1]),
        ...     values=torch.cat([spec.pack(torch.tensor([[1, 2], [3, 4], [5, 6]])), torch.tensor([7])]))
        >>> ebc(batch).keys(), ebc(batch).values().shape
        (['item', 'history', 'user'], torch.Size([1, 24]))
    """

    def __init__(
        self,
        tables: Sequence[SidEmbeddingBagConfig | EmbeddingBagConfig],
        is_weighted: bool = False,
        device: torch.device | None = None,
        catalog: Catalogs = None,
        adapter: nn.Module | None = None,
        output_order: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.adapter = adapter
        _check_kinds(tables, (SidEmbeddingBagConfig, EmbeddingBagConfig))
        catalogs = _per_feature(tables, catalog)
        layout = plan_layout(tables, catalogs, EmbeddingBagConfig, device, output_order)
        self._public = layout.public
        self._pooling_factors = layout.pooling_factors
        self._weighted = is_weighted
        self._device = device if device is not None else torch.device("cpu")
        self.transform = SidTransform(layout.routes, layout.specs, layout.maps, is_weighted)
        self.ebc = (
            EmbeddingBagCollection(layout.tables, is_weighted=is_weighted, device=device)
            if layout.tables
            else None
        )
        self.combine = None if layout.direct else CombineBags(layout.outputs, layout.sides, is_weighted)

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """KJT of SIDs and ids -> KeyedTensor ``[B, sum of D]``, keys as the stock collection names them."""
        if self.adapter is not None:
            features = self.adapter(features)
        rows = self.transform(features)
        pooled = self.ebc(rows) if self.ebc is not None else None
        return pooled if self.combine is None else self.combine(pooled, rows, features)

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """One per configured table, describing the output: features, dimension, rows of all its tables.

        The physical tables are ``self.ebc.embedding_bag_configs()``.
        """
        return self._public

    def is_weighted(self) -> bool:
        """Whether the KJT carries weights."""
        return self._weighted

    @property
    def device(self) -> torch.device:
        """Where the tables live."""
        return self._device

    def pooling_factors(self, items_per_bag: Mapping[str, float] | None = None) -> dict[str, list[float]]:
        """Rows that one example reads: physical table -> one figure per feature of it.

        It is what the planner's ``ParameterConstraints(pooling_factors=...)`` takes.

        Args:
            items_per_bag: feature -> mean items per bag, from the data; 1 where it is missing.
        """
        configs = self.ebc.embedding_bag_configs() if self.ebc is not None else []
        return _pooling_factors(configs, self._pooling_factors, items_per_bag)


class SidEmbeddingCollection(nn.Module):
    """``EmbeddingCollection`` over SIDs: KJT -> one embedding per event, the sum of the rows of its SID.

    Args:
        tables: :class:`SidEmbeddingConfig` and TorchRec's own ``EmbeddingConfig``, all of one dimension.
        device: where the tables live; may be meta.
        need_indices: return the looked-up rows as weights; only where one row is read per event.
        catalog: see :data:`Catalogs`.
        adapter: run on the batch first, for codes in other forms: ``PackFeatures``, ``PackValues``.
        output_order: keys of the result in the order they shall have; None: table by table, as in TorchRec.

    Raises:
        SidError: configurations that contradict each other; at forward, values that do not fit them.
    """

    def __init__(
        self,
        tables: Sequence[SidEmbeddingConfig | EmbeddingConfig],
        device: torch.device | None = None,
        need_indices: bool = False,
        catalog: Catalogs = None,
        adapter: nn.Module | None = None,
        output_order: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.adapter = adapter
        _check_kinds(tables, (SidEmbeddingConfig, EmbeddingConfig))
        catalogs = _per_feature(tables, catalog)
        layout = plan_layout(tables, catalogs, EmbeddingConfig, device, output_order)
        dims = {table.embedding_dim for table in layout.tables}
        if len(dims) > 1:
            raise SidError(
                "embedding_dim",
                f"tables of {sorted(dims)}",
                "TorchRec's EmbeddingCollection takes one dimension: use one collection for each.",
            )
        combine = not layout.direct or any(p.per_item != 1 for out in layout.outputs for p in out.parts)
        if need_indices and combine:
            raise SidError(
                "need_indices",
                "True, with a scheme of several rows per event",
                "Keep the packed SIDs of the batch.",
            )
        self._public = layout.public
        self._pooling_factors = layout.pooling_factors
        self._names_by_table = get_embedding_names_by_table(layout.public)
        self._need_indices = need_indices
        self._device = device if device is not None else torch.device("cpu")
        self.transform = SidTransform(layout.routes, layout.specs, layout.maps)
        self.ec = (
            EmbeddingCollection(layout.tables, device=device, need_indices=need_indices)
            if layout.tables
            else None
        )
        self.combine = CombineEvents(layout.outputs, layout.sides) if combine else None

    def forward(self, features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        """KJT of SIDs and ids -> feature -> JaggedTensor ``[events, D]`` with the lengths of the input."""
        if self.adapter is not None:
            features = self.adapter(features)
        rows = self.transform(features)
        looked_up = self.ec(rows) if self.ec is not None else None
        if self.combine is not None:
            looked_up = self.combine(looked_up, rows, features)
        return looked_up  # type: ignore[return-value]

    def embedding_configs(self) -> list[EmbeddingConfig]:
        """One per configured table, describing the output.

        The physical tables are ``self.ec.embedding_configs()``.
        """
        return self._public

    def need_indices(self) -> bool:
        """Whether the looked-up rows are returned as weights."""
        return self._need_indices

    def embedding_dim(self) -> int:
        """D of the output (of the widest, where schemes are concatenated)."""
        return max(config.embedding_dim for config in self._public)

    def embedding_names_by_table(self) -> list[list[str]]:
        """Output keys, one list per configured table."""
        return self._names_by_table

    @property
    def device(self) -> torch.device:
        """Where the tables live."""
        return self._device

    def pooling_factors(self, items_per_bag: Mapping[str, float] | None = None) -> dict[str, list[float]]:
        """As :meth:`SidEmbeddingBagCollection.pooling_factors`, with events for items."""
        configs = self.ec.embedding_configs() if self.ec is not None else []
        return _pooling_factors(configs, self._pooling_factors, items_per_bag)


def _per_feature(
    tables: Sequence[SidEmbeddingConfig | EmbeddingConfig], catalog: Catalogs
) -> dict[str, Catalog | CatalogMap]:
    if catalog is None:
        return {}
    if isinstance(catalog, Mapping):
        return dict(catalog)
    sid_tables = [table for table in tables if isinstance(table, SidEmbeddingConfig)]
    return {feature: catalog for table in sid_tables for feature in table.feature_names or ()}


def _check_kinds(tables: Sequence[object], kinds: tuple[type, type]) -> None:
    for table in tables:
        if not isinstance(table, kinds):
            raise SidError(
                f"table {getattr(table, 'name', table)!r}",
                f"a {type(table).__name__}",
                f"This collection takes {kinds[0].__name__} and {kinds[1].__name__}.",
            )


def _pooling_factors(
    configs: Sequence[EmbeddingConfig], per_item: Mapping[str, float], items: Mapping[str, float] | None
) -> dict[str, list[float]]:
    result = {}
    for config in configs:
        features = [key.split(":")[0] for key in config.feature_names]
        result[config.name] = [per_item[config.name] * (items or {}).get(name, 1.0) for name in features]
    return result
