"""``manifest.json`` of a catalog: what belongs to it, and the fingerprint of each generation."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from torchrec_sid.artifact import write_json
from torchrec_sid.catalog.parts import PartInfo
from torchrec_sid.errors import ArtifactError
from torchrec_sid.spec import SidSpec

KIND = "sid_catalog"
VERSION = 1
FILE = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """The parts of a catalog, oldest generation first."""

    cardinalities: tuple[int, ...]
    """Of its SidSpec."""
    quantizer_fingerprint: str
    """Of the quantizer that made the SIDs."""
    parts: tuple[PartInfo, ...]
    """At least one."""

    @property
    def generation(self) -> int:
        """The newest generation."""
        return self.parts[-1].generation

    @property
    def lineage(self) -> tuple[str, ...]:
        """Fingerprint of every generation, oldest first: a hash chain over quantizer, spec and parts."""
        head = json.dumps([KIND, list(self.cardinalities), self.quantizer_fingerprint])
        digest = hashlib.sha256(head.encode())
        prints: dict[int, str] = {}
        for part in self.parts:
            digest.update(part.sha256.encode())
            prints[part.generation] = digest.hexdigest()
        return tuple(prints.values())

    def at(self, generation: int, path: Path) -> Manifest:
        """This manifest as it was at an earlier generation.

        Raises:
            ArtifactError: there is no such generation.
        """
        parts = tuple(part for part in self.parts if part.generation <= generation)
        if not parts or parts[-1].generation != generation:
            raise ArtifactError(
                str(path), f"no generation {generation}", f"The newest is {self.generation}."
            )
        return Manifest(self.cardinalities, self.quantizer_fingerprint, parts)


def exists(folder: Path) -> bool:
    """Whether the folder holds a complete catalog."""
    return (folder / FILE).exists()


def read(folder: Path) -> Manifest:
    """Read and check a manifest.

    Raises:
        ArtifactError: missing, not a catalog's, of a newer version, or edited.
    """
    file = folder / FILE
    if not file.is_file():
        raise ArtifactError(
            str(folder),
            f"no {FILE}",
            "Pass a catalog folder; an interrupted create leaves none: run it again.",
        )
    try:
        body = json.loads(file.read_text())
        kind, version = str(body["kind"]), int(body["version"])
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise ArtifactError(str(file), f"not a manifest ({error!r})", "Make the catalog again.") from error
    if kind != KIND:
        raise ArtifactError(str(file), f"holds a {kind!r}, not a {KIND!r}", "Pass a catalog folder.")
    if version > VERSION:
        raise ArtifactError(
            str(file),
            f"layout version {version}, this release reads up to {VERSION}",
            "Upgrade torchrec-sid.",
        )
    try:
        parts = tuple(PartInfo(**part) for part in body["parts"])
        spec = SidSpec(tuple(body["cardinalities"]))
        manifest = Manifest(spec.cardinalities, str(body["quantizer_fingerprint"]), parts)
        intact = manifest.lineage[-1] == body["fingerprint"]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ArtifactError(
            str(file), f"an entry is missing or odd ({error!r})", "Make it again."
        ) from error
    if not intact:
        raise ArtifactError(
            str(file), "its fingerprint does not fit its entries", "The manifest was edited: copy it again."
        )
    return manifest


def publish(folder: Path, manifest: Manifest) -> None:
    """Replace the manifest atomically, then drop part files that it does not list."""
    body = {
        "kind": KIND,
        "version": VERSION,
        "cardinalities": list(manifest.cardinalities),
        "quantizer_fingerprint": manifest.quantizer_fingerprint,
        "generation": manifest.generation,
        "items": sum(part.items for part in manifest.parts),
        "fingerprint": manifest.lineage[-1],
        "parts": [asdict(part) for part in manifest.parts],
    }
    write_json(folder / FILE, body)
    drop_unlisted(folder)


def drop_unlisted(folder: Path) -> None:
    """Remove part files that no manifest lists: what a failed or killed writer left."""
    listed = {part.file for part in read(folder).parts} if exists(folder) else set()
    for file in folder.glob("part-*.safetensors"):
        if file.name not in listed:
            file.unlink()
