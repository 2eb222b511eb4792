"""`HistoryStore`: users' histories as packed SIDs on disk, memory-mapped, jagged, appendable.

An event costs what its SID costs (25 trits: 5 bytes), plus a byte for an action and eight for a time where
they are kept. A store is a folder: ``store.json`` names the segments, each one file written once. Appending
adds a segment and a generation; :meth:`HistoryStore.compact` merges the segments into one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchrec_sid.artifact import save_artifact, write_json
from torchrec_sid.errors import ArtifactError, SidError
from torchrec_sid.side.history_files import (
    KIND,
    SEGMENT_KIND,
    VERSION,
    Segment,
    check_append,
    copy_spans,
    find_spans,
    keep_newest,
    load_segment,
    read_manifest,
)
from torchrec_sid.spec import SidSpec


class HistoryBatch(NamedTuple):
    """Histories of some users, each oldest first: what code-space attention takes."""

    sids: Tensor
    """``[E, nbytes]`` uint8."""
    lengths: Tensor
    """``[B]`` int64, 0 for a user without events."""
    actions: Tensor | None
    """``[E]`` uint8, where the store keeps actions."""
    times: Tensor | None
    """``[E]`` int64, where the store keeps times."""


class HistoryStore:
    """Packed histories by user id. One process appends; any number read.

    Open one with :meth:`create` or :meth:`open`.

    Example:
        >>> import tempfile
        >>> spec = SidSpec((3,) * 25)
        >>> store = HistoryStore.create(tempfile.mkdtemp() + "/histories", spec)
        >>> sids = spec.pack_bytes(torch.randint(3, (5, 25)))
        >>> store = store.append(torch.tensor([7, 3]), torch.tensor([2, 3]), sids)
        >>> store.read([3, 9, 7]).lengths
        tensor([3, 0, 2])
    """

    def __init__(self, path: Path, manifest: dict[str, Any], segments: list[Segment]) -> None:
        self.path, self._manifest, self._segments = path, manifest, segments
        self.spec = SidSpec(tuple(manifest["cardinalities"]))

    @classmethod
    def create(
        cls,
        path: str | Path,
        spec: SidSpec,
        *,
        actions: bool = False,
        times: bool = False,
        catalog_fingerprint: str = "",
    ) -> HistoryStore:
        """Make an empty store, generation 0.

        Args:
            path: folder to make.
            spec: the SIDs it will hold.
            actions: keep a byte per event.
            times: keep an int64 per event (any unit, ascending within a user).
            catalog_fingerprint: of the catalog the SIDs come from; :meth:`open` can insist on it.

        Raises:
            SidError: there is a store already.
        """
        path = Path(path)
        if (path / "store.json").exists():
            raise SidError(str(path), "a history store already", "Open it, or choose another folder.")
        path.mkdir(parents=True, exist_ok=True)
        manifest = {
            "kind": KIND,
            "version": VERSION,
            "cardinalities": list(spec.cardinalities),
            "fields": [name for name, kept in (("actions", actions), ("times", times)) if kept],
            "catalog_fingerprint": catalog_fingerprint,
            "generation": 0,
            "segments": [],
        }
        write_json(path / "store.json", manifest)
        return cls(path, manifest, [])

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        generation: int | None = None,
        catalog_fingerprint: str | None = None,
        verify: bool = False,
    ) -> HistoryStore:
        """Open a store; its bytes stay on disk until they are read.

        Args:
            path: the folder.
            generation: as it was then; None for now. Generations before a compaction are gone.
            catalog_fingerprint: refuse a store made from another catalog.
            verify: read everything once and compare fingerprints.

        Raises:
            ArtifactError: no store, truncated or altered files, another catalog, a generation not kept.
        """
        path = Path(path)
        manifest = read_manifest(path)
        found = manifest["catalog_fingerprint"]
        if catalog_fingerprint is not None and found != catalog_fingerprint:
            raise ArtifactError(
                str(path),
                f"made from catalog {found[:12] or '(none)'}, not {catalog_fingerprint[:12]}",
                "Build the histories from the catalog in use.",
            )
        if generation is not None:
            first = max(manifest["compacted"], 0) if "compacted" in manifest else 0
            if not first <= generation <= manifest["generation"]:
                raise ArtifactError(
                    str(path),
                    f"generation {generation} of {first}..{manifest['generation']}",
                    "Choose one of those; a compaction drops earlier ones.",
                )
            kept = [s for s in manifest["segments"] if s["generation"] <= generation]
            manifest = {**manifest, "segments": kept, "generation": generation}
        segments = [load_segment(path, entry, verify) for entry in manifest["segments"]]
        return cls(path, manifest, segments)

    @property
    def generation(self) -> int:
        """Grows by one with every append or compaction."""
        return int(self._manifest["generation"])

    @property
    def fields(self) -> tuple[str, ...]:
        """What is kept besides SIDs: of ``actions``, ``times``."""
        return tuple(self._manifest["fields"])

    @property
    def num_events(self) -> int:
        """Events of all users."""
        return sum(int(segment.offsets[-1]) for segment in self._segments)

    def user_ids(self) -> Tensor:
        """``[users]`` int64, ascending: users with at least one event."""
        ids = [segment.user_ids[np.diff(segment.offsets) > 0] for segment in self._segments]
        unique = np.unique(np.concatenate(ids)) if ids else np.zeros(0, np.int64)
        return torch.empty(len(unique), dtype=torch.int64).copy_(torch.from_numpy(unique))

    def append(
        self,
        user_ids: Tensor,
        lengths: Tensor,
        sids: Tensor,
        actions: Tensor | None = None,
        times: Tensor | None = None,
    ) -> HistoryStore:
        """Add events after those already there, and return the store of the next generation.

        Args:
            user_ids: ``[n]`` int64, distinct, any order.
            lengths: ``[n]`` new events of each; sums to E.
            sids: ``[E, nbytes]`` uint8, user after user, each user's oldest first.
            actions: ``[E]`` 0 .. 255, exactly if the store keeps them.
            times: ``[E]`` int64, exactly if the store keeps them.

        Raises:
            SidError: shapes, a user twice, codes outside the alphabet, times that go back.
            ArtifactError: somebody else appended since this store was opened.
        """
        given = {"actions": actions, "times": times}
        columns = {"sids": sids, **{name: value for name, value in given.items() if value is not None}}
        check_append(self.spec, self.fields, user_ids, lengths, columns)
        order = user_ids.argsort()
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.to(torch.int64).cumsum(0)])
        if not bool((order == torch.arange(len(order))).all()):
            pieces = [torch.arange(int(offsets[i]), int(offsets[i + 1])) for i in order.tolist()]
            events = torch.cat(pieces) if pieces else torch.zeros(0, dtype=torch.int64)
            columns = {name: value[events] for name, value in columns.items()}
            offsets = torch.cat(
                [torch.zeros(1, dtype=torch.int64), lengths[order].to(torch.int64).cumsum(0)]
            )
        if "actions" in columns:
            columns["actions"] = columns["actions"].to(torch.uint8)
        self._check_times(user_ids[order], offsets, columns.get("times"))
        tensors = {"user_ids": user_ids[order].to(torch.int64), "offsets": offsets, **columns}
        return self._publish(tensors, list(self._manifest["segments"]))

    def compact(self) -> HistoryStore:
        """Merge all segments into one, as a new generation; earlier generations can no longer be opened."""
        users = self.user_ids()
        batch = self.read(users)
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), batch.lengths.cumsum(0)])
        tensors = {"user_ids": users, "offsets": offsets, "sids": batch.sids}
        tensors |= {name: getattr(batch, name) for name in self.fields}
        merged = self._publish(tensors, [])
        for segment in self._segments:
            (self.path / segment.name).unlink(missing_ok=True)
        return merged

    def read(
        self,
        user_ids: Tensor | NDArray[np.int64] | Sequence[int],
        *,
        limit: int | None = None,
        before: Tensor | None = None,
    ) -> HistoryBatch:
        """The histories of some users, oldest first. Copies the bytes of their events and nothing else.

        Args:
            user_ids: ``[B]`` integers; unknown users have an empty history, repeats are allowed.
            limit: at most this many of the newest events of each.
            before: ``[B]`` int64: only events at an earlier time (the store must keep times).

        Raises:
            SidError: a negative limit, or ``before`` without times.
        """
        wanted = np.asarray(user_ids, dtype=np.int64)
        if limit is not None and limit < 0:
            raise SidError("limit", str(limit), "Choose 0 or more.")
        if before is not None and "times" not in self.fields:
            raise SidError("before", "given, but the store keeps no times", "Create it with times=True.")
        spans = find_spans(self._segments, wanted, None if before is None else before.numpy())
        if limit is not None:
            keep_newest(spans, limit)
        lengths = (spans[:, :, 1] - spans[:, :, 0]).sum(0)
        columns = {"sids": torch.empty(int(lengths.sum()), self.spec.nbytes, dtype=torch.uint8)}
        columns |= {
            name: torch.empty(int(lengths.sum()), dtype=torch.uint8 if name == "actions" else torch.int64)
            for name in self.fields
        }
        for name, target in columns.items():
            copy_spans([segment.columns[name] for segment in self._segments], spans, target.numpy())
        return HistoryBatch(
            columns["sids"], torch.from_numpy(lengths), columns.get("actions"), columns.get("times")
        )

    def _publish(self, tensors: dict[str, Tensor], entries: list[dict[str, Any]]) -> HistoryStore:
        current = read_manifest(self.path)
        if current["generation"] != self.generation:
            raise ArtifactError(
                str(self.path),
                f"is at generation {current['generation']}, this store was opened at {self.generation}",
                "Open it again and repeat the append; let one process write.",
            )
        generation = self.generation + 1
        name = f"segment-{generation:06d}.safetensors"
        config = {"cardinalities": list(self.spec.cardinalities), "generation": generation}
        mark = save_artifact(
            self.path / name, kind=SEGMENT_KIND, version=VERSION, config=config, tensors=tensors
        )
        entry = {"name": name, "generation": generation, "fingerprint": mark}
        manifest = {**self._manifest, "generation": generation, "segments": [*entries, entry]}
        if not entries:
            manifest["compacted"] = generation if self._segments else 0
        write_json(self.path / "store.json", manifest)
        return HistoryStore.open(self.path)

    def _check_times(self, user_ids: Tensor, offsets: Tensor, times: Tensor | None) -> None:
        if times is None or not len(times):
            return
        starts = torch.zeros(len(times), dtype=torch.bool)
        starts[offsets[:-1][offsets[:-1] < len(times)]] = True
        back = (times[1:] < times[:-1]) & ~starts[1:]
        last = self.read(user_ids, limit=1)
        latest = torch.full((len(user_ids),), torch.iinfo(torch.int64).min)
        assert last.times is not None
        latest[last.lengths > 0] = last.times
        nonempty = offsets[:-1] < offsets[1:]
        first = times[offsets[:-1][nonempty]]
        if bool(back.any()) or bool((first < latest[nonempty]).any()):
            raise SidError(
                "times",
                "an event earlier than the one before it in its user's history",
                "Sort each user's events by time, and append only later ones.",
            )
