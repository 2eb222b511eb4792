"""`replace_embeddings`: an existing TorchRec model, its raw-id tables swapped for SID tables."""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn
from torchrec.distributed.model_parallel import get_unwrapped_module
from torchrec.distributed.types import ShardedModule
from torchrec.modules.embedding_modules import (
    EmbeddingBagCollection,
    EmbeddingBagCollectionInterface,
    EmbeddingCollection,
    EmbeddingCollectionInterface,
)
from torchrec.modules.embedding_tower import EmbeddingTower, EmbeddingTowerCollection
from torchrec.quant.embedding_modules import EmbeddingBagCollection as QuantizedBagCollection
from torchrec.quant.embedding_modules import EmbeddingCollection as QuantizedCollection

from torchrec_sid.collections import SidCollection
from torchrec_sid.devices import buffer_device
from torchrec_sid.errors import SidError
from torchrec_sid.replace_rebuild import (
    FeatureSchemes,
    Rebuilt,
    fill,
    physical_configs,
    physical_tables,
    raw_features,
    rebuild,
)
from torchrec_sid.replace_report import CollectionChange, ReplacementReport, TableSize, table_size
from torchrec_sid.replace_start import require_weights, start_from_ids
from torchrec_sid.spec import SidSpec
from torchrec_sid.tables.catalog_map import Catalog, CatalogMap
from torchrec_sid.tables.configs import SidTableConfig

_STOCK = (EmbeddingBagCollection, EmbeddingCollection)


def replace_embeddings(
    model: nn.Module,
    features: FeatureSchemes,
    *,
    catalog: Catalog | CatalogMap | Mapping[str, Catalog | CatalogMap] | None = None,
    spec: SidSpec | None = None,
    start: Literal["fresh", "ids"] = "fresh",
    traffic: Mapping[str, Tensor] | None = None,
    dry_run: bool = False,
) -> ReplacementReport:
    """Swap the tables of some features for SID tables, in place, wherever the model has them.

    Feature order, dimensions, pooling, weighting, devices, element types, hooks and all other tables stay
    as they are: those are the same modules. A table that trains in the backward pass
    (``apply_optimizer_in_backward``) goes on doing so. What cannot be kept is in ``report.notes``. Make
    other optimizers and sharding plans afterwards. Features that shall share a table go in one call; more
    calls may follow, with other catalogs.

    Args:
        model: unsharded; holds stock ``EmbeddingBagCollection`` / ``EmbeddingCollection`` at any depth and
            under any number of names.
        features: what to replace, e.g. ``{"item": HashedPrefix(depth=3, num_embeddings=1_000_000)}``; in
            every collection that has the feature. The rest of a table that it shares stays.
        catalog: an open SidCatalog, or one for each feature, if the batches go on carrying raw ids.
        spec: shape of the SIDs of features without a catalog, whose batches will carry packed SIDs instead.
        start: ``fresh`` rows, or rows that start from those of the ids they stand for, so that the model
            goes on from where it was: every row takes the weighted mean of what the coarser rows of its
            items have not yet said of their old vectors. Needs a catalog.
        traffic: table -> ``[rows]`` how often each id occurs, for ``start="ids"``; None: equally often.
        dry_run: change nothing, and say what would be.

    Returns:
        What changed; ``report.model`` is the model, or the new collection if the model was one itself.

    Raises:
        SidError: nothing to replace, a feature that no collection has, a model that is sharded or
            quantized, a collection of a kind that cannot be taken apart, or a scheme that does not fit. The
            model is as it was.

    Example:
        >>> from torchrec.modules.embedding_configs import EmbeddingBagConfig
        >>> from torchrec_sid import HashedPrefix, SidSpec
        >>> tables = [EmbeddingBagConfig(name=f"t_{name}", feature_names=[name], embedding_dim=8,
        ...           num_embeddings=10_000) for name in ("item", "user")]
        >>> model = nn.Sequential(EmbeddingBagCollection(tables=tables))
        >>> scheme = HashedPrefix(depth=3, num_embeddings=1_000)
        >>> report = replace_embeddings(model, {"item": scheme}, spec=SidSpec((16, 16, 16)))
        >>> report.model is model, [p.shape[0] for p in model.parameters()]
        (True, [1000, 10000])
    """
    if not features:
        raise SidError("replace_embeddings", "no features", "Name the features that carry items.")
    if start not in ("fresh", "ids"):
        raise SidError("start", repr(start), "Choose 'fresh' or 'ids'.")
    found = _collections(model)
    _check_features(model, found, features)
    wanted = [c for c in found.values() if raw_features(c) & set(features)]
    maps = _catalog_maps(model, wanted[0], features, catalog)
    if start == "ids":
        require_weights(wanted, features, maps, traffic)
    # All are built before any is swapped: a refusal leaves the model as it was.
    built: dict[int, Rebuilt] = {}
    for path, collection in found.items():
        if id(collection) in built or not raw_features(collection) & set(features):
            continue
        try:
            built[id(collection)] = rebuild(collection, features, maps, spec)
        except SidError as error:
            raise SidError(f"{path or 'the model'}, {error.where}", error.found, error.remedy) from error
    _note_ties(model, built.values())
    if not dry_run:
        for one in built.values():
            fill(one)
            if start == "ids":
                one.notes += start_from_ids(one, traffic or {})
    changes = [_change(one, found) for one in built.values()]
    root = model if dry_run else _swap(model, {key: one.new for key, one in built.items()})
    return ReplacementReport(root, tuple(changes))


