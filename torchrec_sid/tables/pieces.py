"""SentencePiece models over SIDs: which runs of codes are worth a row of their own.

A SID is a sentence of L symbols, one symbol per (level, code), so that equal codes of different levels
never share a piece (arXiv 2306.08121). The model is trained by the sentencepiece library; what is kept is
its pieces as numbers: where a piece starts and stops, its codes as packed bits, its score.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from torchrec_sid.artifact import fingerprint, load_artifact, save_artifact
from torchrec_sid.errors import SidError
from torchrec_sid.spec import SidSpec
from torchrec_sid.tables.model_proto import without_string

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
            ArtifactError: missing, truncated, altered, or another kind of artefact.
        """
        artifact = load_artifact(path, kind=KIND, version=_VERSION)
        spec = SidSpec(tuple(artifact.config["cardinalities"]))
        config = PieceTrainerConfig(**artifact.config["trainer"])
        return cls(spec, config, pieces_per_item=artifact.config["pieces_per_item"], **artifact.tensors)

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


def train_pieces(
    spec: SidSpec, codes: Tensor, config: PieceTrainerConfig, weights: Tensor | None = None
) -> SidPieces:
    """Train a vocabulary on the SIDs of items.

    Args:
        spec: shape of the SIDs.
        codes: ``[N, L]`` integers; equal SIDs may repeat.
        config: how.
        weights: ``[N]`` non-negative integers, e.g. impressions of each item in the training period;
            items of weight 0 do not take part. None: every item once.

    Returns:
        The same vocabulary for the same input: the trainer runs on one thread.

    Raises:
        SidError: codes out of range, negative weights, no item left, too many symbols, or a vocabulary
            smaller than the symbols it must hold.
    """
    _check_training(spec, codes, config, weights)
    packed, counts = _weigh(spec, codes, weights)
    longest = config.max_piece_levels or spec.levels
    lines = _weighted_lines(spec, packed, counts, config.all_symbols)
    proto = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder:
        seeds = Path(folder) / "seeds.tsv"
        if config.model == "unigram":
            seeds.write_text(_seeds(spec, packed, counts, longest))
        _run_trainer(lines, proto, config, longest, str(seeds) if config.model == "unigram" else "")
    from torchrec_sid.tables.tokenizer import SidTokenizer  # it is built on this module

    pieces = _read_pieces(spec, config, without_string(proto.getvalue(), str(seeds)))
    cut = SidTokenizer(pieces)(packed).counts
    pieces.pieces_per_item = float((cut * counts).sum() / counts.sum())
    return pieces


def _run_trainer(
    lines: Iterator[str], proto: io.BytesIO, config: PieceTrainerConfig, longest: int, seeds: str
) -> None:
    from sentencepiece import SentencePieceTrainer

    try:
        SentencePieceTrainer.train(
            sentence_iterator=lines,
            input_format="tsv",
            model_writer=proto,
            model_type=config.model,
            vocab_size=config.vocab_size,
            hard_vocab_limit=False,
            max_sentencepiece_length=longest,
            character_coverage=1.0,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            split_by_unicode_script=False,
            split_by_number=False,
            split_by_whitespace=False,
            unk_id=UNK,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
            seed_sentencepieces_file=seeds,
        )
    except RuntimeError as error:
        raise SidError(
            "train_pieces", f"the trainer failed ({error})", "Change vocab_size or the items."
        ) from error


def to_sentences(spec: SidSpec, codes: Tensor) -> list[str]:
    """Codes ``[N, L]`` -> N strings of L symbols, as the sentencepiece library takes them."""
    return _texts(spec, codes.cpu(), 0)


def _texts(spec: SidSpec, codes: Tensor, start: int) -> list[str]:
    """Codes ``[n, l]`` of the levels ``start .. start + l - 1`` -> n strings of l symbols."""
    levels = codes.shape[1]
    offsets = torch.tensor([0, *spec.cardinalities]).cumsum(0)[start : start + levels]
    points = (codes + offsets + _symbols(spec).start).to(torch.int32).contiguous().numpy()
    return points.view(f"<U{levels}").reshape(-1).tolist() if len(codes) else []


def _symbols(spec: SidSpec) -> range:
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


