"""SentencePiece models over SIDs: which runs of codes are worth a row of their own.

A SID is a sentence of L symbols, one symbol per (level, code), so that equal codes of different levels
never share a piece (arXiv 2306.08121). The model is trained by the sentencepiece library; what is kept is
its pieces as numbers: where a piece starts and stops, its codes as packed bits, its score.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from torchrec_sid.artifact import fingerprint, load_artifact, save_artifact
from torchrec_sid.artifact.typed import MismatchError, read_typed
from torchrec_sid.errors import ArtifactError, SidError
from torchrec_sid.spec import SidSpec

KIND = "sid_pieces"
_VERSION = 1
# CJK ideographs take three bytes in UTF-8 and no normalisation or script rule touches them; beyond
# them, the private plane 15 has room for 65,533 symbols.
_CJK, _CJK_SIZE = 0x4E00, 20_992
_PRIVATE, _PRIVATE_SIZE = 0xF0000, 65_533
UNK = 0
"""Id of the piece for symbols that no piece holds."""


@dataclass(frozen=True)
class PieceTrainerConfig:
    """How to train pieces.

    Args:
        vocab_size: most pieces, the unknown one included; the trainer stops earlier where no further run
            of codes repeats.
        model: unigram language model, or byte-pair encoding.
        all_symbols: give every code of every level a piece, whether or not it occurs, so that no SID ever
            has an unknown symbol.
        max_piece_levels: most levels in one piece; None: all.

    Raises:
        SidError: a vocabulary or a length that cannot be.
    """

    vocab_size: int
    model: Literal["unigram", "bpe"] = "unigram"
    all_symbols: bool = True
    max_piece_levels: int | None = None

    def __post_init__(self) -> None:
        if self.model not in ("unigram", "bpe"):
            raise SidError("PieceTrainerConfig", f"model={self.model!r}", "Choose 'unigram' or 'bpe'.")
        if self.vocab_size < 2:
            raise SidError("PieceTrainerConfig", f"vocab_size={self.vocab_size}", "Give at least 2.")
        if self.max_piece_levels is not None and self.max_piece_levels < 1:
            raise SidError(
                "PieceTrainerConfig", f"max_piece_levels={self.max_piece_levels}", "Give at least 1."
            )


class SidPieces:
    """A trained vocabulary: piece ``i`` is the codes ``bits[i]`` of levels ``starts[i] .. stops[i] - 1``.

    Piece 0 is the unknown symbol and has ``starts == stops``.

    Args:
        spec: shape of the SIDs, at most 63 bits.
        config: how it was trained.
        starts: ``[V]`` int64, first level.
        stops: ``[V]`` int64, one past the last.
        bits: ``[V]`` int64, the codes packed as in ``SidSpec``, last level in the lowest bits.
        scores: ``[V]`` float32, log-probability (unigram) or minus the rank of the merge (BPE).
        model_proto: ``[bytes]`` uint8, the model as the sentencepiece library reads it.
        pieces_per_item: weighted mean over the SIDs it was trained on; what the planner is told.
    """

    def __init__(
        self,
        spec: SidSpec,
        config: PieceTrainerConfig,
        *,
        starts: Tensor,
        stops: Tensor,
        bits: Tensor,
        scores: Tensor,
        model_proto: Tensor,
        pieces_per_item: float = 1.0,
    ) -> None:
        self.spec = spec
        self.config = config
        self.starts, self.stops, self.bits, self.scores = starts, stops, bits, scores
        self.model_proto = model_proto
        self.pieces_per_item = pieces_per_item

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of everything that defines the vocabulary."""
        return fingerprint(KIND, _VERSION, self._manifest(), self._tensors())

    def save(self, path: str | Path) -> str:
        """Write one safetensors file atomically; returns the fingerprint."""
        return save_artifact(
            path, kind=KIND, version=_VERSION, config=self._manifest(), tensors=self._tensors()
        )

    @classmethod
    def load(cls, path: str | Path) -> SidPieces:
        """Read a vocabulary back.

        Raises:
            ArtifactError: missing, truncated, altered, another kind of artefact, or pieces that are no runs
                of its codes.
        """
        artifact = load_artifact(path, kind=KIND, version=_VERSION)
        try:
            saved = read_typed(_Saved, artifact.config)
            spec = SidSpec(saved.cardinalities)
            wrong = _contradiction(spec, artifact.tensors)
        except (MismatchError, SidError) as error:
            wrong = str(error)
        if wrong is not None:
            raise ArtifactError(str(path), f"is damaged ({wrong})", "Train the pieces again.")
        return cls(spec, saved.trainer, pieces_per_item=saved.pieces_per_item, **artifact.tensors)

    def processor(self) -> Any:
        """The ``SentencePieceProcessor`` of the sentencepiece library; feed it :func:`to_sentences`."""
        from sentencepiece import SentencePieceProcessor  # only training and checking need the library

        return SentencePieceProcessor(model_proto=self.model_proto.numpy().tobytes())

    def _manifest(self) -> dict[str, Any]:
        return {
            "cardinalities": list(self.spec.cardinalities),
            "trainer": asdict(self.config),
            "pieces_per_item": self.pieces_per_item,
        }

    def _tensors(self) -> dict[str, Tensor]:
        names = ("starts", "stops", "bits", "scores", "model_proto")
        return {name: getattr(self, name) for name in names}


