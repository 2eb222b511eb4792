"""`export_model`: a ranking model with SID collections as one folder that needs none of its code.

The program is a graph of torch.export: transforms from SIDs (or from ids and a catalog) to rows, look-ups
in float or quantized tables, and the dense part. TorchScript would need every module of a model in its
subset of Python, is no longer developed, and cannot take TorchRec's quantized collections uncalled; a graph
takes any straight-line model.
"""

from __future__ import annotations

import copy
import itertools
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_sid.artifact import (
    Place,
    RemotePath,
    folder_lock,
    locate,
    record_file,
    save_artifact,
    seal_folder,
    whole_folder,
    write_atomically,
)
from torchrec_sid.data.prepared import PreparedLog
from torchrec_sid.errors import SidError
from torchrec_sid.models.request_rows import REQUEST, REQUEST_ROW, RequestRows
from torchrec_sid.serving.quantized import Precision, quantize_tables
from torchrec_sid.serving.request import COUNTS, Inputs, Request
from torchrec_sid.serving.served_features import FEATURES, ServedFeatures
from torchrec_sid.serving.served_model import (
    EXAMPLE,
    EXAMPLE_KIND,
    EXAMPLE_VERSION,
    ITEMS,
    KIND,
    PROGRAM,
    VERSION,
    ServedItems,
    ServedManifest,
)


@dataclass(frozen=True)
class ExportOptions:
    """How a model is exported.

    Raises:
        SidError: a tolerance that is not positive.
    """

    precision: Precision = "float"
    """Of the rows of the tables."""
    tolerance: float = 1e-5
    """Largest difference of any output of the program to the model that is exported."""

    def __post_init__(self) -> None:
        if not self.tolerance > 0:
            raise SidError("ExportOptions.tolerance", f"{self.tolerance}", "Give a positive number.")


class ExportReport(NamedTuple):
    """What was written."""

    folder: Place
    bytes: int
    """Of the program with its weights."""
    difference: float
    """Largest difference of the program to the model with the same rows, over all requests tried."""
    quantization: float
    """Largest difference to the float model on the example."""
    outputs: Tensor
    """What the program answers to the example."""


def export_model(
    model: nn.Module,
    example: Request,
    folder: str | Place,
    options: ExportOptions | None = None,
    *,
    max_lengths: Mapping[str, int] | None = None,
    together: Sequence[Sequence[str]] = (),
    ranges: Mapping[str, tuple[int, int]] | None = None,
    identity: Mapping[str, Any] | None = None,
    items: ServedItems | None = None,
    log: PreparedLog | None = None,
) -> ExportReport:
    """Write a model as a program, and check that it answers as the model does.

    It is tried on the example, on one row (or user), on two, in another order and on empty bags.

    Args:
        model: unsharded; called as ``model(dense, KeyedJaggedTensor, **extras)``, returns a tensor with a
            row per example. It is copied and not changed.
        example: at least two rows; no feature without a value. Sizes of requests to come are free. With
            ``counts``, the program takes users with several candidates: give two users or more, and one of
            them several.
        folder: a local path or a URI, written anew as a whole: ``program.pt2``, ``manifest.json``,
            ``example.safetensors``.
        options: precision and tolerance.
        max_lengths: feature -> most values of an example that the model reads; longer requests are refused.
        together: features of one history: requests with more of one than of another are refused.
        ranges: feature -> smallest and largest value that the model knows; others are refused.
        identity: JSON-serialisable, kept in the manifest: what the weights depend on.
        items: what the program reads of each item; with it, :class:`~torchrec_sid.serving.ranker.Ranker`
            and the server take the items' own ids.
        log: whose specification's features go with it, with their vocabularies and scales.

    Raises:
        SidError: an example that shows too little, a model that cannot be traced, or answers that differ.

    Example:
        >>> import tempfile
        >>> from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
        >>> from torchrec.models.dlrm import DLRM
        >>> from torchrec_sid.serving.request import Bags
        >>> from torchrec_sid.serving.served_model import ServedModel
        >>> table = EmbeddingBagConfig(name="t", feature_names=["item"], embedding_dim=8, num_embeddings=50)
        >>> model = DLRM(EmbeddingBagCollection(tables=[table]), 4, [8], [8, 1])
        >>> items = Bags(torch.tensor([3, 1, 4, 1, 5]), torch.tensor([2, 3]))
        >>> example = Request(torch.rand(2, 4), {"item": items}, {}, {})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = export_model(model, example, folder, ExportOptions("int8"))
        ...     logits = ServedModel.load(folder)(example)
        >>> torch.equal(logits, report.outputs)
        True
    """
    options = options or ExportOptions()
    limits = dict(max_lengths or {})
    inputs = _inputs(example, limits)._replace(
        together=tuple(tuple(group) for group in together), ranges=dict(ranges or {})
    )
    inputs.check(example)
    _check_example(example)
    # Quantizing swaps the tables of the copy only.
    eager = quantize_tables(copy.deepcopy(model).eval().requires_grad_(False), options.precision)
    program = Program(eager, inputs.features, inputs.by_user)
    exported = _trace(program, example)
    difference = _compare(exported, program, example, options.tolerance, limits)
    with torch.no_grad():
        expected = _answer(exported.module(), example)
        plain = _answer(Program(copy.deepcopy(model).eval(), inputs.features, inputs.by_user), example)
    quantization = float((expected - plain).abs().max())
    manifest = ServedManifest(
        options.precision,
        inputs,
        options.tolerance,
        difference,
        quantization,
        dict(identity or {}),
        {name: _version(name) for name in ("torch", "fbgemm-gpu-cpu", "fbgemm-gpu")},
    )
    place = locate(folder)
    tensors = example.to_tensors() | {"outputs": expected}
    size = _publish(place, exported, manifest, tensors, items, log)
    return ExportReport(place, size, difference, quantization, expected)


