"""`ServedModel`: runs what ``export_model`` wrote, with torch and fbgemm alone."""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchrec_sid.artifact import (
    Contents,
    FileRecord,
    Place,
    RemotePath,
    SealedFolder,
    load_artifact,
    open_folder,
    save_artifact,
)
from torchrec_sid.artifact.place import same_path
from torchrec_sid.artifact.sealed import check_kind
from torchrec_sid.errors import ArtifactError, SidError
from torchrec_sid.serving.program_check import check_program
from torchrec_sid.serving.request import COUNTS, Inputs, Request

KIND, VERSION = "served_model", 3
EXAMPLE_KIND, EXAMPLE_VERSION = "served_model_example", 1
PROGRAM, EXAMPLE, ITEMS = "program.pt2", "example.safetensors", "items.safetensors"
ITEMS_KIND, ITEMS_VERSION = "served_items", 1


class ServedManifest(NamedTuple):
    """What the manifest of a served model says."""

    precision: str
    """Of the rows of its tables."""
    inputs: Inputs
    """What the program reads."""
    tolerance: float
    """Largest difference to the model it was made from that was allowed."""
    difference_to_eager: float
    """Largest difference that was found."""
    difference_to_float: float
    """Largest difference to the float model on the example."""
    identity: dict[str, Any]
    """What the weights depend on."""
    versions: dict[str, str | None]
    """Of the libraries that exported it."""


class ServedItems(NamedTuple):
    """What the program reads of each item, by the item's own id."""

    item_ids: Tensor
    """``[N]`` int64, distinct; an item's place here is its index in the program."""
    columns: Mapping[str, Tensor]
    """``[N]`` or ``[N, ...]`` each, by the name of its field without ``item_`` or ``history_``."""
    dense_names: tuple[str, ...]
    """Of the columns of ``dense``."""

    def write(self, path: Place) -> None:
        """Write ``items.safetensors``, in the order of the ids."""
        order = self.item_ids.argsort()
        columns = {f"column/{name}": column[order] for name, column in self.columns.items()}
        save_artifact(
            path,
            kind=ITEMS_KIND,
            version=ITEMS_VERSION,
            config={"dense": list(self.dense_names)},
            tensors={"item_ids": self.item_ids[order], "index": order, **columns},
        )


class Example(NamedTuple):
    """What the model was exported with."""

    request: Request
    outputs: Tensor
    """What the exporting process computed."""


class ServedModel:
    """A program and what it reads.

    Example:
        >>> model = ServedModel.load("out/run/served/int8")  # doctest: +SKIP
        >>> logits = model(Request(dense, {"item_sid": Bags(sids, ones), ...}, {}, {}))  # doctest: +SKIP
    """

    def __init__(self, folder: SealedFolder, program: Any, manifest: ServedManifest) -> None:
        self.folder = folder.path
        self.program_bytes = folder.files[PROGRAM].bytes
        """Size of the program with its weights."""
        self.files = tuple(folder.files)
        """Names in the folder."""
        self.manifest = manifest
        self.inputs = manifest.inputs
        self._program = program

    @classmethod
    def load(cls, folder: str | Place, *, verify: bool = True) -> ServedModel:
        """Read a folder; nothing of the training code is imported, nothing is unpickled.

        The program is inspected before torch loads it: see
        :func:`~torchrec_sid.serving.program_check.check_program`.

        Args:
            folder: written by ``export_model``, a local path or a URI.
            verify: compare program and example with their hashes first, which reads them once more.

        Raises:
            ArtifactError: a file is missing or altered, the folder is of another kind or version, or the
                program holds more than the operators of a model.
        """
        import fbgemm_gpu  # noqa: F401  registers the operators of the look-ups

        import torchrec_sid.models.user_attention
        import torchrec_sid.side  # noqa: F401  and those over histories

        opened = open_served(folder, verify=verify)
        manifest: ServedManifest = opened.read_config(ServedManifest)
        program = _load_program(opened)
        return cls(opened, program, manifest)

    def __call__(self, request: Request) -> Tensor:
        """Rank ``[B]`` examples: what the model returned, one row per example.

        A program that reads histories by user takes requests with ``counts``.

        Args:
            request: on the CPU.

        Raises:
            SidError: see :meth:`~torchrec_sid.serving.request.Inputs.check`.
            RuntimeError: a SID or an id outside its range, named by feature.
        """
        # Always: a program reads memory by the lengths that it is given.
        self.inputs.check(request)
        # In the order of the program.
        features = {name: tuple(request.features[name]) for name in self.inputs.features}
        extras = {name: request.extras[name] for name in self.inputs.extras}
        if request.counts is not None:
            extras[COUNTS] = request.counts
        with torch.no_grad():
            answer: Tensor = self._program(request.dense, features, extras)
        return answer

    def check_example(self) -> float:
        """Answer the example, and compare; returns the largest difference to the exporting process.

        Raises:
            SidError: it is above the tolerance of the export.
        """
        example = self.example()
        difference = float((self(example.request) - example.outputs).abs().max())
        if not difference <= self.manifest.tolerance:
            raise SidError(
                str(self.folder), f"its answers are off by {difference:g}", "Export the model again here."
            )
        return difference

    def example(self) -> Example:
        """The request that the model was exported with, and the answer of the exporting process.

        Raises:
            ArtifactError: it is missing, altered, or not of this program.
        """
        path = self.folder / EXAMPLE
        tensors = load_artifact(path, kind=EXAMPLE_KIND, version=EXAMPLE_VERSION).tensors
        try:
            return Example(Request.from_tensors(tensors, self.inputs), tensors["outputs"])
        except KeyError as error:
            raise ArtifactError(str(path), f"lacks {error}", "Export the model again.") from error


def _load_program(folder: SealedFolder) -> Any:
    where = f"{folder.path}/{PROGRAM}"
    # It speaks of symbols that tracing left unused.
    logger = logging.getLogger("torch._export.serde.serialize")
    level = logger.level
    with folder.open(PROGRAM) as file:
        source = io.BytesIO(file.read()) if isinstance(folder.path, RemotePath) else file
        check_program(source, where)
        logger.setLevel(logging.ERROR)
        try:
            return torch.export.load(same_path(source) or source).module()
        except Exception as error:  # whatever the deserialiser of a damaged graph runs into
            raise ArtifactError(
                where, f"cannot be loaded ({type(error).__name__})", "Export the model again."
            ) from error
        finally:
            logger.setLevel(level)


def open_served(folder: str | Place, *, verify: bool = False) -> SealedFolder:
    """The sealed folder of a served model.

    Raises:
        ArtifactError: see :meth:`ServedModel.load`.
    """
    return open_folder(
        folder,
        kind=KIND,
        version=VERSION,
        verify=verify,
        earlier=_earlier,
        remedy="Pass a folder written by export_model.",
    )


def _earlier(body: dict[str, Any], where: str) -> Contents:
    """A manifest of layout 1, without a seal."""
    check_kind(where, body["kind"], body["version"], wanted=KIND, newest=1, holder="folder")
    program = FileRecord(body["program"]["bytes"], body["program"]["sha256"])
    return Contents(1, {name: body[name] for name in ServedManifest._fields}, {PROGRAM: program})
