"""A collection taken apart and put together again over SIDs, with everything of it that can be kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.optim.apply_optimizer_in_backward import _apply_optimizer_in_backward
from torchrec.modules.embedding_configs import BaseEmbeddingConfig, DataType, dtype_to_data_type
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from torchrec_sid.collections import SidCollection, SidEmbeddingBagCollection, SidEmbeddingCollection
from torchrec_sid.replace_init import init_to_keep
from torchrec_sid.spec import SidSpec
from torchrec_sid.tables import SidEmbeddingBagConfig, SidEmbeddingConfig, SidTableConfig
from torchrec_sid.tables.catalog_map import CatalogMap
from torchrec_sid.tables.scheme_registry import Scheme

FeatureSchemes = Mapping[str, Scheme | Sequence[Scheme]]
"""Feature -> how its items are embedded from now on."""

_KEPT_FIELDS = {"name", "embedding_dim", "num_embeddings", "feature_names", "data_type", "init_fn"}
_KEPT_FIELDS |= {"weight_init_min", "weight_init_max", "pooling"}
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_STATE_HOOKS = ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks")


class NewTable(NamedTuple):
    """A configured table of SIDs, and the table of ids in whose place it stands."""

    config: SidTableConfig
    old: str


@dataclass
class Rebuilt:
    """A new collection. Its tables are on meta until :func:`fill` is called."""

    old: Any
    new: Any
    made: list[NewTable]
    notes: list[str] = field(default_factory=list)

    @property
    def origins(self) -> dict[str, str]:
        """New physical table -> old physical table in whose place it stands."""
        old = {table.config.name: table.old for table in self.made}
        return {name: old[reads.table] for name, reads in self.new.reads.items() if reads.table in old}


def is_bags(collection: Any) -> bool:
    """Whether it pools."""
    return isinstance(collection, (EmbeddingBagCollection, SidEmbeddingBagCollection))


def configured(collection: Any) -> list[Any]:
    """Its tables as they were configured, TorchRec's or of SIDs."""
    if isinstance(collection, SidCollection):
        return list(collection.tables)
    return list(
        collection.embedding_bag_configs() if is_bags(collection) else collection.embedding_configs()
    )


def raw_features(collection: Any) -> set[str]:
    """Features whose tables are TorchRec's own."""
    raw = [config for config in configured(collection) if not isinstance(config, SidTableConfig)]
    return {name for config in raw for name in config.feature_names}


def stock_collections(collection: Any) -> list[Any]:
    """The collections that hold its physical tables."""
    return collection.stock if isinstance(collection, SidCollection) else [collection]


def physical_tables(collection: Any) -> dict[str, Any]:
    """Its physical tables, modules with a weight, by name."""
    return {name: t for stock in stock_collections(collection) for name, t in _holder(stock).items()}


def physical_configs(collection: Any) -> dict[str, BaseEmbeddingConfig]:
    """Their configurations."""
    return {c.name: c for stock in stock_collections(collection) for c in configured(stock)}


def rebuild(
    collection: Any, features: FeatureSchemes, maps: Mapping[str, CatalogMap], spec: SidSpec | None
) -> Rebuilt:
    """A SID collection that returns what ``collection`` returns, its tables still on meta.

    Args:
        collection: stock, or one of ours.
        features: what to replace in it.
        maps: feature -> catalog, for those of ``features`` that carry raw ids.
        spec: shape of the SIDs of the others.

    Raises:
        SidError: a scheme that does not fit.
    """
    ours = isinstance(collection, SidCollection)
    split = _Split(collection, features, spec)
    tables = [table for config in configured(collection) for table in split.tables(config)]
    replaced = raw_features(collection) & set(features)
    catalogs = (dict(collection.catalog_maps) if ours else {}) | {f: maps[f] for f in replaced if f in maps}
    options: dict[str, Any] = {
        "device": torch.device("meta"),
        "catalog": catalogs,
        "output_order": collection.output_names if ours else _output_names(collection),
        "aliases": (collection.aliases if ours else {}) | split.aliases,
    }
    new: SidCollection
    if is_bags(collection):
        new = SidEmbeddingBagCollection(tables, is_weighted=collection.is_weighted(), **options)
    else:
        new = SidEmbeddingCollection(
            tables,
            need_indices=collection.need_indices(),
            use_gather_select=collection.use_gather_select(),
            use_gather_select_per_sharding=collection.use_gather_select_per_sharding(),
            **options,
        )
    built = Rebuilt(collection, new, split.made, split.notes)
    built.notes += _table_notes(built)
    return built


