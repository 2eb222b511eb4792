"""What a catalog's manifest says: its parts, and the fingerprint of each generation."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torchrec_sid.artifact import (
    Contents,
    FileRecord,
    Place,
    SealedFolder,
    has_manifest,
    open_folder,
    seal_folder,
)
from torchrec_sid.artifact.disk import remove_leftovers
from torchrec_sid.artifact.folder import MANIFEST, claims_kind
from torchrec_sid.artifact.sealed import check_kind
from torchrec_sid.errors import ArtifactError, SidError
from torchrec_sid.spec import SidSpec

KIND = "sid_catalog"
VERSION = 2
_AGAIN = "The manifest was edited: copy the catalog again, or make it again."
_PART = r"part-\d{6}-[0-9a-f]{16}\.safetensors"
# A part that no manifest lists, and what killed writers of releases before sealed manifests left.
_LEFTOVER = re.compile(rf"{_PART}|\.{_PART}\.[a-z0-9_]{{8}}|\.manifest\.json\.[a-z0-9_]{{8}}|\.tmp\w{{6}}")


class PartInfo(NamedTuple):
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


class _Config(NamedTuple):
    """The configuration in the manifest."""

    cardinalities: tuple[int, ...]
    quantizer_fingerprint: str
    generation: int
    items: int
    fingerprint: str
    parts: tuple[PartInfo, ...]


@dataclass(frozen=True)
class Generations:
    """The parts of a catalog, oldest generation first."""

    spec: SidSpec
    """The shape of its SIDs."""
    quantizer_fingerprint: str
    """Of the quantizer that made the SIDs."""
    parts: tuple[PartInfo, ...]
    """At least one."""
    files: dict[str, FileRecord]
    """Size and hash of each part's file."""

    @property
    def newest(self) -> int:
        """The newest generation."""
        return self.parts[-1].generation

    @property
    def lineage(self) -> tuple[str, ...]:
        """Fingerprint of every generation, oldest first: a hash chain over quantizer, spec and parts."""
        head = json.dumps([KIND, list(self.spec.cardinalities), self.quantizer_fingerprint])
        digest = hashlib.sha256(head.encode())
        prints: dict[int, str] = {}
        for part in self.parts:
            digest.update(self.files[part.file].sha256.encode())
            prints[part.generation] = digest.hexdigest()
        return tuple(prints.values())

    def at(self, generation: int, path: Place) -> Generations:
        """As it was at an earlier generation.

        Raises:
            ArtifactError: there is no such generation.
        """
        parts = tuple(part for part in self.parts if part.generation <= generation)
        if not parts or parts[-1].generation != generation:
            raise ArtifactError(str(path), f"no generation {generation}", f"The newest is {self.newest}.")
        return Generations(self.spec, self.quantizer_fingerprint, parts, self.files)

    def grown(self, parts: tuple[PartInfo, ...], files: dict[str, FileRecord]) -> Generations:
        """With the parts of one more generation."""
        return Generations(
            self.spec, self.quantizer_fingerprint, self.parts + parts, {**self.files, **files}
        )


def read(path: Place, *, verify: bool = False) -> tuple[Generations, SealedFolder]:
    """Read and check the manifest of a catalog.

    Args:
        path: the folder.
        verify: compare the hash of every part too.

    Raises:
        ArtifactError: missing, not a catalog's, of a newer version, or edited.
    """
    folder = open_folder(
        path,
        kind=KIND,
        version=VERSION,
        verify=verify,
        earlier=_earlier,
        remedy="Pass a catalog folder; an interrupted create leaves none: run it again.",
    )
    where = f"{path}/{MANIFEST}"
    config: _Config = folder.read_config(_Config)
    try:
        spec = SidSpec(config.cardinalities)
    except SidError as error:
        raise ArtifactError(where, f"{error.where} {error.found}", _AGAIN) from error
    found = Generations(spec, config.quantizer_fingerprint, config.parts, folder.files)
    if wrong := _contradiction(config, found):
        raise ArtifactError(where, wrong, _AGAIN)
    return found, folder


def _contradiction(config: _Config, found: Generations) -> str | None:
    """What in a manifest does not fit the rest of it; None if all does."""
    generations = [part.generation for part in config.parts]
    if not generations or sorted(set(generations)) != list(range(1, generations[-1] + 1)):
        return f"generations {generations[:8]} are not 1, 2, 3 ..."
    if generations != sorted(generations):
        return "its parts are out of order"
    if sorted(part.file for part in config.parts) != sorted(found.files):
        return "its parts are not its files"
    for part in config.parts:
        if not 1 <= part.items <= part.last_id - part.first_id + 1:
            return f"{part.file} has {part.items} items from id {part.first_id} to {part.last_id}"
    if (config.generation, config.items) != (found.newest, sum(part.items for part in config.parts)):
        return f"generation {config.generation} and {config.items} items are not those of its parts"
    if config.fingerprint != found.lineage[-1]:
        return "its fingerprint does not fit its entries"
    return None


def _earlier(body: dict[str, Any], where: str) -> Contents:
    """A manifest of layout 1, which had no seal: files and parts were one list."""
    check_kind(where, body["kind"], body["version"], wanted=KIND, newest=1, holder="folder")
    parts = [{**part} for part in body["parts"]]
    files = {part["file"]: FileRecord(part.pop("bytes"), part.pop("sha256")) for part in parts}
    names = ("cardinalities", "quantizer_fingerprint", "generation", "items", "fingerprint")
    return Contents(1, {**{name: body[name] for name in names}, "parts": parts}, files)


def publish(path: Place, generations: Generations) -> None:
    """Replace the manifest atomically, then drop part files that it does not list."""
    config = _Config(
        generations.spec.cardinalities,
        generations.quantizer_fingerprint,
        generations.newest,
        sum(part.items for part in generations.parts),
        generations.lineage[-1],
        generations.parts,
    )
    plain = {**config._asdict(), "parts": [part._asdict() for part in config.parts]}
    files = {part.file: generations.files[part.file] for part in generations.parts}
    seal_folder(path, kind=KIND, version=VERSION, config=plain, files=files)
    drop_unlisted(path, set(files))


def listed_files(path: Place) -> set[str]:
    """Files of the catalog that is there, which a writer leaves until its own is published.

    Raises:
        SidError: the manifest is of another kind of artefact. One that is damaged lists nothing.
    """
    if not has_manifest(path):
        return set()
    try:
        return set(read(path)[0].files)
    except ArtifactError as error:
        if claims_kind(path) not in (None, KIND):
            raise SidError(
                str(path), "holds something that is not a catalog", "Choose another path."
            ) from error
    return set()


def drop_unlisted(path: Place, listed: set[str]) -> None:
    """Remove what failed or killed writers left; call with the lock held.

    Args:
        path: the catalog's folder.
        listed: files of its manifest.
    """
    if not path.is_dir():
        return
    if isinstance(path, Path):
        remove_leftovers(path)
    files: list[Place] = [*path.iterdir()]
    for file in files:
        if _LEFTOVER.fullmatch(file.name) and file.name not in listed and file.is_file():
            file.unlink()
