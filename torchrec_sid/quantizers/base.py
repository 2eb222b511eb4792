"""What every quantizer is: guards, the walk over levels, artefacts, and the registry of all of them.

A subclass holds one idea: how levels are learned (:meth:`Quantizer.fit`), how a batch becomes codes and
codes become vectors (:meth:`Quantizer._encode`, :meth:`Quantizer._decode`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from torchrec_sid.artifact import fingerprint, load_artifact, read_manifest, save_artifact
from torchrec_sid.errors import ArtifactError, SidError
from torchrec_sid.plugins import Registry
from torchrec_sid.quantizers.kmeans import assign
from torchrec_sid.quantizers.renaming import CodeGroup, Renaming
from torchrec_sid.spec import SidSpec
from torchrec_sid.streams import EmbeddingStream, open_stream

_SCORES = 1_000_000  # hypotheses scored at a time: 4 MB of float32
_PROBES = 64
_TOLERANCE = 1e-5


class Quantized(NamedTuple):
    """The result of quantizing a batch in training."""

    codes: Tensor
    """``[N, L]`` int64."""
    reconstruction: Tensor
    """``[N, d]`` float32, the decoded embedding x_hat."""
    loss: Tensor
    """Scalar float32 training loss of the quantizer."""


@dataclass(frozen=True)
class FitReport:
    """What a fit did."""

    rows: int
    """Embeddings seen in one pass."""
    seconds: float
    """Wall-clock seconds."""
    fvu: tuple[float, ...]
    """Fraction of variance unexplained on the training data after each level (or stage)."""


class AdditiveDecoder(NamedTuple):
    """A decoder ``mean + sum_l tables[l][c_l]``, detached and on the CPU."""

    mean: Tensor
    """``[d]`` float32."""
    tables: tuple[Tensor, ...]
    """Per level ``[K_l, d]`` float32, or ``[1, d]``: a direction, multiplied by ``c - (K_l - 1) / 2``."""


class Quantizer(nn.Module, ABC):
    """Learns SIDs from content. Learned state lives in buffers and parameters.

    A subclass sets :attr:`kind` and :attr:`config_type`, takes ``(dim, config, *, device)`` where
    ``config`` is a frozen dataclass of JSON-serialisable fields, and registers its tensors (of their final
    shapes) at construction, so that :meth:`load` can fill them in. With ``@register_quantizer`` above it,
    artefacts and commands know it by its kind.

    Args:
        dim: d, the width of the vectors that it encodes and decodes.
        config: of :attr:`config_type`.
        device: where the state lives, and where batches are moved to.
    """

    kind: ClassVar[str]
    """Name of the quantizer in artefacts and on the command line."""
    layout_version: ClassVar[int] = 1
    """Grows when the saved layout changes."""
    config_type: ClassVar[type[Any]]
    """The frozen dataclass of :attr:`config`."""
    fuses: ClassVar[bool] = False
    """Whether it is made for several sources by name, and reads a mapping, instead of one embedding."""
    trains: ClassVar[bool] = False
    """Whether its ``fit`` takes ``checkpoint``, ``checkpoint_every`` and ``group`` too."""

    fitted: Tensor
    """Scalar bool buffer."""

    def __init__(self, dim: int, config: Any, *, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.dim = dim
        self.config = config
        self.register_buffer("fitted", torch.tensor(False, device=device))
        # An artefact of an older layout keeps it, and with it the fingerprint that catalogs recorded.
        self._layout = self.layout_version

    @property
    @abstractmethod
    def spec(self) -> SidSpec:
        """The shape of the SIDs it makes."""

    @abstractmethod
    def fit(self, data: Any, *, progress: bool = False) -> FitReport:
        """Learn from embeddings: anything :meth:`rows` takes."""

    @abstractmethod
    def _encode(self, x: Tensor, beam: int) -> Tensor:
        """Checked vectors ``[n, dim]`` on :attr:`device` -> codes ``[n, L]`` int64."""

    @abstractmethod
    def _decode(self, codes: Tensor) -> Tensor:
        """Checked codes ``[n, l]`` of any prefix, on :attr:`device` -> vectors ``[n, dim]``."""

    @property
    def code_groups(self) -> tuple[CodeGroup, ...]:
        """Levels whose codes can bear other names, in order; none unless a subclass says so."""
        return ()

    @torch.no_grad()
    def rename_codes(self, renaming: Renaming) -> None:
        """Give the codes other names, in place: :meth:`encode` then gives ``renaming.apply`` of its codes.

        Raises:
            SidError: not fitted, or more than names would change.
        """
        self.require_fitted()
        renaming.check(self.spec, self.code_groups)
        self._rename(renaming)

    def _rename(self, renaming: Renaming) -> None:
        """Put rows where :attr:`code_groups` says they may stand; of a subclass that has some."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where the state lives."""
        return self.fitted.device

    def rows(self, data: Any, *, name: str = "embeddings") -> EmbeddingStream:
        """The vectors ``[n, dim]`` float32 that :meth:`encode` reads of ``data``, as a stream.

        They are also what :meth:`decode` approximates, so that errors are measured between the two.

        Args:
            data: anything :func:`~torchrec_sid.streams.open_stream` takes.
            name: what to call it in an error; files use their path.

        Raises:
            SidError: bad data, or another dimension than ``dim``.
        """
        stream = open_stream(data, name=name)
        if stream.dim != self.dim:
            raise SidError(
                stream.name,
                f"embeddings of {stream.dim} dimensions",
                f"This quantizer was made for {self.dim}.",
            )
        return stream

    @torch.no_grad()
    def encode(self, x: Any, *, beam: int = 1) -> Tensor:
        """Embeddings -> codes ``[N, L]`` int64, on the quantizer's device.

        Args:
            x: anything :meth:`rows` takes, read in batches; a tensor or array may be empty.
            beam: hypotheses kept per level. 1 is greedy: every prefix is the best of its length. 5 to 16
                lower the error by some percent at several times the cost and seldom change level 1.
                Codebooks are fitted greedily either way, so that a prefix means the same for every item.

        Raises:
            SidError: not fitted, another dimension, a NaN or an infinity, or a beam below 1.
        """
        self.require_fitted()
        if beam < 1:
            raise SidError(f"{type(self).__name__}.encode", f"beam {beam}", "Choose 1 or more.")
        nothing = torch.zeros(0, self.spec.levels, dtype=torch.int64, device=self.device)
        if isinstance(x, (Tensor, np.ndarray)) and tuple(x.shape) == (0, self.dim):
            return nothing
        codes = [self._encode(batch.to(self.device), beam) for batch in self.rows(x)]
        return torch.cat([nothing, *codes])

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes ``[N, l]``, any prefix ``1 <= l <= L`` -> vectors ``[N, dim]`` float32.

        Raises:
            SidError: not fitted, no or too many levels, a code outside its alphabet.
        """
        return self._decode(self._checked(codes))

    def additive_decoder(self) -> AdditiveDecoder:
        """The decoder as a sum over levels, which SIDE computes with, read off by decoding unit changes.

        Quantizers that decode a latent by networks give the decoder of the latent. Levels whose table is
        linear in the centred digit ``c - (K - 1) / 2`` come as one direction.

        Raises:
            SidError: not fitted, or the decoder is not a sum over levels.
        """
        spec = self.spec
        zero = torch.zeros(1, spec.levels, dtype=torch.int64)
        base = self.decode(zero).float().cpu()[0]
        mean, tables = base.clone(), []
        for level, k in enumerate(spec.cardinalities):
            codes = zero.repeat(k, 1)
            codes[:, level] = torch.arange(k)
            book = self.decode(codes).float().cpu() - base
            digit = torch.arange(k).float() - (k - 1) / 2
            step = (book[-1] - book[0]) / (k - 1)
            offset = book[0] - digit[0] * step
            limit = _TOLERANCE * torch.maximum(book.abs().max(), base.abs().max())
            # Two codes are always on a line, yet a two-row codebook and a digit cost the same.
            linear = k <= 256 and bool((digit[:, None] * step + offset - book).abs().max() <= limit)
            tables.append(step[None] if linear else book)
            mean += offset if linear else 0
        decoder = AdditiveDecoder(mean, tuple(tables))
        generator = torch.Generator().manual_seed(0)
        probe = torch.stack(
            [torch.randint(k, (_PROBES,), generator=generator) for k in spec.cardinalities], 1
        )
        truth = self.decode(probe).float().cpu()
        error = (_sum_of(decoder, spec, probe) - truth).abs().max() / truth.abs().max().clamp_min(1e-30)
        if not float(error) <= _TOLERANCE:
            raise SidError(
                type(self).__name__,
                f"decoder that is not a sum over levels (relative error {float(error):.2g})",
                "Choose a quantizer with codebooks or digits that add up, or override additive_decoder.",
            )
        return decoder

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of kind, configuration and learned state; what a catalog records."""
        return fingerprint(self.kind, self._layout, self.manifest(), self.state_dict())

    def save(self, path: str | Path) -> str:
        """Write one safetensors file atomically and return the fingerprint.

        Raises:
            SidError: the quantizer has not been fitted.
        """
        self.require_fitted()
        return save_artifact(
            path, kind=self.kind, version=self._layout, config=self.manifest(), tensors=self.state_dict()
        )

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a quantizer written by :meth:`save`, on the CPU, in eval mode.

        Raises:
            ArtifactError: missing, truncated, altered, or another kind of artefact.
        """
        artifact = load_artifact(path, kind=cls.kind, version=cls.layout_version)
        try:
            quantizer = cls.from_manifest(artifact.config)
            quantizer.load_state_dict(artifact.tensors)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ArtifactError(
                str(path), f"its configuration does not fit its tensors ({error})", "Fit it again."
            ) from error
        quantizer._layout = read_manifest(path).version
        return quantizer.eval()

    def manifest(self) -> dict[str, Any]:
        """Shape and configuration in JSON form; of :attr:`layout_version`, or of the file it came from."""
        config: dict[str, Any] = asdict(self.config)
        return {"dim": self.dim, "config": config}

    @classmethod
    def from_manifest(cls, manifest: dict[str, Any]) -> Self:
        """Build an unfitted quantizer from :meth:`manifest`."""
        return cls(manifest["dim"], cls.config_from_json(manifest["config"]))

    @classmethod
    def config_from_json(cls, fields: dict[str, Any]) -> Any:
        """The configuration from its JSON form, where tuples are lists."""
        # Values stay as they are (2 where 2.0 is meant): they are part of the fingerprint.
        return cls.config_type(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})

    def require_fitted(self) -> None:
        """Raise SidError unless :meth:`fit` or :meth:`load` has run."""
        if not bool(self.fitted):
            raise SidError(type(self).__name__, "not fitted", "Call fit(...) or load(...) first.")

    def _checked(self, codes: Tensor) -> Tensor:
        """Codes ``[N, l]`` that can be decoded, on the quantizer's device."""
        self.require_fitted()
        depth = codes.shape[1] if codes.dim() == 2 else 0
        if not 1 <= depth <= self.spec.levels:
            raise SidError(
                "codes",
                f"shape {tuple(codes.shape)}",
                f"Pass 1 to {self.spec.levels} levels: [N, l] codes of a prefix.",
            )
        self.spec.truncated(depth).validate(codes)
        return codes.to(self.device)


