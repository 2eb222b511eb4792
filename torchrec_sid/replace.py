"""`replace_embeddings`: an existing TorchRec model, its raw-id tables swapped for SID tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from torchrec_sid.collections import SidEmbeddingBagCollection, SidEmbeddingCollection
from torchrec_sid.errors import SidError
from torchrec_sid.replace_report import CollectionChange, ReplacementReport, table_size
from torchrec_sid.spec import SidSpec
from torchrec_sid.tables.catalog_map import Catalog, CatalogMap
from torchrec_sid.tables.configs import SidEmbeddingBagConfig, SidEmbeddingConfig
from torchrec_sid.tables.schemes import Scheme

FeatureSchemes = Mapping[str, Scheme | Sequence[Scheme]]
"""Feature -> how its items are embedded from now on."""


def replace_embeddings(
    model: nn.Module,
    features: FeatureSchemes,
    *,
    catalog: Catalog | None = None,
    spec: SidSpec | None = None,
) -> ReplacementReport:
    """Swap the tables of some features for SID tables, in place, wherever the model has them.

    Feature order, dimensions, pooling, weighting, device and the weights of all other tables stay as they
    are: their parameters are the same objects. Make optimizers and sharding plans afterwards.

    Args:
        model: unsharded; holds stock ``EmbeddingBagCollection`` / ``EmbeddingCollection`` at any depth.
        features: what to replace, e.g. ``{"item": HashedPrefix(depth=3, num_embeddings=1_000_000)}``; in
            every collection that has the feature. The rest of a table that it shares stays.
        catalog: an open SidCatalog, if the batches go on carrying raw ids.
        spec: shape of the SIDs, if the batches will carry packed SIDs instead.

    Returns:
        What changed; ``report.model`` is the model, or the new collection if the model was one itself.

    Raises:
        SidError: nothing to replace, a feature that no collection has, a model that is sharded or
            quantized, a collection of a kind that cannot be taken apart, or a scheme that does not fit.

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
    found = _collections(model)
    _check_features(model, found, features)
    device = next((c.device for c in found.values()), torch.device("cpu"))
    lookup = CatalogMap(catalog, device) if catalog is not None else None
    # All are built before any is swapped: a refusal leaves the model as it was.
    built: dict[int, nn.Module] = {}
    changes = []
    for path, collection in found.items():
        if id(collection) in built or not _has_any(collection, features):
            continue
        new = _rebuild(collection, features, lookup, spec, path)
        built[id(collection)] = new
        before = [table_size(config) for config in _configs(collection)]
        inner = new.ebc if isinstance(new, SidEmbeddingBagCollection) else new.ec
        after = [table_size(config) for config in (_configs(inner) if inner is not None else [])]
        changes.append(CollectionChange(path, type(collection).__name__, tuple(before), tuple(after)))
    root = _swap(model, built)
    return ReplacementReport(root, tuple(changes))


def _collections(model: nn.Module) -> dict[str, Any]:
    """Path -> stock collection, also where one object stands at several paths."""
    return {
        path: module
        for path, module in model.named_modules(remove_duplicate=False)
        if type(module) in (EmbeddingBagCollection, EmbeddingCollection)
    }


def _configs(collection: Any) -> list[EmbeddingConfig]:
    if isinstance(collection, EmbeddingBagCollection):
        return list(collection.embedding_bag_configs())
    return list(collection.embedding_configs())


def _has_any(collection: Any, features: FeatureSchemes) -> bool:
    return any(name in features for config in _configs(collection) for name in config.feature_names)


def _check_features(model: nn.Module, found: Mapping[str, Any], features: FeatureSchemes) -> None:
    known = {name for c in found.values() for config in _configs(c) for name in config.feature_names}
    for path, module in model.named_modules():
        _check_kind(path, module, features)
    for feature in features:
        if feature not in known:
            raise SidError(
                f"feature {feature!r}",
                "no EmbeddingBagCollection or EmbeddingCollection of the model has it",
                f"Features that can be replaced: {sorted(known) or 'none'}.",
            )


def _check_kind(path: str, module: nn.Module, features: FeatureSchemes) -> None:
    """Refuse what holds one of the features but cannot be taken apart, with the reason."""
    kind, where = type(module), f"module {path!r}" if path else "the model"
    name = kind.__name__
    if kind in (EmbeddingBagCollection, EmbeddingCollection):
        return
    if "torchrec.distributed" in kind.__module__:
        raise SidError(where, f"a {name}: the model is sharded", "Replace first, shard afterwards.")
    if "torchrec.quant" in kind.__module__:
        raise SidError(
            where, f"a {name}: the model is quantized", "Replace and train first, then quantize."
        )
    if isinstance(module, (SidEmbeddingBagCollection, SidEmbeddingCollection)):
        replaced = sorted(set(module.transform.sid_features) & set(features))
        if replaced:
            raise SidError(f"feature {replaced[0]!r}", f"{where} already embeds its SIDs", "Leave it out.")
        return
    wrapped = [c for c in module.children() if type(c) in (EmbeddingBagCollection, EmbeddingCollection)]
    if kind.__module__.startswith("torchrec.modules.") and any(_has_any(c, features) for c in wrapped):
        raise SidError(
            where,
            f"a {name}, which works on the ids or weights of the tables it wraps",
            "Rebuild this module over a SID collection by hand.",
        )
    if isinstance(module, (EmbeddingBagCollection, EmbeddingCollection)) and _has_any(module, features):
        raise SidError(
            where,
            f"a {name}, a subclass whose behaviour a swap would lose",
            "Build a SID collection in its place by hand.",
        )