@torch.no_grad()
def fill(built: Rebuilt) -> None:
    """Give the new collection its tables: those that stay, and fresh ones in the place of those that go."""
    old, new = built.old, built.new
    kept, configs, origins = physical_tables(old), physical_configs(new), built.origins
    like = next(iter(kept.values())).weight
    for stock in stock_collections(new):
        tables = _holder(stock)
        for name in list(tables):
            if name in origins:
                _make_table(tables[name], kept[origins[name]].weight, configs[name])
            else:
                tables[name] = kept[name]
            # What the tables are made of now, not what they were once configured as.
            configs[name].data_type = _data_type(_weight(tables[name]).dtype, configs[name].data_type)
        stock._device = like.device
    if new.transform is not None:
        new.transform.to("cpu" if like.is_meta else like.device)
    if new.combine is not None:
        _keep_vectors(old, new.combine, like)
    new.train(old.training)
    for hooks in _HOOKS:
        # The very dictionary: handles that remove a hook go on working.
        setattr(new, hooks, getattr(old, hooks))
    new._is_full_backward_hook = old._is_full_backward_hook
    for name in set(vars(old)) - set(vars(new)) - set(vars(_empty(old))):
        vars(new)[name] = vars(old)[name]


class _Split:
    """Takes configured tables apart."""

    def __init__(self, collection: Any, features: FeatureSchemes, spec: SidSpec | None) -> None:
        self._features, self._spec = features, spec
        self._bags = is_bags(collection)
        self._outside = dict(collection.aliases) if isinstance(collection, SidCollection) else {}
        names = [name for config in configured(collection) for name in config.feature_names]
        self._shared = {name for name in names if names.count(name) > 1}
        self._taken = {c.name for c in configured(collection)} | set(physical_tables(collection))
        self.made: list[NewTable] = []
        self.aliases: dict[str, str] = {}
        self.notes: list[str] = []

    def tables(self, config: Any) -> list[Any]:
        """One table as what stays of it, and one of SIDs for each way to embed its replaced features."""
        if isinstance(config, SidTableConfig):
            return [config]
        stay = [name for name in config.feature_names if name not in self._features]
        groups: list[tuple[tuple[Scheme, ...], list[str]]] = []
        for name in config.feature_names:
            if name in self._features:
                schemes = as_schemes(self._features[name])
                same = next((names for other, names in groups if other == schemes), None)
                if same is None:
                    groups.append((schemes, [name]))
                else:
                    same.append(name)
        if not groups:
            return [config]
        if len(stay) == 0 and len(groups) == 1:
            names_of = [config.name]
        else:
            numbers = [""] if len(groups) == 1 else [str(i + 1) for i in range(len(groups))]
            names_of = [self._new_name(f"{config.name}_sid{number}") for number in numbers]
        made = [
            self._sid_table(config, name, schemes, features)
            for name, (schemes, features) in zip(names_of, groups, strict=True)
        ]
        return ([replace(config, feature_names=stay)] if stay else []) + made

    def _new_name(self, wanted: str) -> str:
        name, number = wanted, 1
        while name in self._taken:
            number += 1
            name = f"{wanted}_{number}"
        self._taken.add(name)
        return name

    def _sid_table(
        self, config: Any, name: str, schemes: tuple[Scheme, ...], features: list[str]
    ) -> SidTableConfig:
        init, note = init_to_keep(config)
        if note is not None and note not in self.notes:
            self.notes.append(note)
        options: dict[str, Any] = {
            "name": name,
            "embedding_dim": config.embedding_dim,
            "feature_names": features,
            "scheme": schemes,
            "spec": self._spec,
            "data_type": config.data_type,
            "init_fn": init,
            "weight_init_min": config.weight_init_min,
            "weight_init_max": config.weight_init_max,
        }
        outside = self._outside.get(config.name, config.name)
        if name != outside and self._shared & set(features):
            self.aliases[name] = outside
        new = (
            SidEmbeddingBagConfig(pooling=config.pooling, **options)
            if self._bags
            else SidEmbeddingConfig(**options)
        )
        self.made.append(NewTable(new, config.name))
        return new