def _publish(
    place: Place,
    exported: ExportedProgram,
    manifest: ServedManifest,
    tensors: dict[str, Tensor],
    items: ServedItems | None,
    log: PreparedLog | None,
) -> int:
    """Write the folder, on a local disk as a whole or not at all; the program's size."""
    if isinstance(place, RemotePath):
        return _write(place, exported, manifest, tensors, items, log)
    with folder_lock(place), whole_folder(place, KIND) as work:
        return _write(work, exported, manifest, tensors, items, log)


def _write(
    place: Place,
    exported: ExportedProgram,
    manifest: ServedManifest,
    tensors: dict[str, Tensor],
    items: ServedItems | None,
    log: PreparedLog | None,
) -> int:
    _write_program(place / PROGRAM, exported)
    save_artifact(place / EXAMPLE, kind=EXAMPLE_KIND, version=EXAMPLE_VERSION, config={}, tensors=tensors)
    config = {**manifest._asdict(), "inputs": manifest.inputs._asdict()}
    names = [PROGRAM, EXAMPLE]
    if items is not None:
        items.write(place / ITEMS)
        names.append(ITEMS)
    if log is not None and ServedFeatures.write(log, place / FEATURES):
        names.append(FEATURES)
    files = {name: record_file(place, name) for name in names}
    seal_folder(place, kind=KIND, version=VERSION, config=config, files=files)
    return files[PROGRAM].bytes


