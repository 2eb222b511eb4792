"""`train_pieces`: a vocabulary from the SIDs of impressed items, by the sentencepiece library."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from torchrec_sid.errors import SidError
from torchrec_sid.spec import SidSpec
from torchrec_sid.tables.sentencepiece.model_proto import without_string
from torchrec_sid.tables.sentencepiece.pieces import (
    UNK,
    PieceTrainerConfig,
    SidPieces,
    symbols_of,
    texts_of,
    to_sentences,
)
from torchrec_sid.tables.sentencepiece.tokenizer import SidTokenizer


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


def _check_training(
    spec: SidSpec, codes: Tensor, config: PieceTrainerConfig, weights: Tensor | None
) -> None:
    if not spec.fits_int64:
        raise SidError(
            "train_pieces", f"SIDs of {spec.bits} bits", "Pieces take at most 63: truncate the SIDs."
        )
    spec.validate(codes, "train_pieces")
    needed = len(symbols_of(spec)) + 1
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
        seen: set[str] = set().union(*(texts_of(spec, codes[:, i : i + 1], i) for i in range(spec.levels)))
        for point in symbols_of(spec):
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
            texts = texts_of(spec, codes, start)
            lines += [
                f"{text}\t{total}\n" for text, total in zip(texts, totals[often].tolist(), strict=True)
            ]
    return "".join(lines)


def _read_pieces(spec: SidSpec, config: PieceTrainerConfig, proto: bytes) -> SidPieces:
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_proto=proto)
    size = processor.get_piece_size()
    texts = [processor.id_to_piece(i) for i in range(1, size)]
    first = np.cumsum([0, *spec.cardinalities]) + symbols_of(spec).start
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
