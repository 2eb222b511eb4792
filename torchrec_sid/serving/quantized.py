"""Quantized tables that torch.export can follow.

TorchRec quantizes the rows and owns their layout. Its quantized collections keep state for a cache of
host memory in queue and counter objects that torch.export refuses, so that the look-up itself is called
here, the same fbgemm operator on the same bytes: outputs equal TorchRec's bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchrec.inference.modules import quantize_embeddings
from torchrec.modules.embedding_configs import BaseEmbeddingConfig
from torchrec.modules.embedding_modules import (
    EmbeddingBagCollection,
    EmbeddingCollection,
    get_embedding_names_by_table,
)
from torchrec.quant.embedding_modules import EmbeddingCollection as QuantEmbeddingCollection
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from torchrec_sid.errors import SidError

Precision = Literal["float", "int8", "int4"]
"""Of the rows of the tables; everything else stays float32."""
_DTYPES = {"int8": torch.int8, "int4": torch.quint4x2}
_BUFFERS = ("weights_placements", "weights_offsets", "weights_tys", "D_offsets", "lxu_cache_weights")
_INTEGERS = (
    "total_D",
    "max_int2_D",
    "max_int4_D",
    "max_int8_D",
    "max_float16_D",
    "max_float32_D",
    "max_float8_D",
    "fp8_exponent_bits",
    "fp8_exponent_bias",
    "row_alignment",
    "output_dtype",
)


def quantize_tables(model: nn.Module, precision: Precision) -> nn.Module:
    """Quantize the rows of every stock collection of a model, in place.

    Args:
        model: unsharded, with ``EmbeddingBagCollection`` / ``EmbeddingCollection`` at any depth.
        precision: ``int8``: 8 bits a number and a float16 scale and bias a row; ``int4``: 4 bits;
            ``float``: as is.

    Returns:
        The model, or what replaces it where it is a collection itself.

    Raises:
        SidError: an unknown precision.
    """
    if precision == "float":
        return model
    if precision not in _DTYPES:
        raise SidError("precision", repr(precision), "Choose float, int8 or int4.")
    made: dict[int, nn.Module] = {}
    for module in list(model.modules()):
        if type(module) in (EmbeddingBagCollection, EmbeddingCollection):
            made[id(module)] = _quantized(module, _DTYPES[precision])
    for module in list(model.modules()):
        for name, child in module.named_children():
            if id(child) in made:
                module._modules[name] = made[id(child)]
    return made.get(id(model), model)


def _quantized(collection: nn.Module, dtype: torch.dtype) -> QuantizedBags | QuantizedEvents:
    holder = nn.Sequential(collection)
    quantize_embeddings(
        holder,
        dtype,
        inplace=True,
        additional_qconfig_spec_keys=[EmbeddingCollection],
        additional_mapping={EmbeddingCollection: QuantEmbeddingCollection},
    )
    if isinstance(collection, EmbeddingBagCollection):
        return QuantizedBags(holder[0], collection)
    assert isinstance(collection, EmbeddingCollection)
    return QuantizedEvents(holder[0], collection)


class TableLookup(nn.Module):
    """The look-up of one group of quantized tables, as buffers and one operator.

    Args:
        group: TorchRec's ``IntNBitTableBatchedEmbeddingBagsCodegen``.
    """

    weights: Tensor
    unified: Tensor

    def __init__(self, group: Any) -> None:
        super().__init__()
        for name in _BUFFERS:
            self.register_buffer(name, getattr(group, name))
        self.register_buffer("unified", group.weights_uvm)
        self.register_buffer("weights", group.weights_host if group.host_size > 0 else group.weights_dev)
        self._integers = {name: int(getattr(group, name)) for name in _INTEGERS}
        self._pooling = int(group.pooling_mode)

    def forward(self, rows: Tensor, lengths: Tensor, weights: Tensor | None = None) -> Tensor:
        """Rows ``[n]``, feature by feature and bag by bag, and lengths ``[F * B]`` -> vectors.

        Returns:
            ``[B, sum of D]`` float32 for pooled tables, ``[n, D]`` for others.
        """
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        result: Tensor = torch.ops.fbgemm.int_nbit_split_embedding_codegen_lookup_function(
            dev_weights=self.weights,
            uvm_weights=self.unified,
            **{name: getattr(self, name) for name in _BUFFERS},
            **self._integers,
            indices=rows.to(torch.int32),
            offsets=offsets.to(torch.int32),
            pooling_mode=self._pooling,
            indice_weights=weights,
            lxu_cache_locations=torch.empty(0, dtype=torch.int32, device=rows.device),
        )
        return result


class QuantizedBags(nn.Module):
    """``EmbeddingBagCollection`` over quantized rows: KJT -> KeyedTensor, in the order of the float one.

    Args:
        quantized: TorchRec's quantized collection.
        like: the collection it was made from.
    """

    def __init__(self, quantized: Any, like: EmbeddingBagCollection) -> None:
        super().__init__()
        self._configs = like.embedding_bag_configs()
        self._weighted = like.is_weighted()
        groups = list(quantized._key_to_tables.values())
        self.lookups = nn.ModuleList(TableLookup(group) for group in quantized._emb_modules)
        self._features = [_features(tables) for tables in groups]
        self._names = [name for tables in groups for name in _names(tables)]
        self._dims = [t.embedding_dim for tables in groups for t in tables for _ in t.feature_names]
        # TorchRec puts tables of one pooling together.
        self._order = [self._names.index(name) for name in _names(self._configs)]

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """KJT -> KeyedTensor ``[B, sum of D]`` float32."""
        pooled = []
        for lookup, names in zip(self.lookups, self._features, strict=True):
            _check_rows(features, names)
            rows, lengths, weights = _select(features, list(names), self._weighted)
            pooled.append(lookup(rows, lengths, weights))
        values = torch.cat(pooled, dim=1)
        if self._order != list(range(len(self._order))):
            parts = values.split(self._dims, dim=1)
            values = torch.cat([parts[i] for i in self._order], dim=1)
        return KeyedTensor(
            keys=[self._names[i] for i in self._order],
            length_per_key=[self._dims[i] for i in self._order],
            values=values,
        )


class QuantizedEvents(nn.Module):
    """``EmbeddingCollection`` over quantized rows: KJT -> one vector per value.

    Args:
        quantized: TorchRec's quantized collection.
        like: the collection it was made from.

    Raises:
        SidError: a collection that returns its indices.
    """

    def __init__(self, quantized: Any, like: EmbeddingCollection) -> None:
        super().__init__()
        if like.need_indices():
            raise SidError("need_indices", "True", "A served model has its ids in the request.")
        groups = list(quantized._key_to_tables.values())
        self.lookups = nn.ModuleList(TableLookup(group) for group in quantized._emb_modules)
        self._features = [_features(tables) for tables in groups]
        self._names = [_names(tables) for tables in groups]

    def forward(self, features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        """KJT -> name -> JaggedTensor ``[n, D]`` float32."""
        result = {}
        keys = features.keys()
        sizes, starts = features.length_per_key(), features.lengths_offset_per_key()
        for lookup, inputs, names in zip(self.lookups, self._features, self._names, strict=True):
            _check_rows(features, inputs)
            rows, lengths, _ = _select(features, list(inputs), False)
            vectors = lookup(rows, lengths)
            places = [keys.index(name) for name in inputs]
            parts = vectors.split([sizes[place] for place in places])
            for name, place, part in zip(names, places, parts, strict=True):
                bags = features.lengths()[starts[place] : starts[place + 1]]
                result[name] = JaggedTensor(values=part, lengths=bags)
        return result


def _features(tables: Iterable[BaseEmbeddingConfig]) -> dict[str, int]:
    """Features of some tables, in their order, and the rows of each one's table."""
    return {name: table.num_embeddings for table in tables for name in table.feature_names}