def as_schemes(scheme: Scheme | Sequence[Scheme]) -> tuple[Scheme, ...]:
    """One scheme or several, as a tuple."""
    return tuple(scheme) if isinstance(scheme, Sequence) else (scheme,)


def _holder(stock: Any) -> nn.ModuleDict:
    tables: nn.ModuleDict = stock.embedding_bags if is_bags(stock) else stock.embeddings
    return tables


def _output_names(collection: Any) -> list[str]:
    if is_bags(collection):
        return list(collection._embedding_names)
    return [name for names in collection.embedding_names_by_table() for name in names]


def _empty(collection: Any) -> Any:
    """A stock collection without tables: what every one has."""
    bags = is_bags(collection)
    return EmbeddingBagCollection(tables=[]) if bags else EmbeddingCollection(tables=[])


def _make_table(table: Any, like: nn.Parameter, config: BaseEmbeddingConfig) -> None:
    """Fresh rows where the old ones are, of their type, as trainable as they, with their optimizers."""
    weight = torch.empty(table.weight.shape, device=like.device, dtype=like.dtype)
    table.weight = nn.Parameter(weight, requires_grad=like.requires_grad)
    if not like.is_meta:
        assert config.init_fn is not None
        config.init_fn(table.weight)
    classes, arguments = getattr(like, "_optimizer_classes", []), getattr(like, "_optimizer_kwargs", [])
    with torch.enable_grad():
        for kind, options in zip(classes, arguments, strict=True):
            _apply_optimizer_in_backward(kind, [table.weight], dict(options))


def _data_type(dtype: torch.dtype, configured_as: DataType) -> DataType:
    return dtype_to_data_type(dtype) if dtype.is_floating_point else configured_as


def _keep_vectors(old: Any, combine: Any, like: nn.Parameter) -> None:
    """Vectors without a table: those of the old collection, or fresh parameters."""
    ours = isinstance(old, SidCollection) and old.combine is not None
    known = old.combine.vectors_by_name if ours else {}
    for place, name in enumerate(combine.vector_names):
        if name in known:
            combine.sides[place] = known[name]
            continue
        side = combine.sides[place]
        if like.is_meta:
            continue
        for module in side.modules():
            if any(p.is_meta for p in module.parameters(recurse=False)):
                module.to_empty(device=like.device, recurse=False)
                module.reset_parameters()
        side.to(like.device)


def _table_notes(built: Rebuilt) -> list[str]:
    """What of the tables that go, and of the collection, is not as it was."""
    notes: list[str] = []
    tables = physical_tables(built.old)
    configs = {config.name: config for config in configured(built.old)}
    for name in dict.fromkeys(table.old for table in built.made):
        config, table = configs[name], tables[name]
        for item in fields(config):
            value = getattr(config, item.name)
            if item.name not in _KEPT_FIELDS and value != item.default:
                notes.append(
                    f"{name}: {item.name}={value!r} is not kept: rows of SIDs are not rows of ids."
                )
        if not table.weight.requires_grad:
            notes.append(
                f"{name} is frozen: so are the fresh rows in its place; unfreeze them, or start='ids'."
            )
        if type(table) not in (nn.EmbeddingBag, nn.Embedding) or _hooked(table):
            notes.append(f"{name}: hooks or parametrizations of its {type(table).__name__} are not kept.")
        for kind in getattr(table.weight, "_optimizer_classes", []):
            notes.append(f"{name}: its {kind.__name__}, applied in the backward pass, is carried over.")
    if not isinstance(built.old, SidCollection) and any(getattr(built.old, h) for h in _STATE_HOOKS):
        notes.append("hooks of its state dict are not kept.")
    return notes


def _weight(table: Any) -> Tensor:
    weight: Tensor = table.weight
    return weight


def _hooked(table: Any) -> bool:
    return any(getattr(table, hooks) for hooks in _HOOKS) or bool(table.weight._backward_hooks)
