"""`SidCatalog`: the artefact that maps item ids to Semantic IDs.

A catalog is a folder, on a local disk or at a URI: immutable part files, memory-mapped where they are
local, and ``manifest.json``, which lists them and is replaced last and atomically. An append adds a part
and a generation; what is published never moves.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from torchrec_sid.artifact import Place, folder_lock, has_manifest, locate, write_atomically
from torchrec_sid.catalog.generations import Generations, listed_files, publish, read
from torchrec_sid.catalog.parts import CatalogPart, check_rows, open_part
from torchrec_sid.catalog.writer import Ids, as_pairs, check_ids, write_parts
from torchrec_sid.errors import ArtifactError, SidError
from torchrec_sid.spec import SidSpec


class CatalogRows(NamedTuple):
    """Rows of a catalog: one batch of :meth:`SidCatalog.batches`."""

    item_ids: Tensor
    """``[n]`` int64, ascending."""
    codes: Tensor
    """``[n, L]`` int64."""


class SidCatalog:
    """Item id -> SID, memory-mapped. Make one with :meth:`create`, read one with :meth:`open`.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp()) / "catalog"
        >>> spec = SidSpec((4, 4))
        >>> ids, codes = torch.tensor([7, 3]), torch.tensor([[1, 2], [3, 0]])
        >>> catalog = SidCatalog.create(folder, spec, ids, codes, "f00d")
        >>> spec.unpack(catalog.lookup(torch.tensor([3, 7]))).tolist()
        [[3, 0], [1, 2]]
    """

    def __init__(self, path: Place, generations: Generations, parts: tuple[CatalogPart, ...]) -> None:
        self.path = path
        self.parts = parts
        self.spec = generations.spec
        """The shape of its SIDs."""
        self.quantizer_fingerprint = generations.quantizer_fingerprint
        """Fingerprint of the quantizer that made the SIDs."""
        self.generation = generations.newest
        """1 when created, one more with each append."""
        self.lineage = generations.lineage
        """Fingerprints of all generations up to this one, oldest first."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of quantizer, spec and parts: what a model trained with this catalog records."""
        return self.lineage[-1]

    def extends(self, fingerprint: str) -> bool:
        """Whether this is the catalog with that fingerprint, or one appended to it: no SID of it moved."""
        return fingerprint in self.lineage

    def __len__(self) -> int:
        return sum(part.info.items for part in self.parts)

    @staticmethod
    def exists(path: str | Place) -> bool:
        """Whether a folder holds a complete catalog."""
        return has_manifest(path)

    @classmethod
    def create(
        cls,
        path: str | Place,
        spec: SidSpec,
        item_ids: Ids | Iterable[tuple[Ids, Tensor]],
        codes: Tensor | None = None,
        quantizer_fingerprint: str = "",
        *,
        overwrite: bool = False,
        part_items: int = 4_000_000,
    ) -> SidCatalog:
        """Write a new catalog and open it.

        Args:
            path: folder, a local path or a URI (``s3://...``); made if missing.
            spec: the shape of the SIDs.
            item_ids: ``[N]`` int64, each once; or an iterable of pairs (ids ``[n]``, codes ``[n, L]``),
                which never has to fit in memory.
            codes: ``[N, L]`` int64; None where ``item_ids`` yields pairs.
            quantizer_fingerprint: of the quantizer that made the codes.
            overwrite: replace a catalog that is there; without it that is an error.
            part_items: items per part file, which is also what is held in memory.

        Raises:
            SidError: no items, ids that are not integers or occur twice, codes outside the spec.
            ArtifactError: there is a catalog already.
        """
        place = locate(path)
        if not quantizer_fingerprint:
            raise SidError("quantizer_fingerprint", "empty", "Pass quantizer.fingerprint.")
        with folder_lock(place):
            if has_manifest(place) and not overwrite:
                raise ArtifactError(
                    str(place),
                    "holds a catalog already",
                    "Append to it, choose another path, or pass overwrite=True.",
                )
            pairs = as_pairs(item_ids, codes)
            listed = listed_files(place)
            parts, files = write_parts(place, spec, pairs, 1, (), part_items, listed)
            publish(place, Generations(spec, quantizer_fingerprint, parts, files))
        return cls.open(place, verify=False)

    @classmethod
    def open(cls, path: str | Place, *, verify: bool = True, generation: int | None = None) -> SidCatalog:
        """Open a catalog; its parts are memory-mapped on a local disk, and read from a URI.

        Args:
            path: folder written by :meth:`create`.
            verify: read every part once: compare its hash, the order of its ids and its codes. Manifest,
                sizes, shapes and ends are checked always.
            generation: an earlier generation; the newest by default.

        Raises:
            ArtifactError: missing, of another kind or a newer version, truncated, altered.
        """
        place = locate(path)
        generations, folder = read(place, verify=verify)
        if generation is not None:
            generations = generations.at(generation, place)
        parts = tuple(open_part(folder, part, generations.spec) for part in generations.parts)
        if verify:
            check_rows(parts, generations.spec, place)
        return cls(place, generations, parts)

    def append(
        self,
        item_ids: Ids | Iterable[tuple[Ids, Tensor]],
        codes: Tensor | None = None,
        quantizer_fingerprint: str = "",
        *,
        part_items: int = 4_000_000,
    ) -> SidCatalog:
        """Add new items, encoded by the same quantizer; return the next generation.

        Readers of earlier generations are not disturbed, and no published SID moves.

        Args:
            item_ids: as for :meth:`create`; ids that the catalog holds already are refused.
            codes: as for :meth:`create`.
            quantizer_fingerprint: must be the catalog's own.
            part_items: as for :meth:`create`.

        Raises:
            ArtifactError: codes from another quantizer, or a catalog that has a newer generation.
            SidError: no items, an id that is there already, codes outside the spec.
        """
        if quantizer_fingerprint != self.quantizer_fingerprint:
            raise ArtifactError(
                str(self.path),
                f"was made by quantizer {self.quantizer_fingerprint[:12]}, "
                f"these codes by {quantizer_fingerprint[:12] or 'an unnamed one'}",
                "Encode new items with the catalog's quantizer, or create a new catalog.",
            )
        with folder_lock(self.path):
            # Everything that the new generation will vouch for is read once more.
            generations, _ = read(self.path, verify=True)
            if generations.lineage != self.lineage:
                raise ArtifactError(
                    str(self.path),
                    f"generation {self.generation} is not its newest",
                    "Open the catalog again and append to that.",
                )
            pairs = as_pairs(item_ids, codes)
            parts, files = write_parts(
                self.path,
                self.spec,
                pairs,
                self.generation + 1,
                self.parts,
                part_items,
                set(generations.files),
            )
            publish(self.path, generations.grown(parts, files))
        return SidCatalog.open(self.path, verify=False)

    def contains(self, item_ids: Ids) -> Tensor:
        """Whether the catalog holds ids ``[n]``: ``[n]`` bool."""
        ids = check_ids(item_ids)
        found = torch.zeros(len(ids), dtype=torch.bool)
        for part in self.parts:
            found |= part.locate(ids).found
        return found

    def lookup(self, item_ids: Ids, unknown: int | None = None) -> Tensor:
        """Packed SIDs ``[n]`` int64 of ids ``[n]``.

        Args:
            item_ids: ``[n]`` int64, in any order.
            unknown: returned for ids that the catalog does not hold; without it they are an error.

        Raises:
            SidError: an unknown id, or SIDs beyond 63 bits (use :meth:`packed_bytes`).
        """
        if not self.spec.fits_int64:
            raise SidError(
                str(self.path),
                f"SIDs of {self.spec.bits} bits do not fit an int64",
                "Use packed_bytes(...).",
            )
        return self._gather(item_ids, unknown)

    def codes(self, item_ids: Ids) -> Tensor:
        """Codes ``[n, L]`` int64 of ids ``[n]``.

        Raises:
            SidError: an unknown id.
        """
        return self._unpack(self._gather(item_ids, None))

    def packed_bytes(self, item_ids: Ids) -> Tensor:
        """Codes in bytes, ``[n, nbytes]`` uint8, of ids ``[n]``.

        Raises:
            SidError: an unknown id.
        """
        sids = self._gather(item_ids, None)
        return (
            self.spec.pack_bytes(self.spec.unpack(sids), validate=False) if self.spec.fits_int64 else sids
        )

    def item_ids(self) -> Tensor:
        """All ids, ``[N]`` int64 ascending."""
        return torch.cat([part.item_ids for part in self.parts]).sort().values

    def batches(self, rows: int = 1_000_000) -> Iterator[CatalogRows]:
        """All rows, part by part, in bounded memory."""
        for part in self.parts:
            for begin in range(0, part.info.items, rows):
                end = begin + rows
                yield CatalogRows(part.item_ids[begin:end].clone(), self._unpack(part.sids[begin:end]))

    def to_parquet(self, path: str | Path) -> None:
        """Export ``item_id`` int64, ``sid`` (packed int64, or bytes) and ``codes`` (int32 list).

        Args:
            path: Parquet file, replaced atomically if it exists.
        """
        import pyarrow as pa  # optional: only for the export
        import pyarrow.parquet as pq

        schema = pa.schema(
            [
                ("item_id", pa.int64()),
                ("sid", pa.int64() if self.spec.fits_int64 else pa.binary(self.spec.nbytes)),
                ("codes", pa.list_(pa.int32(), self.spec.levels)),
            ],
            metadata={
                "cardinalities": json.dumps(self.spec.cardinalities),
                "catalog_fingerprint": self.fingerprint,
                "quantizer_fingerprint": self.quantizer_fingerprint,
            },
        )

        def write(temporary: Path) -> None:
            with pq.ParquetWriter(temporary, schema) as writer:
                for rows in self.batches():
                    if self.spec.fits_int64:
                        sids = pa.array(self.spec.pack(rows.codes, validate=False).numpy())
                    else:
                        raw = self.spec.pack_bytes(rows.codes, validate=False)
                        sids = pa.array([row.tobytes() for row in raw.numpy()], schema.field("sid").type)
                    flat = pa.array(rows.codes.to(torch.int32).reshape(-1).numpy())
                    codes = pa.FixedSizeListArray.from_arrays(flat, self.spec.levels)
                    ids = pa.array(rows.item_ids.numpy())
                    writer.write_table(pa.Table.from_arrays([ids, sids, codes], schema=schema))

        write_atomically(path, write)

    def _gather(self, item_ids: Ids, unknown: int | None) -> Tensor:
        ids = check_ids(item_ids)
        first = self.parts[0].sids
        out = torch.zeros(len(ids), *first.shape[1:], dtype=first.dtype)
        missing = torch.ones(len(ids), dtype=torch.bool)
        for part in self.parts:
            found, row = part.locate(ids)
            if len(self.parts) == 1 and bool(found.all()):
                return part.sids[row]
            out[found] = part.sids[row[found]]
            missing &= ~found
        if bool(missing.any()):
            if unknown is None:
                at = int(missing.nonzero()[0])
                raise SidError(
                    str(self.path),
                    f"no item id {int(ids[at])} ({int(missing.sum())} of {len(ids)} ids are unknown)",
                    "Append the new items, or pass unknown=...",
                )
            out[missing] = unknown
        return out

    def _unpack(self, sids: Tensor) -> Tensor:
        return self.spec.unpack(sids) if self.spec.fits_int64 else self.spec.unpack_bytes(sids)
