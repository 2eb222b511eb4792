"""The part files of a catalog: immutable, sorted by item id, memory-mapped, checked."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from torchrec_sid.artifact import write_atomically
from torchrec_sid.errors import ArtifactError, SidError


@dataclass(frozen=True)
class PartInfo:
    """A part as the manifest lists it."""

    file: str
    """Name within the catalog folder."""
    generation: int
    """The generation that added it."""
    items: int
    """n."""
    first_id: int
    """Smallest item id."""
    last_id: int
    """Largest item id."""
    bytes: int
    """Size of the file."""
    sha256: str
    """Hash of the file, hexadecimal."""


class Located(NamedTuple):
    """Where :meth:`CatalogPart.locate` found ids."""

    found: Tensor
    """``[n]`` bool."""
    row: Tensor
    """``[n]`` int64, meaningful where found."""


class CatalogPart(NamedTuple):
    """One open part: item ids in ascending order and their SIDs."""

    info: PartInfo
    item_ids: Tensor
    """``[n]`` int64, sorted, memory-mapped."""
    sids: Tensor
    """``[n]`` int64 packed, or ``[n, nbytes]`` uint8 for SIDs beyond 63 bits; memory-mapped."""

    def locate(self, ids: Tensor) -> Located:
        """Rows of ids ``[n]`` int64 in this part."""
        inside = (ids >= self.info.first_id) & (ids <= self.info.last_id)
        if self.info.last_id - self.info.first_id + 1 == self.info.items:
            # Ids that fill their range need no search: the id is the row.
            return Located(inside, (ids - self.info.first_id).masked_fill(~inside, 0))
        at = inside.nonzero().squeeze(1)
        row = torch.zeros_like(ids)
        row[at] = torch.searchsorted(self.item_ids, ids[at])
        inside[at] = self.item_ids[row[at]] == ids[at]
        return Located(inside, row)


def write_part(folder: Path, item_ids: Tensor, sids: Tensor, generation: int) -> PartInfo:
    """Write one part and say what it is; the rows are sorted here.

    Args:
        folder: the catalog's folder.
        item_ids: ``[n]`` int64, n > 0.
        sids: ``[n]`` int64 or ``[n, nbytes]`` uint8.
        generation: the generation that will list it.

    Raises:
        SidError: an item id that occurs twice.
    """
    order = item_ids.argsort()
    item_ids, sids = item_ids[order], sids[order]
    same = (item_ids[1:] == item_ids[:-1]).nonzero()
    if len(same):
        raise SidError(
            "item_ids", f"item id {int(item_ids[int(same[0])])} occurs twice", "Give each item one SID."
        )
    name = f"part-{generation:06d}-{_content_hash(item_ids, sids)[:16]}.safetensors"
    tensors = {"item_ids": item_ids.contiguous(), "sids": sids.contiguous()}
    write_atomically(folder / name, lambda temporary: save_file(tensors, temporary))
    path = folder / name
    return PartInfo(
        file=name,
        generation=generation,
        items=len(item_ids),
        first_id=int(item_ids[0]),
        last_id=int(item_ids[-1]),
        bytes=path.stat().st_size,
        sha256=hash_file(path),
    )


def open_part(folder: Path, info: PartInfo, *, verify: bool) -> CatalogPart:
    """Map a part into memory.

    Args:
        folder: the catalog's folder.
        info: its entry in the manifest.
        verify: compare the file's hash with the manifest (reads it once); the size always is compared.

    Raises:
        ArtifactError: missing, truncated or altered.
    """
    path = folder / info.file
    if not path.is_file():
        raise ArtifactError(str(path), "no such file", "Copy the whole catalog folder, or make it again.")
    size = path.stat().st_size
    if size != info.bytes:
        raise ArtifactError(
            str(path),
            f"{size} bytes, the manifest says {info.bytes}",
            "The file was cut or altered: copy it again.",
        )
    if verify and hash_file(path) != info.sha256:
        raise ArtifactError(
            str(path), "its hash is not the one in the manifest", "The file was altered: copy it again."
        )
    try:
        with safe_open(path, framework="pt") as file:
            return CatalogPart(info, file.get_tensor("item_ids"), file.get_tensor("sids"))
    except (SafetensorError, OSError) as error:
        raise ArtifactError(str(path), f"not readable ({error})", "Copy it again.") from error


def hash_file(path: Path) -> str:
    """SHA-256 (hex) of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _content_hash(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()