def former_state_dict(model: nn.Module) -> dict[str, Any]:
    """The state of a model after :func:`replace_embeddings`, under the names that it had before.

    Tables of SIDs, which are new, are left out; the tensors are the model's own. What a distributed
    checkpoint of the model before the swap holds is read into them by ``dcp.load({"model":
    former_state_dict(model)}, checkpoint_id=...)``. A plain state dict needs no such call: the collections
    accept the old names.

    Args:
        model: with SID collections, sharded or not.
    """
    state = dict(model.state_dict())
    for path, module in get_unwrapped_module(model).named_modules():
        if isinstance(module, SidCollection):
            prefix = f"{path}." if path else ""
            for table, key in module.table_keys.items():
                weight = state.pop(f"{prefix}{key}")
                if table in module.raw_tables:
                    state[f"{prefix}{module.former_names[key]}"] = weight
    return state


def _collections(model: nn.Module) -> dict[str, Any]:
    """Path -> collection that can be taken apart, also where one object stands at several paths."""
    return {
        path: module
        for path, module in model.named_modules(remove_duplicate=False)
        if (type(module) in _STOCK or isinstance(module, SidCollection)) and not _is_inside(model, path)
    }


def _is_inside(model: nn.Module, path: str) -> bool:
    """Whether a collection is a part of one of ours."""
    parts = path.split(".") if path else []
    above = [model.get_submodule(".".join(parts[:n])) for n in range(len(parts))]
    return any(isinstance(module, SidCollection) for module in above)


def _catalog_maps(
    model: nn.Module, like: Any, features: FeatureSchemes, catalog: Any
) -> dict[str, CatalogMap]:
    """Feature -> catalog on the device; one map for each catalog, also over several calls."""
    if catalog is None:
        return {}
    given = dict(catalog) if isinstance(catalog, Mapping) else dict.fromkeys(features, catalog)
    for name in given:
        if name not in features:
            raise SidError(
                f"catalog of feature {name!r}", "it is not replaced", f"Features are {sorted(features)}."
            )
    weights = [table.weight for table in physical_tables(like).values()]
    device = buffer_device(weights[0].device)
    known = {m.fingerprint: m for m in model.modules() if isinstance(m, CatalogMap)}
    maps: dict[int, CatalogMap] = {}
    for one in given.values():
        same = one if isinstance(one, CatalogMap) else known.get(one.fingerprint)
        if same is None or same.spec != one.spec:
            same = maps.get(id(one)) or CatalogMap(one, device)
        maps[id(one)] = same
    return {name: maps[id(one)] for name, one in given.items()}


def _check_features(model: nn.Module, found: Mapping[str, Any], features: FeatureSchemes) -> None:
    for path, module in model.named_modules():
        _check_kind(f"module {path!r}" if path else "the model", module, features)
    known = {name for collection in found.values() for name in raw_features(collection)}
    for feature in features:
        if feature not in known:
            raise SidError(
                f"feature {feature!r}",
                "no EmbeddingBagCollection or EmbeddingCollection of the model has it",
                f"Features that can be replaced: {sorted(known) or 'none'}.",
            )


def _check_kind(where: str, module: nn.Module, features: FeatureSchemes) -> None:
    """Refuse what holds one of the features but cannot be taken apart, with the reason."""
    kind = type(module)
    name = kind.__name__
    if kind in _STOCK:
        return
    if isinstance(module, ShardedModule):
        raise SidError(where, f"a {name}: the model is sharded", "Replace first, shard afterwards.")
    if isinstance(module, (QuantizedBagCollection, QuantizedCollection)):
        raise SidError(
            where, f"a {name}: the model is quantized", "Replace and train first, then quantize."
        )
    if isinstance(module, SidCollection):
        ours = [c for c in module.tables if isinstance(c, SidTableConfig)]
        replaced = sorted({name for c in ours for name in c.feature_names or ()} & set(features))
        if replaced:
            raise SidError(f"feature {replaced[0]!r}", f"{where} already embeds its SIDs", "Leave it out.")
        return
    if isinstance(module, (EmbeddingBagCollection, EmbeddingCollection)):
        if raw_features(module) & set(features):
            raise SidError(
                where,
                f"a {name}, a subclass whose behaviour a swap would lose",
                "Build a SID collection in its place by hand.",
            )
        return
    if isinstance(module, (EmbeddingBagCollectionInterface, EmbeddingCollectionInterface)):
        if _configured_features(module) & set(features):
            raise SidError(
                where,
                f"a {name}, whose tables are no modules that could stay beside tables of SIDs",
                "Use TorchRec's EmbeddingBagCollection or EmbeddingCollection in its place.",
            )
        return
    _check_wrapper(where, module, features)