def _check_rows(features: KeyedJaggedTensor, limits: Mapping[str, int]) -> None:
    """Stop before a row outside its table: the operator would read other bytes without a word."""
    keys, offsets = features.keys(), features.offset_per_key()
    for name, limit in limits.items():
        place = keys.index(name)
        rows = features.values()[offsets[place] : offsets[place + 1]]
        inside = (rows >= 0).logical_and_(rows < limit).all()
        torch._assert_async(inside, f"feature {name!r}: an id is outside its table of {limit} rows")


def _names(tables: list[Any]) -> list[str]:
    return [name for names in get_embedding_names_by_table(tables) for name in names]


def _select(
    features: KeyedJaggedTensor, names: list[str], weighted: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Values, lengths and weights of the features ``names``, one after the other."""
    keys = features.keys()
    if keys == names:
        return features.values(), features.lengths(), features.weights() if weighted else None
    offsets, starts = features.offset_per_key(), features.lengths_offset_per_key()
    places = [keys.index(name) for name in names]
    rows = torch.cat([features.values()[offsets[p] : offsets[p + 1]] for p in places])
    lengths = torch.cat([features.lengths()[starts[p] : starts[p + 1]] for p in places])
    if not weighted:
        return rows, lengths, None
    return rows, lengths, torch.cat([features.weights()[offsets[p] : offsets[p + 1]] for p in places])
