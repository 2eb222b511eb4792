"""SentencePiece over SIDs: vocabulary, trainer, and a tokenizer of tensor operations."""

from torchrec_sid.tables.sentencepiece.piece_scheme import SentencePiece
from torchrec_sid.tables.sentencepiece.piece_trainer import train_pieces
from torchrec_sid.tables.sentencepiece.pieces import PieceTrainerConfig, SidPieces, to_sentences
from torchrec_sid.tables.sentencepiece.tokenizer import SidTokenizer, Tokens

__all__ = [
    "PieceTrainerConfig",
    "SentencePiece",
    "SidPieces",
    "SidTokenizer",
    "Tokens",
    "to_sentences",
    "train_pieces",
]
