"""Collections that take SIDs where TorchRec's take raw ids: a transform, then the stock collection.

They compose and never subclass: TorchRec's sharders match the stock classes by exact type and find
them at any depth, so that a model with one of these shards, pipelines, checkpoints and exports like
the model it was made from.
"""

# Annotations stay objects here: torch.fx writes those of a traced forward into its code.
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
from torchrec.modules.embedding_modules import (
    EmbeddingBagCollection,
    EmbeddingBagCollectionInterface,
    EmbeddingCollection,
    EmbeddingCollectionInterface,
    get_embedding_names_by_table,
)
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from torchrec_sid.errors import SidError
from torchrec_sid.tables import SidEmbeddingBagConfig, SidEmbeddingConfig, SidTableConfig
from torchrec_sid.tables.catalog_map import Catalog, CatalogMap
from torchrec_sid.tables.combine import CombineBags, CombineEvents
from torchrec_sid.tables.layout import Layout, plan_layout
from torchrec_sid.tables.transform import BagTransform, EventTransform

Catalogs = Catalog | CatalogMap | Mapping[str, Catalog | CatalogMap] | None
"""One catalog for every feature of SIDs, or one per feature; a feature without one carries packed SIDs.

Collections that are given the same :class:`~torchrec_sid.tables.catalog_map.CatalogMap` hold it once."""


class SidCollection(nn.Module):
    """What both collections know of themselves: configurations, catalogs, and what is read of tables."""

    __jit_unused_properties__ = ("stock", "device", "input_features", "embedding_bags", "embeddings")

    def _lay_out(
        self,
        tables: Sequence[Any],
        kinds: tuple[type[SidTableConfig], type[Any]],
        catalog: Catalogs,
        device: torch.device | None,
        order: Sequence[str] | None,
        aliases: Mapping[str, str] | None,
    ) -> Layout:
        """Decide on physical tables, and keep what is asked for later."""
        _check_kinds(tables, kinds)
        layout = plan_layout(tables, _per_feature(tables, catalog), kinds[1], device, order, aliases)
        self.tables: tuple[Any, ...] = tuple(tables)
        """As configured."""
        self.aliases = dict(aliases or {})
        """Configured table -> the name it bears outside."""
        self.output_names = [out.name for out in layout.outputs]
        """Keys of the result, in order."""
        self.catalog_maps = dict(layout.maps)
        """Feature -> its catalog, for the features that carry raw ids of items."""
        self.raw_tables = tuple(layout.raw_tables)
        """Tables that are as TorchRec's own configuration says."""
        self.table_keys = _table_keys(layout)
        """Physical table -> key of its weight in the state dict."""
        self.former_names = _former_names(layout)
        """Key of a weight in the state dict -> its key before the collection took the stock one's place."""
        self.register_load_state_dict_pre_hook(partial(_rename, self.former_names))
        self.reads = dict(layout.reads)
        """Physical table -> what is read of it."""
        self._public, self._start_device = layout.public, layout.device
        return layout

    @property
    def stock(self) -> list[Any]:
        """TorchRec's collections inside, which hold the physical tables."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where the tables live now."""
        for tensor in (*self.parameters(), *self.buffers()):
            return tensor.device
        return self._start_device

    @property
    def input_features(self) -> set[str]:
        """Features of the batch that it reads."""
        return {name for config in self._public for name in config.feature_names}

    def pooling_factors(self, items_per_bag: Mapping[str, float] | None = None) -> dict[str, list[float]]:
        """Rows that one bag reads: physical table -> one figure per key of it.

        It is what the planner's ``ParameterConstraints(pooling_factors=...)`` takes. Where the bags of a
        table are events, it is the rows of one event.

        Args:
            items_per_bag: feature -> mean items per example, from the data; 1 where it is missing.
        """
        items = items_per_bag or {}
        return {
            table: [reads.rows_per_item]
            if reads.events
            else [reads.rows_per_item * items.get(name, 1.0) for name in reads.features]
            for table, reads in self.reads.items()
        }

    def num_poolings(self, items_per_bag: Mapping[str, float] | None = None) -> dict[str, list[float]]:
        """Bags of one example, for the tables whose bags are events: physical table -> one figure.

        It is what the planner's ``ParameterConstraints(num_poolings=...)`` takes.

        Args:
            items_per_bag: feature -> mean events per example, from the data; 1 where it is missing.
        """
        items = items_per_bag or {}
        return {
            table: [sum(items.get(name, 1.0) for name in reads.features)]
            for table, reads in self.reads.items()
            if reads.events
        }