def _check_training(
    spec: SidSpec, codes: Tensor, config: PieceTrainerConfig, weights: Tensor | None
) -> None:
    if not spec.fits_int64:
        raise SidError(
            "train_pieces", f"SIDs of {spec.bits} bits", "Pieces take at most 63: truncate the SIDs."
        )
    spec.validate(codes, "train_pieces")
    needed = len(_symbols(spec)) + 1
    if config.all_symbols and config.vocab_size < needed:
        raise SidError(
            "vocab_size",
            f"{config.vocab_size}, but every symbol has a piece",
            f"Give at least {needed}, or all_symbols=False.",
        )
    if weights is not None:
        if weights.shape != codes.shape[:1] or weights.dtype.is_floating_point:
            raise SidError(
                "weights", f"{weights.dtype} of shape {tuple(weights.shape)}", "Give one integer per item."
            )
        if len(weights) and int(weights.min()) < 0:
            raise SidError("weights", f"{int(weights.min())}", "Weights are counts: 0 or more.")
    if not len(codes) or (weights is not None and int(weights.sum()) == 0):
        raise SidError("train_pieces", "no item with a weight above 0", "Pass the SIDs of impressed items.")


def _weigh(spec: SidSpec, codes: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Distinct packed SIDs and their total weight, without those of weight 0."""
    packed, inverse = torch.unique(spec.pack(codes, validate=False).cpu(), return_inverse=True)
    ones = torch.ones(len(codes), dtype=torch.int64) if weights is None else weights.to("cpu", torch.int64)
    counts = torch.zeros(len(packed), dtype=torch.int64).index_add_(0, inverse, ones)
    keep = counts > 0
    return packed[keep], counts[keep]


def _weighted_lines(spec: SidSpec, packed: Tensor, counts: Tensor, all_symbols: bool) -> Iterator[str]:
    """Lines of a weighted corpus; symbols that never occur come once, alone, if they must have a piece."""
    codes = spec.unpack(packed)
    for sentence, count in zip(to_sentences(spec, codes), counts.tolist(), strict=True):
        yield f"{sentence}\t{count}"
    if all_symbols:
        seen: set[str] = set().union(*(_texts(spec, codes[:, i : i + 1], i) for i in range(spec.levels)))
        for point in _symbols(spec):
            if chr(point) not in seen:
                yield f"{chr(point)}\t1"


def _seeds(spec: SidSpec, packed: Tensor, counts: Tensor, longest: int) -> str:
    """All runs of two or more codes that occur at least twice, with their weight.

    The trainer's own search keeps a run only where different bytes follow it. What follows a run of a SID
    is the end of the sentence or a symbol with the same leading bytes: it would find next to none.
    """
    lines = []
    for start in range(spec.levels):
        for stop in range(start + 2, min(start + longest, spec.levels) + 1):
            width = sum(spec.level_bits[start:stop])
            runs, inverse = torch.unique(
                (packed >> spec.shifts[stop - 1]) & ((1 << width) - 1), return_inverse=True
            )
            totals = torch.zeros(len(runs), dtype=torch.int64).index_add_(0, inverse, counts)
            often = totals > 1
            codes = SidSpec(spec.cardinalities[start:stop]).unpack(runs[often])
            texts = _texts(spec, codes, start)
            lines += [
                f"{text}\t{total}\n" for text, total in zip(texts, totals[often].tolist(), strict=True)
            ]
    return "".join(lines)


def _read_pieces(spec: SidSpec, config: PieceTrainerConfig, proto: bytes) -> SidPieces:
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_proto=proto)
    size = processor.get_piece_size()
    texts = [processor.id_to_piece(i) for i in range(1, size)]
    first = np.cumsum([0, *spec.cardinalities]) + _symbols(spec).start
    starts, stops, bits = [0], [0], [0]
    for text in texts:
        points = [ord(character) for character in text]
        start = int(np.searchsorted(first, points[0], side="right")) - 1
        value = 0
        for level, point in enumerate(points, start):
            value = value << spec.level_bits[level] | int(point - first[level])
        starts.append(start)
        stops.append(start + len(points))
        bits.append(value)
    return SidPieces(
        spec,
        config,
        starts=torch.tensor(starts),
        stops=torch.tensor(stops),
        bits=torch.tensor(bits),
        scores=torch.tensor([processor.get_score(i) for i in range(size)], dtype=torch.float32),
        model_proto=torch.frombuffer(bytearray(proto), dtype=torch.uint8),
    )
