"""`ServedModel`: runs what ``export_model`` wrote, with torch and fbgemm alone."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchrec_sid.artifact import load_artifact
from torchrec_sid.errors import ArtifactError
from torchrec_sid.serving.request import Inputs, Request

KIND, VERSION = "served_model", 1
EXAMPLE_KIND = "served_model_example"
PROGRAM, MANIFEST, EXAMPLE = "program.pt2", "manifest.json", "example.safetensors"


class Example(NamedTuple):
    """What the model was exported with."""

    request: Request
    outputs: Tensor
    """What the exporting process computed."""


class ServedModel:
    """A program and what it reads.

    Example:
        See :func:`~torchrec_sid.serving.exporter.export_model`, which writes what this reads.
    """

    def __init__(self, folder: Path, program: Any, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest
        self.inputs = _inputs(manifest["inputs"])
        self._program = program

    @classmethod
    def load(cls, folder: str | Path, *, verify: bool = True) -> ServedModel:
        """Read a folder; nothing of the training code is imported, nothing is unpickled.

        Args:
            folder: written by ``export_model``.
            verify: compare the program with its hash first, which reads it once more.

        Raises:
            ArtifactError: a file is missing or altered, or the folder is of another kind or version.
        """
        import fbgemm_gpu  # noqa: F401  registers the operators of the look-ups

        folder = Path(folder)
        manifest = _read_manifest(folder / MANIFEST)
        path = folder / PROGRAM
        if not path.is_file():
            raise ArtifactError(str(path), "no such file", "Export the model again.")
        if verify:
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != manifest["program"]["sha256"]:
                raise ArtifactError(str(path), "not the program of its manifest", "Export the model again.")
        # It speaks of symbols that tracing left unused.
        logger = logging.getLogger("torch._export.serde.serialize")
        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            program = torch.export.load(path).module()
        finally:
            logger.setLevel(level)
        return cls(folder, program, manifest)

    def __call__(self, request: Request, *, check: bool = True) -> Tensor:
        """Rank ``[B]`` examples: what the model returned, one row per example.

        Args:
            request: on the CPU.
            check: refuse requests that the program would compute wrongly.

        Raises:
            SidError: see :meth:`~torchrec_sid.serving.request.Inputs.check`.
            RuntimeError: a SID or an id outside its range, named by feature.
        """
        if check:
            self.inputs.check(request)
        features = {name: tuple(request.features[name]) for name in self.inputs.features}
        extras = {name: request.extras[name] for name in self.inputs.extras}
        with torch.no_grad():
            answer: Tensor = self._program(request.dense, features, extras)
        return answer

    def example(self) -> Example:
        """The request that the model was exported with, and the answer of the exporting process."""
        tensors = load_artifact(self.folder / EXAMPLE, kind=EXAMPLE_KIND, version=VERSION).tensors
        return Example(Request.from_tensors(tensors, self.inputs), tensors["outputs"])


def _read_manifest(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ArtifactError(str(path), "no such file", "Pass a folder written by export_model.")
    try:
        manifest = json.loads(path.read_text())
        kind, version = manifest["kind"], manifest["version"]
        _inputs(manifest["inputs"])
        _ = manifest["program"]["sha256"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ArtifactError(str(path), f"damaged ({error})", "Export the model again.") from error
    if kind != KIND or version > VERSION:
        raise ArtifactError(
            str(path), f"{kind!r} of version {version}", f"This release reads {KIND!r} up to {VERSION}."
        )
    return dict(manifest)


def _inputs(plain: dict[str, Any]) -> Inputs:
    """From JSON, which has no tuples."""
    return Inputs(
        dense=plain["dense"],
        features=tuple(plain["features"]),
        extras={name: (dtype, tuple(shape)) for name, (dtype, shape) in plain["extras"].items()},
        rows_of=dict(plain["rows_of"]),
        max_lengths=dict(plain["max_lengths"]),
    )