class Program(nn.Module):
    """A model that takes tensors only.

    Args:
        model: called as ``model(dense, KeyedJaggedTensor, **extras)``.
        keys: order of the features in the KeyedJaggedTensor.
        by_user: those that have a bag per user; the model then reads
            :class:`~torchrec_sid.models.request_rows.RequestRows`.
    """

    def __init__(self, model: nn.Module, keys: tuple[str, ...], by_user: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.model = model
        self._keys, self._by_user = list(keys), by_user

    def forward(
        self, dense: Tensor, features: dict[str, tuple[Tensor, Tensor]], extras: dict[str, Tensor]
    ) -> Tensor:
        """``[B, F]``, name -> (values ``[n]``, lengths ``[B]``), name -> extra -> the model's output.

        By user, ``extras["counts"]`` ``[U]`` says how many rows are each user's, and features by user have
        lengths ``[U]``.
        """
        lengths = {name: features[name][1] for name in self._keys}
        if self._by_user:
            extras = dict(extras)
            requests = RequestRows.consecutive(extras.pop(COUNTS), dense.shape[0])
            extras |= {REQUEST: requests.request, REQUEST_ROW: requests.row}
            nothing = torch.zeros_like(requests.request)
            for name in self._by_user:
                lengths[name] = nothing.index_copy(0, requests.row, lengths[name])
        values = [features[name][0] for name in self._keys]
        # Given here, sizes and offsets stay those of the inputs; TorchRec would make data of them.
        sizes = [value.shape[0] for value in values]
        kjt = KeyedJaggedTensor(
            keys=self._keys,
            values=torch.cat(values),
            lengths=torch.cat([lengths[name] for name in self._keys]),
            stride=dense.shape[0],
            length_per_key=sizes,
            offset_per_key=[0, *itertools.accumulate(sizes)],
        )
        answer: Tensor = self.model(dense, kjt, **extras)
        return answer


def _inputs(example: Request, limits: dict[str, int]) -> Inputs:
    extras = {name: (str(t.dtype), tuple(t.shape[1:])) for name, t in example.extras.items()}
    features = tuple(example.features)
    for name in limits:
        if name not in features:
            raise SidError("max_lengths", f"{name!r}", f"The example has {list(features)}.")
    own = (example.dense.shape[1], features, extras, dict(example.rows_of), limits)
    return Inputs(*own, by_user=example.by_user)


def _check_example(example: Request) -> None:
    if example.users < 2:
        raise SidError(
            "example", f"{example.users} rows", "Give two or more: sizes of 0 and 1 say too little."
        )
    if example.users == example.rows and example.counts is not None:
        raise SidError("example", "one candidate of every user", "Give one of them several.")
    for name, bags in example.features.items():
        if len(bags.values) < 2:
            raise SidError(
                f"example, feature {name!r}", f"{len(bags.values)} values", "Give two or more in all."
            )


def _trace(program: Program, example: Request) -> ExportedProgram:
    free = {0: Dim.DYNAMIC}
    shapes = (
        free,
        dict.fromkeys(example.features, (free, free)),
        dict.fromkeys(example.arguments()[2], free),
    )
    with torch.no_grad(), _quietly():
        try:
            return torch.export.export(program, example.arguments(), dynamic_shapes=shapes, strict=False)
        except Exception as error:  # torch.export raises whatever the traced code does
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise SidError(
                "export_model",
                f"the model cannot be traced ({type(error).__name__}: {reason[0]})",
                "Keep tensors from deciding what Python does in its forward; see the traceback above.",
            ) from error


def _compare(
    exported: ExportedProgram, program: Program, example: Request, tolerance: float, limits: dict[str, int]
) -> float:
    users = example.users
    runs = exported.module()
    requests = [
        example,
        example.take([0]),
        example.take([users - 1, 0]),
        example.take([*reversed(range(users)), *range(users)]),
        example.without_values(sorted(limits)),
        example.take([0]).without_values(sorted(limits)),
    ]
    worst = 0.0
    with torch.no_grad():
        for request in requests:
            wanted = _answer(program, request)
            try:
                found = _answer(runs, request)
            except RuntimeError as error:
                raise SidError(
                    "export_model",
                    f"the program does not take {request.rows} rows ({error})",
                    "Its sizes must be free: let no size decide what the model does.",
                ) from error
            difference = (
                float((found - wanted).abs().max()) if found.shape == wanted.shape else float("inf")
            )
            if not difference <= tolerance:
                raise SidError(
                    "export_model",
                    f"on {request.rows} rows the program differs from the model by {difference:g}",
                    f"Outputs must agree within {tolerance:g}.",
                )
            worst = max(worst, difference)
    return worst


def _answer(program: Any, request: Request) -> Tensor:
    result: Tensor = program(*request.arguments())
    return result


def _write_program(path: Place, exported: ExportedProgram) -> None:
    # They would be pickled; the example lies beside the program.
    exported._example_inputs = None
    for node in exported.graph.nodes:
        # Where the code stood on this machine is nobody's business.
        node.meta.pop("stack_trace", None)
    with _quietly():
        # The archive holds its own file name, which write_atomically leaves as it is.
        write_atomically(path, lambda temporary: torch.export.save(exported, temporary))


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


@contextmanager
def _quietly() -> Iterator[None]:
    """Without warnings about torch's own internals that a user can do nothing about."""
    loggers = [logging.getLogger(), logging.getLogger("torch.fx._symbolic_trace")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
