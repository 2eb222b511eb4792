"""The part files of a catalog: immutable, sorted by item id, memory-mapped, checked."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from torchrec_sid.artifact import FileRecord, Place, SealedFolder, record_file, write_atomically
from torchrec_sid.artifact.folder import read_tensors
from torchrec_sid.artifact.place import open_member
from torchrec_sid.catalog.generations import PartInfo
from torchrec_sid.errors import ArtifactError, SidError
from torchrec_sid.spec import SidSpec

_REMEDY = "The file is not the one that was written: copy the catalog again, or make it again."
_CHECKED_ROWS = 1 << 20


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


def write_part(
    folder: Place, item_ids: Tensor, sids: Tensor, generation: int
) -> tuple[PartInfo, FileRecord]:
    """Write one part and say what it is; the rows are sorted here.

    Args:
        folder: the catalog's folder.
        item_ids: ``[n]`` int64, n > 0.
        sids: ``[n]`` int64 or ``[n, nbytes]`` uint8.
        generation: the generation that will list it.

    Raises:
        SidError: an item id that occurs twice; the disk is full, read-only or not ours.
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
    info = PartInfo(name, generation, len(item_ids), int(item_ids[0]), int(item_ids[-1]))
    return info, record_file(folder, name)


def open_part(folder: SealedFolder, info: PartInfo, spec: SidSpec) -> CatalogPart:
    """Map a part into memory, and compare its rows and ends with the manifest.

    Args:
        folder: the catalog's.
        info: the part's entry in the manifest.
        spec: of its SIDs.

    Raises:
        ArtifactError: missing, of another size, or not the rows that the manifest says.
    """
    return _part(folder.tensors(info.file), info, spec, f"{folder.path}/{info.file}")


def read_part(path: Place, info: PartInfo, spec: SidSpec) -> CatalogPart:
    """A part that no manifest lists yet, as :func:`open_part` gives it."""
    where = f"{path}/{info.file}"
    with open_member(path, info.file) as file:
        return _part(read_tensors(file, where), info, spec, where)


def _part(tensors: dict[str, Tensor], info: PartInfo, spec: SidSpec, where: str) -> CatalogPart:
    if set(tensors) != {"item_ids", "sids"}:
        raise ArtifactError(where, f"holds {sorted(tensors)[:8]}, not item_ids and sids", _REMEDY)
    wanted = {
        "item_ids": (torch.int64, (info.items,)),
        "sids": (torch.int64, (info.items,))
        if spec.fits_int64
        else (torch.uint8, (info.items, spec.nbytes)),
    }
    for name, (dtype, shape) in wanted.items():
        found = tensors[name]
        if (found.dtype, tuple(found.shape)) != (dtype, shape):
            raise ArtifactError(
                where, f"{name} is {found.dtype} of {tuple(found.shape)}, not {dtype} of {shape}", _REMEDY
            )
    ids = tensors["item_ids"]
    ends = int(ids[0]), int(ids[-1])
    if ends != (info.first_id, info.last_id):
        raise ArtifactError(
            where, f"goes from id {ends[0]} to {ends[1]}, not {info.first_id} to {info.last_id}", _REMEDY
        )
    return CatalogPart(info, ids, tensors["sids"])


def check_rows(parts: tuple[CatalogPart, ...], spec: SidSpec, path: Place) -> None:
    """Read every row of the parts: ids ascend, none is in two parts, codes are in the alphabet.

    Raises:
        ArtifactError: naming the part.
    """
    for number, part in enumerate(parts):
        where = f"{path}/{part.info.file}"
        for begin in range(0, part.info.items, _CHECKED_ROWS):
            ids = part.item_ids[max(begin - 1, 0) : begin + _CHECKED_ROWS]
            if not bool((ids[1:] > ids[:-1]).all()):
                raise ArtifactError(where, "its item ids do not ascend", _REMEDY)
            _check_alphabet(part.sids[begin : begin + _CHECKED_ROWS], spec, where)
        for other in parts[:number]:
            if other.info.last_id < part.info.first_id or part.info.last_id < other.info.first_id:
                continue
            shared = other.locate(part.item_ids).found
            if bool(shared.any()):
                raise ArtifactError(
                    where, f"item id {int(part.item_ids[shared][0])} is in {other.info.file} too", _REMEDY
                )


def _check_alphabet(sids: Tensor, spec: SidSpec, where: str) -> None:
    if spec.fits_int64:
        low, high = (int(bound) for bound in sids.aminmax())
        if low < 0 or high >> spec.bits:
            raise ArtifactError(
                where, f"SIDs from {low} to {high} have more than {spec.bits} bits", _REMEDY
            )
        if all(k & (k - 1) == 0 for k in spec.cardinalities):
            return
    codes = spec.unpack(sids) if spec.fits_int64 else spec.unpack_bytes(sids)
    try:
        spec.validate(codes)
    except SidError as error:
        raise ArtifactError(where, error.found, _REMEDY) from error


def _content_hash(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()