class SidEmbeddingBagCollection(SidCollection, EmbeddingBagCollectionInterface):
    """``EmbeddingBagCollection`` over SIDs: KJT -> KeyedTensor, usable wherever the stock one is.

    The KJT carries one int64 per item: its packed SID (``SidSpec.pack``), or its raw id where there is a
    catalog. -1 is the unknown item: every SID table has one row for it.

    Args:
        tables: :class:`SidEmbeddingBagConfig` for features that carry SIDs and TorchRec's own
            ``EmbeddingBagConfig`` for features that keep raw ids, in the order of the output.
        is_weighted: the KJT carries one weight per value, as in TorchRec.
        device: where the tables live; may be meta.
        catalog: see :data:`Catalogs`.
        output_order: keys of the result in the order they shall have; None: table by table, as in TorchRec.
        aliases: configured table -> the name that its outputs and its public configuration bear.

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
        output_order: Sequence[str] | None = None,
        aliases: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        kinds = (SidEmbeddingBagConfig, EmbeddingBagConfig)
        layout = self._lay_out(tables, kinds, catalog, device, output_order, aliases)
        self._weighted = is_weighted
        # Without a table of SIDs it is the stock collection, of which no batch is asked more.
        stock = not layout.specs and output_order is None
        own = BagTransform(layout.routes, layout.specs, layout.maps, is_weighted)
        self.transform = None if stock else own
        self.ebc = (
            EmbeddingBagCollection(
                layout.public if stock else layout.tables, is_weighted=is_weighted, device=device
            )
            if layout.tables or not tables
            else None
        )
        combine = CombineBags(layout.outputs, layout.vectors, is_weighted)
        self.combine = None if stock or layout.direct else combine

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """KJT of SIDs and ids -> KeyedTensor ``[B, sum of D]``, keys as the stock collection names them."""
        rows = features if self.transform is None else self.transform(features)
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
    def stock(self) -> list[Any]:
        """The EmbeddingBagCollection inside, if there is a table."""
        return [] if self.ebc is None else [self.ebc]

    @property
    def embedding_bags(self) -> nn.ModuleDict:
        """The physical tables by name, as the stock collection holds them."""
        return nn.ModuleDict() if self.ebc is None else self.ebc.embedding_bags

    def reset_parameters(self) -> None:
        """Draw the tables anew, each by the ``init_fn`` of its configuration."""
        for collection in self.stock:
            collection.reset_parameters()


class SidEmbeddingCollection(SidCollection, EmbeddingCollectionInterface):
    """``EmbeddingCollection`` over SIDs: KJT -> one embedding per event, the sum of the rows of its SID.

    An event of one row is looked up by TorchRec's ``EmbeddingCollection``. An event of several is a bag of
    an ``EmbeddingBagCollection`` over events: its rows are summed where they are, and in a sharded model
    one vector travels in the place of several.

    Args:
        tables: :class:`SidEmbeddingConfig` and TorchRec's own ``EmbeddingConfig``, all of one dimension.
        device: where the tables live; may be meta.
        need_indices: return the looked-up rows as weights; only where one row is read per event.
        use_gather_select: as in TorchRec, for the tables of one row an event.
        use_gather_select_per_sharding: as in TorchRec.
        catalog: see :data:`Catalogs`.
        output_order: keys of the result in the order they shall have; None: table by table, as in TorchRec.
        aliases: configured table -> the name that its outputs and its public configuration bear.

    Raises:
        SidError: configurations that contradict each other; at forward, values that do not fit them.
    """

    def __init__(
        self,
        tables: Sequence[SidEmbeddingConfig | EmbeddingConfig],
        device: torch.device | None = None,
        need_indices: bool = False,
        use_gather_select: bool = False,
        use_gather_select_per_sharding: dict[str, bool] | None = None,
        catalog: Catalogs = None,
        output_order: Sequence[str] | None = None,
        aliases: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        layout = self._lay_out(
            tables, (SidEmbeddingConfig, EmbeddingConfig), catalog, device, output_order, aliases
        )
        groups = layout.event_groups
        _check_events(layout, need_indices)
        self._names_by_table = get_embedding_names_by_table(layout.public)
        self._need_indices = need_indices
        stock = not layout.specs and output_order is None
        own = EventTransform(layout.routes, layout.specs, layout.maps, groups)
        self.transform = None if stock else own
        self.ec = (
            EmbeddingCollection(
                layout.public if stock else layout.tables,
                device=device,
                need_indices=need_indices,
                use_gather_select=use_gather_select,
                use_gather_select_per_sharding=use_gather_select_per_sharding,
            )
            if layout.tables or not tables
            else None
        )
        pooled = layout.event_tables.values()
        self.event_bags = nn.ModuleList(EmbeddingBagCollection(group, device=device) for group in pooled)
        # Where every event is a bag, the transform gives no rows of single-row tables.
        self._single = bool(layout.tables or layout.vectors or not tables)
        self._gather = (use_gather_select, use_gather_select_per_sharding)
        combine = CombineEvents(layout.outputs, layout.vectors, groups, need_indices)
        direct = layout.direct and all(out.is_row for out in layout.outputs)
        self.combine = None if stock or direct else combine

    def forward(self, features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        """KJT of SIDs and ids -> feature -> JaggedTensor ``[events, D]`` with the lengths of the input."""
        if self.transform is None:
            return self.ec(features)  # type: ignore[misc]
        rows = self.transform(features)
        looked_up = self.ec(rows[0]) if self.ec is not None and self._single else None
        first = 1 if self._single else 0
        pooled = [bags(rows[first + i]) for i, bags in enumerate(self.event_bags)]
        if self.combine is not None:
            looked_up = self.combine(looked_up, pooled, rows, features)
        return looked_up  # type: ignore[return-value]

    def embedding_configs(self) -> list[EmbeddingConfig]:
        """One per configured table, describing the output.

        The physical tables are ``self.ec.embedding_configs()`` and those of ``self.event_bags``.
        """
        return self._public

    def need_indices(self) -> bool:
        """Whether the looked-up rows are returned as weights."""
        return self._need_indices

    def embedding_dim(self) -> int:
        """D of the output (of the widest, where schemes are concatenated); -1 without a table."""
        return max((config.embedding_dim for config in self._public), default=-1)

    def embedding_names_by_table(self) -> list[list[str]]:
        """Output keys, one list per configured table."""
        return self._names_by_table

    def use_gather_select(self) -> bool:
        """As in TorchRec."""
        return self._gather[0]

    def use_gather_select_per_sharding(self) -> dict[str, bool] | None:
        """As in TorchRec."""
        return self._gather[1]

    @property
    def stock(self) -> list[Any]:
        """The EmbeddingCollection of single rows, if there is one, and the collections of event bags."""
        return [*([] if self.ec is None else [self.ec]), *self.event_bags]

    @property
    def embeddings(self) -> nn.ModuleDict:
        """The physical tables by name, in the order of their configurations."""
        found: dict[str, nn.Module] = {} if self.ec is None else dict(self.ec.embeddings.items())
        for bags in self.event_bags:
            found.update(cast(Any, bags).embedding_bags.items())
        return nn.ModuleDict({name: found[name] for name in self.reads})

    def reset_parameters(self) -> None:
        """Draw the tables anew, each by the ``init_fn`` of its configuration."""
        for collection in self.stock:
            collection.reset_parameters()


def _check_events(layout: Layout, need_indices: bool) -> None:
    """Refuse what an EmbeddingCollection cannot give."""
    dims = {
        t.embedding_dim for t in (*layout.tables, *(t for g in layout.event_tables.values() for t in g))
    }
    if len(dims) > 1:
        raise SidError(
            "embedding_dim",
            f"tables of {sorted(dims)}",
            "TorchRec's EmbeddingCollection takes one dimension: use one collection for each.",
        )
    wide = [out.feature for out in layout.outputs if not out.is_row]
    if need_indices and wide:
        raise SidError(
            "need_indices",
            f"True, and an event of feature {wide[0]!r} is more than one row of one table",
            "Keep the packed SIDs of the batch, or give the feature a collection of its own.",
        )


def _per_feature(
    tables: Sequence[SidTableConfig | EmbeddingConfig], catalog: Catalogs
) -> dict[str, Catalog | CatalogMap]:
    if catalog is None:
        return {}
    if isinstance(catalog, Mapping):
        return dict(catalog)
    sid_tables = [table for table in tables if isinstance(table, SidTableConfig)]
    return {feature: catalog for table in sid_tables for feature in table.feature_names or ()}


def _check_kinds(tables: Sequence[object], kinds: tuple[type, type]) -> None:
    for table in tables:
        if not isinstance(table, kinds):
            raise SidError(
                f"table {getattr(table, 'name', table)!r}",
                f"a {type(table).__name__}",
                f"This collection takes {kinds[0].__name__} and {kinds[1].__name__}.",
            )


def _table_keys(layout: Layout) -> dict[str, str]:
    """Physical table -> key of its weight."""
    bags = layout.physical is EmbeddingBagConfig
    inside = "ebc.embedding_bags" if bags else "ec.embeddings"
    keys = {table.name: f"{inside}.{table.name}.weight" for table in layout.tables}
    for number, group in enumerate(layout.event_tables.values()):
        holder = f"event_bags.{number}.embedding_bags"
        keys |= {table.name: f"{holder}.{table.name}.weight" for table in group}
    return keys


def _former_names(layout: Layout) -> dict[str, str]:
    """Tables as the stock collection named them, and as this one did before events were bags.

    Tables of SIDs are not those of the stock collection that bore their names: they have none there.
    """
    stock = "embedding_bags" if layout.physical is EmbeddingBagConfig else "embeddings"
    events = {table.name for group in layout.event_tables.values() for table in group}
    names = {}
    for table, key in _table_keys(layout).items():
        if table in layout.raw_tables:
            names[key] = f"{stock}.{table}.weight"
        elif table in events:
            names[key] = f"ec.embeddings.{table}.weight"
    return names


def _rename(
    names: Mapping[str, str], module: nn.Module, state: dict[str, Any], prefix: str, *rest: object
) -> None:
    for new, old in names.items():
        if prefix + old in state and prefix + new not in state:
            state[prefix + new] = state.pop(prefix + old)
