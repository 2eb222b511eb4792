"""Writing pairs of item ids and codes as the parts of a catalog, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchrec_sid.artifact import FileRecord, Place
from torchrec_sid.catalog.generations import PartInfo, drop_unlisted
from torchrec_sid.catalog.parts import CatalogPart, read_part, write_part
from torchrec_sid.errors import SidError
from torchrec_sid.spec import SidSpec

Ids = Tensor | np.ndarray[Any, Any]
"""``[n]`` int64."""


def check_ids(item_ids: Ids) -> Tensor:
    """Ids as ``[n]`` int64 on the CPU.

    Raises:
        SidError: not a vector of integers.
    """
    ids = torch.as_tensor(item_ids)
    if ids.dim() != 1 or ids.dtype.is_floating_point or ids.dtype == torch.bool:
        raise SidError("item_ids", f"{ids.dtype} of shape {tuple(ids.shape)}", "Pass [n] integers.")
    return ids.to("cpu", torch.int64)


def as_pairs(
    item_ids: Ids | Iterable[tuple[Ids, Tensor]], codes: Tensor | None
) -> Iterable[tuple[Ids, Tensor]]:
    """Ids and codes, or an iterable of such pairs, as pairs."""
    if isinstance(item_ids, (Tensor, np.ndarray)):
        if codes is None:
            raise SidError("codes", "None", "Pass codes [N, L] with the ids, or an iterator of pairs.")
        return [(item_ids, codes)]
    if codes is not None:
        raise SidError("codes", "given beside an iterator of pairs", "Pass the one or the other.")
    return item_ids


def write_parts(
    path: Place,
    spec: SidSpec,
    pairs: Iterable[tuple[Ids, Tensor]],
    generation: int,
    published: tuple[CatalogPart, ...],
    part_items: int,
    listed: set[str],
) -> tuple[tuple[PartInfo, ...], dict[str, FileRecord]]:
    """Write pairs as parts; on failure, remove what was written.

    Args:
        path: the catalog's folder.
        spec: of the SIDs.
        pairs: ids ``[n]`` and codes ``[n, L]``.
        generation: the generation that will list the parts.
        published: parts whose ids may not occur again.
        part_items: items per part.
        listed: files of the manifest that is there, which stay.

    Raises:
        SidError: no items, codes outside the spec, an id that is published already or occurs twice.
    """
    parts, files = list(published), dict[str, FileRecord]()
    drop_unlisted(path, listed)
    try:
        for ids, sids in _chunks(spec, pairs, part_items):
            for part in parts:
                found = part.locate(ids).found
                if bool(found.any()):
                    raise SidError(
                        "item_ids",
                        f"item id {int(ids[found][0])} is in the catalog already",
                        "Published SIDs never move: give each new item once.",
                    )
            info, record = write_part(path, ids, sids, generation)
            files[info.file] = record
            parts.append(read_part(path, info, spec))
        if len(parts) == len(published):
            raise SidError("item_ids", "no items", "Give at least one.")
    except BaseException:
        drop_unlisted(path, listed)
        raise
    return tuple(part.info for part in parts[len(published) :]), files


def _chunks(
    spec: SidSpec, pairs: Iterable[tuple[Ids, Tensor]], size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    held: list[tuple[Tensor, Tensor]] = []
    count = 0
    for item_ids, codes in pairs:
        ids, codes = check_ids(item_ids), torch.as_tensor(codes).cpu()
        if len(ids) != len(codes):
            raise SidError("codes", f"{len(codes)} rows for {len(ids)} item ids", "Pass one row per id.")
        sids = spec.pack(codes) if spec.fits_int64 else spec.pack_bytes(codes)
        for part_ids, part_sids in zip(ids.split(size), sids.split(size), strict=True):
            if count + len(part_ids) > size:
                yield torch.cat([i for i, _ in held]), torch.cat([s for _, s in held])
                held, count = [], 0
            held.append((part_ids, part_sids))
            count += len(part_ids)
    if count:
        yield torch.cat([i for i, _ in held]), torch.cat([s for _, s in held])