def _configured_features(module: Any) -> set[str]:
    configs = getattr(module, "embedding_bag_configs", None) or module.embedding_configs
    return {name for config in configs() for name in config.feature_names}


_REASONS = {
    "FeatureProcessed": "its sharder shards the EmbeddingBagCollection it holds, and takes no other",
    "ManagedCollision": "it gives ids rows of the very tables it holds, and resets rows that it takes back",
    "ITEP": "it prunes rows of the very tables it holds",
    "PEC": "it keeps rows of the very tables it holds on several ranks",
}


def _check_wrapper(where: str, module: nn.Module, features: FeatureSchemes) -> None:
    """TorchRec's modules that hold a collection and reach into it. Towers only call it."""
    if not type(module).__module__.startswith("torchrec.modules."):
        return
    if isinstance(module, (EmbeddingTower, EmbeddingTowerCollection)):
        return
    held = [c for c in module.children() if isinstance(c, _STOCK) and raw_features(c) & set(features)]
    if held:
        name = type(module).__name__
        reasons = [reason for start, reason in _REASONS.items() if name.startswith(start)]
        reason = reasons[0] if reasons else "it reaches into the collection it holds"
        feature = sorted(raw_features(held[0]) & set(features))[0]
        raise SidError(
            where,
            f"a {name} with feature {feature!r}: {reason}",
            "Leave its features out, or give this feature a collection of its own first.",
        )


def _note_ties(model: nn.Module, built: Any) -> None:
    """Note weights of tables that go and are used elsewhere: there the old ones stay."""
    for one in built:
        tables = physical_tables(one.old)
        going = {id(tables[table.old].weight): table.old for table in one.made if _gone(one, table.old)}
        inside = {id(module) for module in one.old.modules()}
        for path, module in model.named_modules():
            if id(module) in inside:
                continue
            for name, parameter in module.named_parameters(recurse=False):
                if id(parameter) in going:
                    where = f"{path}.{name}" if path else name
                    one.notes.append(
                        f"{going[id(parameter)]}: its weight is {where} too, which stays that of the ids."
                    )


def _gone(one: Rebuilt, table: str) -> bool:
    return all(config.name != table or hasattr(config, "schemes") for config in one.new.tables)


def _change(one: Rebuilt, found: Mapping[str, Any]) -> CollectionChange:
    names = tuple(path for path, collection in found.items() if collection is one.old)
    kind = type(one.old).__name__
    return CollectionChange(names[0], kind, _sizes(one.old), _sizes(one.new), names, tuple(one.notes))


def _sizes(collection: Any) -> tuple[TableSize, ...]:
    tables = physical_tables(collection)
    reads = collection.reads if isinstance(collection, SidCollection) else {}
    sizes = []
    for name, config in physical_configs(collection).items():
        features = reads[name].features if name in reads else tuple(config.feature_names)
        sizes.append(table_size(config, features, tables[name].weight.element_size()))
    return tuple(sizes)


def _swap(model: nn.Module, built: Mapping[int, nn.Module]) -> nn.Module:
    """Put the new collections in the place of the old ones, under every name, in containers too."""
    if id(model) in built:
        return built[id(model)]
    seen: set[int] = set()
    for module in list(model.modules()):
        _exchange(module._modules, built, seen)
        _exchange(vars(module), built, seen)
    return model


def _exchange(value: Any, built: Mapping[int, nn.Module], seen: set[int]) -> Any:
    """``value`` with new collections for old ones: containers in place, tuples anew."""
    if isinstance(value, nn.Module):
        return built.get(id(value), value)
    if isinstance(value, types.MethodType) and id(value.__self__) in built:
        return getattr(built[id(value.__self__)], value.__name__, value)
    if not isinstance(value, (dict, list, tuple, set)) or id(value) in seen:
        return value
    seen.add(id(value))
    if isinstance(value, dict):
        for key, item in list(value.items()):
            new = _exchange(item, built, seen)
            if new is not item:
                value[key] = new
        return value
    items = [_exchange(item, built, seen) for item in value]
    if all(new is item for new, item in zip(items, value, strict=True)):
        return value
    if isinstance(value, list):
        value[:] = items
        return value
    if isinstance(value, set):
        value.clear()
        value.update(items)
        return value
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
