"""Weights of tables that do not depend on how they are sharded.

DistributedModelParallel draws new weights for every shard, so the same seed on 1 and on 8 processes gives
different models. Here each table is drawn in blocks of rows, each from its own seed, and a process draws
the blocks it needs: the whole table is never in one memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from torchrec_sid.errors import SidError
from torchrec_sid.parallel.embedding_tables import LocalShard, Table, local_shards

# Elements of one block. Part of the definition of the weights: changing it changes every model.
_BLOCK_ELEMENTS = 1 << 20


@torch.no_grad()
def initialise_tables(model: nn.Module, tables: Mapping[str, Table], seed: int) -> None:
    """Draw every table anew; equal for equal seeds under any sharding, world size and device.

    Each block is drawn on the CPU with the ``init_fn`` of the table's configuration (TorchRec's default:
    uniform in ±1/sqrt(rows)). A column shard draws whole rows and keeps its columns.

    Args:
        model: sharded (``DistributedModelParallel``) or not.
        tables: of the unsharded model, from :func:`~torchrec_sid.parallel.embedding_tables.find_tables`.
        seed: any integer.
    """
    weights = model.state_dict()
    state = torch.get_rng_state()
    try:
        for table in tables.values():
            for shard in local_shards(weights[table.weight_key]):
                _fill(shard, table, seed)
    finally:
        torch.set_rng_state(state)


def _fill(shard: LocalShard, table: Table, seed: int) -> None:
    block_rows = max(1, _BLOCK_ELEMENTS // table.dim)
    rows, columns = shard.tensor.shape
    last = shard.row + rows
    for block in range(shard.row // block_rows, -(-last // block_rows)):
        first = block * block_rows
        values = torch.empty(min(block_rows, table.rows - first), table.dim)
        digest = hashlib.sha256(f"{seed}/{table.name}/{block}".encode()).digest()
        # The CPU generator alone: torch.manual_seed would also reset the accelerator's.
        torch.default_generator.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        table.config.init_fn(values)
        begin, end = max(first, shard.row), min(first + len(values), last)
        piece = values[begin - first : end - first, shard.column : shard.column + columns]
        shard.tensor[begin - shard.row : end - shard.row].copy_(piece)


@torch.no_grad()
def copy_full_into_sharded(sharded: Mapping[str, Tensor], full: Mapping[str, Tensor]) -> None:
    """Copy the weights of an unsharded model into a sharded one, in place.

    Needs the whole state of the unsharded model on every process: for tests of parity and for models that
    fit. Larger ones go through a checkpoint, which each process reads in part.

    Args:
        sharded: ``state_dict()`` of the ``DistributedModelParallel``.
        full: ``state_dict()`` of the unsharded model.

    Raises:
        SidError: the two do not have the same keys.
    """
    if difference := sorted(set(sharded) ^ set(full)):
        raise SidError(
            f"state entry {difference[0]!r}",
            "is in one model and not in the other",
            "Build both from the same configuration.",
        )
    for key, weight in sharded.items():
        source = full[key]
        for shard in local_shards(weight):
            if source.dim() != 2:
                shard.tensor.copy_(source)
                continue
            rows, columns = shard.tensor.shape
            shard.tensor.copy_(source[shard.row : shard.row + rows, shard.column : shard.column + columns])