def _sum_of(decoder: AdditiveDecoder, spec: SidSpec, codes: Tensor) -> Tensor:
    total = decoder.mean.expand(len(codes), -1)
    for level, (k, table) in enumerate(zip(spec.cardinalities, decoder.tables, strict=True)):
        centred = codes[:, level].float() - (k - 1) / 2
        total = total + (table[codes[:, level]] if len(table) == k else centred[:, None] * table)
    return total


# ---- the registry

QUANTIZERS: Registry[type[Quantizer]] = Registry("quantizer")
"""Every quantizer by its kind, those of plugins among them."""

Q = TypeVar("Q", bound=type[Quantizer])


def register_quantizer(cls: Q) -> Q:
    """Class decorator: artefacts and commands know the quantizer by its ``kind`` from here on.

    Raises:
        SidError: the kind belongs to another class.
    """
    QUANTIZERS.add(cls.kind, cls)
    return cls


def quantizer_of(config: Any) -> type[Quantizer]:
    """The registered class that a configuration is of.

    Raises:
        SidError: of none.
    """
    for kind in QUANTIZERS:
        if QUANTIZERS[kind].config_type is type(config):
            return QUANTIZERS[kind]
    known = ", ".join(QUANTIZERS[kind].config_type.__name__ for kind in QUANTIZERS)
    raise SidError("quantizer", f"a {type(config).__name__}", f"Pass a configuration: one of {known}.")