class _Saved(NamedTuple):
    """The configuration in a file."""

    cardinalities: tuple[int, ...]
    trainer: PieceTrainerConfig
    pieces_per_item: float


def _contradiction(spec: SidSpec, tensors: dict[str, Tensor]) -> str | None:
    """What in a file's tensors is no vocabulary over SIDs of ``spec``; None if all is."""
    pieces = len(tensors["scores"]) if "scores" in tensors and tensors["scores"].dim() == 1 else -1
    whole, real = torch.int64, torch.float32
    kinds = {"starts": whole, "stops": whole, "bits": whole, "scores": real, "model_proto": torch.uint8}
    if set(tensors) != set(kinds) or pieces < 1:
        return f"holds {sorted(tensors)[:8]}"
    for name, dtype in kinds.items():
        fits = tensors[name].dim() == 1 and (name == "model_proto" or len(tensors[name]) == pieces)
        if tensors[name].dtype != dtype or not fits:
            return f"{name} is {tensors[name].dtype} of {tuple(tensors[name].shape)}"
    starts, stops, bits = tensors["starts"], tensors["stops"], tensors["bits"]
    ordered = (starts >= 0) & (stops <= spec.levels) & (stops > starts)
    if int(starts[0]) != int(stops[0]) or not bool(ordered[1:].all()):
        return "a piece does not start and stop within a SID"
    widths = torch.tensor([0, *spec.level_bits]).cumsum(0)
    inside = (bits >= 0) & (bits >> (widths[stops] - widths[starts]) == 0)
    return None if bool(inside[1:].all()) else "a piece has more bits than its levels"


def to_sentences(spec: SidSpec, codes: Tensor) -> list[str]:
    """Codes ``[N, L]`` -> N strings of L symbols, as the sentencepiece library takes them."""
    return texts_of(spec, codes.cpu(), 0)


def texts_of(spec: SidSpec, codes: Tensor, start: int) -> list[str]:
    """Codes ``[n, l]`` of the levels ``start .. start + l - 1`` -> n strings of l symbols."""
    levels = codes.shape[1]
    offsets = torch.tensor([0, *spec.cardinalities]).cumsum(0)[start : start + levels]
    points = (codes + offsets + symbols_of(spec).start).to(torch.int32).contiguous().numpy()
    return points.view(f"<U{levels}").reshape(-1).tolist() if len(codes) else []


def symbols_of(spec: SidSpec) -> range:
    """Code points of all (level, code) pairs, level by level."""
    total = sum(spec.cardinalities)
    if total > _PRIVATE_SIZE:
        raise SidError(
            "SentencePiece",
            f"{total} symbols",
            f"It takes SIDs of at most {_PRIVATE_SIZE} codes over all levels.",
        )
    start = _CJK if total <= _CJK_SIZE else _PRIVATE
    return range(start, start + total)
