"""The embedding tables of a model: where they are, and where their shards begin."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.tensor import DTensor
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from torchrec_sid.errors import SidError


@dataclass(frozen=True)
class Table:
    """One table of an EmbeddingBagCollection or an EmbeddingCollection."""

    name: str
    """Unique in the model: plans and constraints know tables by it."""
    module_path: str
    """Of the collection in the model; empty if the model is the collection."""
    weight_key: str
    """Of its weight in ``model.state_dict()``, sharded or not."""
    pooled: bool
    """True in an EmbeddingBagCollection, False in an EmbeddingCollection (one vector per id)."""
    config: Any
    """Its EmbeddingBagConfig or EmbeddingConfig."""

    @property
    def rows(self) -> int:
        """Number of embeddings."""
        return int(self.config.num_embeddings)

    @property
    def dim(self) -> int:
        """Elements of an embedding."""
        return int(self.config.embedding_dim)


def find_tables(model: nn.Module) -> dict[str, Table]:
    """Every table of an unsharded model, by name, in module order.

    A collection that occurs twice in the module tree counts once, at its first path.

    Raises:
        SidError: two collections have a table of the same name: TorchRec would give both the same
            constraints without a word.
    """
    tables: dict[str, Table] = {}
    for path, module in model.named_modules():
        # By exact type, as TorchRec's sharders match: a subclass is not sharded.
        if type(module) not in (EmbeddingBagCollection, EmbeddingCollection):
            continue
        pooled = type(module) is EmbeddingBagCollection
        configs = module.embedding_bag_configs() if pooled else module.embedding_configs()
        holder = "embedding_bags" if pooled else "embeddings"
        prefix = f"{path}." if path else ""
        for config in configs:
            if config.name in tables:
                raise SidError(
                    f"table {config.name!r}",
                    f"occurs in {tables[config.name].module_path!r} and in {path!r}",
                    "Give every table of the model its own name.",
                )
            key = f"{prefix}{holder}.{config.name}.weight"
            tables[config.name] = Table(config.name, path, key, pooled, config)
    return tables


def table_parameters(model: nn.Module, tables: Mapping[str, Table]) -> dict[str, nn.Parameter]:
    """The weights of the tables in an unsharded model, by table name."""
    return {name: model.get_parameter(table.weight_key) for name, table in tables.items()}


class LocalShard(NamedTuple):
    """A block of a table that this process holds."""

    tensor: Tensor
    """``[rows, columns]``, the storage itself."""
    row: int
    """First row of the block in the whole table."""
    column: int
    """First column."""


def local_shards(weight: Tensor | ShardedTensor) -> Iterator[LocalShard]:
    """The blocks of a table's weight that this process holds, whatever its sharding."""
    if isinstance(weight, ShardedTensor):
        for shard in weight.local_shards():
            row, column = shard.metadata.shard_offsets
            yield LocalShard(shard.tensor, row, column)
    elif isinstance(weight, DTensor):
        wrapper: Any = weight.to_local()
        # Without a shard here there is still one offset.
        for tensor, (row, column) in zip(wrapper.local_shards(), wrapper.local_offsets(), strict=False):
            yield LocalShard(tensor, row, column)
    else:
        yield LocalShard(weight, 0, 0)


def row_blocks(tensor: Tensor | ShardedTensor, rows: int) -> Iterator[LocalShard]:
    """The blocks of a table's weight, or of optimizer state by row, that this process holds.

    State of one number a row has one column; of column-wise shards it has one for each shard, which
    TorchRec lays one behind the other.

    Args:
        tensor: ``[rows, D]`` or ``[rows, 1]``, or ``[k * rows]``; sharded or not.
        rows: of the table.
    """
    if tensor.dim() == 2:
        yield from local_shards(tensor)
        return
    if isinstance(tensor, ShardedTensor):
        parts = [(s.tensor, s.metadata.shard_offsets[0]) for s in tensor.local_shards()]
    elif isinstance(tensor, DTensor):
        wrapper: Any = tensor.to_local()
        parts = [(t, o[0]) for t, o in zip(wrapper.local_shards(), wrapper.local_offsets(), strict=False)]
    else:
        parts = [(tensor, 0)]
    for part, offset in parts:
        yield LocalShard(part.view(-1, 1), offset % rows, offset // rows)