def make_quantizer(shape: Any, config: Any, *, device: torch.device | str | None = None) -> Quantizer:
    """The quantizer that a configuration is of, not fitted yet, on ``device``.

    Args:
        shape: d, the width of the embeddings; of a quantizer that fuses, its sources by name.
        config: of a registered quantizer.
        device: where its state lives.
    """
    return quantizer_of(config)(shape, config, device=device)


def load_quantizer(path: str | Path) -> Quantizer:
    """Read a quantizer written by :meth:`Quantizer.save`, of the class that its manifest names.

    Raises:
        ArtifactError: missing, truncated, altered, or not a quantizer.
    """
    kind = read_manifest(path).kind
    if kind not in QUANTIZERS:
        raise ArtifactError(
            str(path),
            f"holds a {kind!r}",
            f"Pass a quantizer: one of {sorted(QUANTIZERS)}, or the plugin that has it.",
        )
    return QUANTIZERS[kind].load(path)


# ---- the walk over levels


def walk_levels(x: Tensor, codebooks: Sequence[Tensor], used: Sequence[Tensor], beam: int = 1) -> Tensor:
    """Codes whose sum of codewords is near to each row, level by level.

    Greedily each level takes the codeword nearest to what is left. A beam keeps several hypotheses: the
    squared error of one grows at level l by ``|c|^2 - 2 x.c + 2 sum_m c.c_m`` over the codes ``c_m`` chosen
    before. All three terms are look-ups: ``x.c`` comes from one matrix product per level and ``c.c_m`` from
    tables between codebooks, so a beam costs no product in the dimension d.

    Args:
        x: ``[N, d]`` float32, mean removed.
        codebooks: per level ``[K_l, d]`` float32.
        used: per level ``[K_l]`` bool; codes that are False are never chosen.
        beam: hypotheses kept per row and level.

    Returns:
        ``[N, L]`` int64, the best hypothesis.
    """
    if beam == 1:
        return _walk_greedily(x, codebooks, used)
    norms = [
        book.square().sum(1).masked_fill(~mask, torch.inf)
        for book, mask in zip(codebooks, used, strict=True)
    ]
    cross = [[earlier @ book.T for earlier in codebooks[:level]] for level, book in enumerate(codebooks)]
    rows = max(1, _SCORES // (beam * max(len(book) for book in codebooks)))
    found = [_search(part, codebooks, norms, cross, beam) for part in x.split(rows)]
    return torch.cat(found) if found else x.new_zeros(0, len(codebooks), dtype=torch.int64)


def _walk_greedily(x: Tensor, codebooks: Sequence[Tensor], used: Sequence[Tensor]) -> Tensor:
    columns = []
    for level, (book, mask) in enumerate(zip(codebooks, used, strict=True)):
        columns.append(assign(x, book, mask).codes)
        if level + 1 < len(codebooks):
            x = x - book[columns[-1]]
    return torch.stack(columns, dim=1)


def _search(
    x: Tensor,
    codebooks: Sequence[Tensor],
    norms: Sequence[Tensor],
    cross: Sequence[Sequence[Tensor]],
    beam: int,
) -> Tensor:
    error = x.new_zeros(len(x), 1)
    codes = torch.zeros(len(x), 1, 0, dtype=torch.int64, device=x.device)
    for level, book in enumerate(codebooks):
        gain = torch.addmm(norms[level], x, book.T, alpha=-2).unsqueeze(1)  # [n, 1, K]
        score = error.unsqueeze(2) + gain  # [n, beams, K]
        for earlier, table in enumerate(cross[level]):
            score.add_(table[codes[:, :, earlier]], alpha=2)
        best = score.flatten(1).topk(min(beam, score[0].numel()), largest=False)
        # Hypotheses through unused codes have an infinite error and are never extended into the best.
        error, origin, code = best.values, best.indices // len(book), best.indices % len(book)
        codes = codes.gather(1, origin.unsqueeze(2).expand(-1, -1, level))
        codes = torch.cat([codes, code.unsqueeze(2)], dim=2)
    return codes[:, 0]
