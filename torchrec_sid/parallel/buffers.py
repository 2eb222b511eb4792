"""Buffers under data parallelism: TorchRec never synchronises them, so a codebook or a hash seed that
differs between ranks trains a different model on each. Here they are copied from rank 0 and compared."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from torchrec_sid.errors import SidError
from torchrec_sid.parallel.ranks import Ranks


def dense_buffer_names(model: nn.Module) -> list[str]:
    """Names of all buffers outside the embedding collections of an unsharded model.

    Raises:
        SidError: a buffer is on the meta device: it would become zeros without an error.
    """
    names = []
    tables = tuple(
        f"{path}." if path else ""
        for path, module in model.named_modules()
        if type(module) in (EmbeddingBagCollection, EmbeddingCollection)
    )
    for name, buffer in model.named_buffers():
        if tables and name.startswith(tables):
            continue
        if buffer.is_meta:
            raise SidError(
                f"buffer {name!r}",
                "is on the meta device and would become zeros",
                "Build the model with only its tables on meta.",
            )
        names.append(name)
    return names


def move_buffers(model: nn.Module, device: torch.device) -> None:
    """Move every buffer to the device. Without a dense parameter DistributedModelParallel does not."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[name] = buffer.to(device)


@torch.no_grad()
def synchronise_buffers(model: nn.Module, names: Iterable[str], ranks: Ranks) -> None:
    """Copy the named buffers from rank 0 to all ranks, and compare a checksum afterwards.

    Raises:
        SidError: the ranks have different buffers (names, shapes or dtypes), or the copy did not take.
    """
    if ranks.group is None:
        return
    found = dict(model.named_buffers())
    buffers = {name: found[name] for name in names}
    signature = [(name, tuple(b.shape), str(b.dtype)) for name, b in buffers.items()]
    for rank, other in enumerate(ranks.all(lambda: signature, where="buffers")):
        for mine, theirs in zip(signature, other, strict=False):
            if mine != theirs:
                raise SidError(
                    f"buffer {mine[0]!r}",
                    f"is {mine[1:]} on rank {ranks.rank} and {theirs} on rank {rank}",
                    "Every rank must build the model from the same configuration.",
                )
        if len(signature) != len(other):
            raise SidError(
                "buffers",
                f"rank {ranks.rank} has {len(signature)}, rank {rank} has {len(other)}",
                "Every rank must build the model from the same configuration.",
            )
    for buffer in buffers.values():
        copy = buffer.cpu().contiguous()
        if copy.numel():
            dist.broadcast(copy.reshape(-1).view(torch.uint8), 0, group=ranks.group)
        buffer.copy_(copy)
    checksums = ranks.all(lambda: checksum(buffers.values()), where="buffers")
    if len(set(checksums)) != 1:
        raise SidError(
            "buffers",
            "still differ between ranks after the copy",
            "A buffer shares its storage with another, or is not stored: register each on its own.",
        )


def checksum(tensors: Iterable[Tensor]) -> str:
    """SHA-256 (hex) of the bytes of the tensors, in order."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
