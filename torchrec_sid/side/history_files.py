"""The files of a history store: segments, spans of events in them, and what may be appended."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchrec_sid.artifact import load_artifact
from torchrec_sid.errors import ArtifactError, SidError
from torchrec_sid.side.event_layout import spec_layout
from torchrec_sid.spec import SidSpec

KIND, SEGMENT_KIND, VERSION = "sid_history", "sid_history_segment", 1


@dataclass(frozen=True)
class Segment:
    """One file of a store: the events that one append added."""

    name: str
    generation: int
    user_ids: NDArray[np.int64]
    """Ascending."""
    offsets: NDArray[np.int64]
    columns: dict[str, NDArray[Any]]
    """Memory-mapped, one row per event."""


def read_manifest(path: Path) -> dict[str, Any]:
    """The contents of ``store.json``.

    Raises:
        ArtifactError: missing, unreadable, of another kind or a newer version.
    """
    try:
        manifest: dict[str, Any] = json.loads((path / "store.json").read_text())
    except (OSError, ValueError) as error:
        raise ArtifactError(
            str(path), f"not a history store ({error})", "Check the path, or make it with create()."
        ) from error
    if manifest.get("kind") != KIND or manifest.get("version", 0) > VERSION:
        raise ArtifactError(
            str(path),
            f"kind {manifest.get('kind')!r}, version {manifest.get('version')}",
            f"This release reads {KIND} up to version {VERSION}.",
        )
    return manifest


def load_segment(path: Path, entry: dict[str, Any], verify: bool) -> Segment:
    """Map one segment into memory.

    Raises:
        ArtifactError: missing, truncated, altered (with ``verify``), or another segment than named.
    """
    file = path / entry["name"]
    artifact = load_artifact(file, kind=SEGMENT_KIND, version=VERSION, verify=verify)
    if artifact.fingerprint != entry["fingerprint"]:
        raise ArtifactError(
            str(file), "not the segment that store.json names", "Restore the folder as a whole."
        )
    arrays = {name: tensor.numpy() for name, tensor in artifact.tensors.items()}
    user_ids, offsets = arrays.pop("user_ids"), arrays.pop("offsets")
    return Segment(entry["name"], entry["generation"], user_ids, offsets, arrays)


def keep_newest(spans: NDArray[np.int64], limit: int) -> None:
    """Shorten spans in place, oldest segments first, to ``limit`` events per user."""
    room = np.full(spans.shape[1], limit)
    for segment in reversed(spans):
        kept = np.minimum(segment[:, 1] - segment[:, 0], room)
        segment[:, 0] = segment[:, 1] - kept
        room -= kept


def copy_spans(sources: list[NDArray[Any]], spans: NDArray[np.int64], target: NDArray[Any]) -> None:
    """Write the spans of each user, segment after segment, one copy each."""
    at = 0
    for user in spans.transpose(1, 0, 2).tolist():
        for source, (begin, end) in zip(sources, user, strict=True):
            if end > begin:
                target[at : at + end - begin] = source[begin:end]
                at += end - begin


def find_spans(
    segments: Sequence[Segment], wanted: NDArray[np.int64], before: NDArray[np.int64] | None
) -> NDArray[np.int64]:
    """``[segments, B, 2]``: first and last-plus-one event of each user in each segment."""
    spans = np.zeros((len(segments), len(wanted), 2), np.int64)
    for s, segment in enumerate(segments):
        row = np.searchsorted(segment.user_ids, wanted)
        row = np.minimum(row, max(len(segment.user_ids) - 1, 0))
        if not len(segment.user_ids):
            continue
        known = segment.user_ids[row] == wanted
        spans[s, :, 0] = np.where(known, segment.offsets[row], 0)
        spans[s, :, 1] = np.where(known, segment.offsets[row + 1], 0)
        if before is not None:
            times = segment.columns["times"]
            for user, (begin, end) in enumerate(spans[s].tolist()):
                spans[s, user, 1] = begin + np.searchsorted(times[begin:end], before[user])
    return spans


def check_append(
    spec: SidSpec, fields: Sequence[str], user_ids: Tensor, lengths: Tensor, columns: dict[str, Tensor]
) -> None:
    """Refuse an append that the store could not read back.

    Raises:
        SidError: naming the argument.
    """
    sids = columns["sids"]
    if sids.dtype != torch.uint8 or sids.dim() != 2 or sids.shape[1] != spec.nbytes:
        raise SidError(
            "sids",
            f"{sids.dtype} of shape {tuple(sids.shape)}",
            f"This store holds [events, {spec.nbytes}] uint8 (spec.pack_bytes).",
        )
    if spec.byte_groups is not None:
        spec_layout(spec, (False,) * spec.levels).check(sids, "sids")
    if user_ids.shape != lengths.shape or user_ids.dim() != 1 or len(user_ids.unique()) != len(user_ids):
        raise SidError(
            "user_ids",
            f"shape {tuple(user_ids.shape)} with lengths {tuple(lengths.shape)}, or a user twice",
            "Pass each user once, with one length.",
        )
    if bool((lengths < 0).any()) or int(lengths.sum()) != len(sids):
        raise SidError(
            "lengths",
            f"sum {int(lengths.sum())} for {len(sids)} events",
            "Pass the events of each user.",
        )
    if set(columns) - {"sids"} != set(fields):
        raise SidError("append", f"columns {sorted(columns)}", f"This store keeps sids and {list(fields)}.")
    for name, values in columns.items():
        if name != "sids" and tuple(values.shape) != (len(sids),):
            raise SidError(name, f"shape {tuple(values.shape)}", f"Pass one per event: [{len(sids)}].")
    if "actions" in columns and len(sids):
        low, high = int(columns["actions"].min()), int(columns["actions"].max())
        if low < 0 or high > 255:
            raise SidError("actions", f"values {low}..{high}", "An action is 0 to 255.")