def _rebuild(
    collection: Any,
    features: FeatureSchemes,
    lookup: CatalogMap | None,
    spec: SidSpec | None,
    path: str,
) -> SidEmbeddingBagCollection | SidEmbeddingCollection:
    """A SID collection that returns what ``collection`` returns, with its other weights."""
    bags = isinstance(collection, EmbeddingBagCollection)
    tables: list[Any] = []
    for config in _configs(collection):
        tables += _split(config, features, spec)
    replaced = {n for config in _configs(collection) for n in config.feature_names if n in features}
    catalogs = dict.fromkeys(replaced, lookup) if lookup is not None else None
    kept = [table.name for table in tables if not isinstance(table, SidEmbeddingConfig)]
    order = [name for names in _output_names(collection) for name in names]
    try:
        if bags:
            new = SidEmbeddingBagCollection(
                tables,
                is_weighted=collection.is_weighted(),
                device=collection.device,
                catalog=catalogs,
                output_order=order,
            )
            _keep_weights(kept, collection, new.ebc)
            return new
        sequence = SidEmbeddingCollection(
            tables,
            device=collection.device,
            need_indices=collection.need_indices(),
            catalog=catalogs,
            output_order=order,
        )
        _keep_weights(kept, collection, sequence.ec)
        return sequence
    except SidError as error:
        where = f"{path or 'the model'}, {error.where}"
        raise SidError(where, error.found, error.remedy) from error


def _output_names(collection: Any) -> list[list[str]]:
    if isinstance(collection, EmbeddingBagCollection):
        return [list(collection._embedding_names)]
    names: list[list[str]] = collection.embedding_names_by_table()
    return names


def _split(
    config: EmbeddingConfig, features: FeatureSchemes, spec: SidSpec | None
) -> list[EmbeddingConfig | SidEmbeddingConfig]:
    """One table as what stays of it and one SID table per scheme of its replaced features."""
    stay = [name for name in config.feature_names if name not in features]
    groups: list[tuple[tuple[Scheme, ...], list[str]]] = []
    for name in config.feature_names:
        if name in features:
            schemes = _schemes(features[name])
            same = next((names for other, names in groups if other == schemes), None)
            if same is None:
                groups.append((schemes, [name]))
            else:
                same.append(name)
    result: list[EmbeddingConfig | SidEmbeddingConfig] = []
    if stay:
        result.append(replace(config, feature_names=stay))
    for number, (schemes, names) in enumerate(groups):
        suffix = (
            "" if not stay and len(groups) == 1 else "_sid" if len(groups) == 1 else f"_sid{number + 1}"
        )
        options = {"pooling": config.pooling} if isinstance(config, EmbeddingBagConfig) else {}
        kind = SidEmbeddingBagConfig if isinstance(config, EmbeddingBagConfig) else SidEmbeddingConfig
        result.append(
            kind(
                name=config.name + suffix,
                embedding_dim=config.embedding_dim,
                feature_names=names,
                scheme=schemes,
                spec=spec,
                data_type=config.data_type,
                init_fn=_own_init(config),
                **options,
            )
        )
    return result


def _schemes(scheme: Scheme | Sequence[Scheme]) -> tuple[Scheme, ...]:
    return tuple(scheme) if isinstance(scheme, Sequence) else (scheme,)


def _own_init(config: EmbeddingConfig) -> Any:
    """The table's ``init_fn`` if the user gave one: TorchRec's default depends on the number of rows."""
    init = config.init_fn
    default = isinstance(init, partial) and init.func is torch.nn.init.uniform_
    given = config.weight_init_min is not None or config.weight_init_max is not None
    return init if given or not default else None


def _keep_weights(names: Sequence[str], old: Any, new: Any) -> None:
    attribute = "embedding_bags" if isinstance(old, EmbeddingBagCollection) else "embeddings"
    for name in names:
        getattr(new, attribute)[name].weight = getattr(old, attribute)[name].weight


def _swap(model: nn.Module, built: Mapping[int, nn.Module]) -> nn.Module:
    if id(model) in built:
        return built[id(model)]
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if id(child) in built:
                module._modules[name] = built[id(child)]
    return model
