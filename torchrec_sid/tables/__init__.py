"""SID tables: schemes that say which rows a SID addresses, and the transforms that evaluate them."""

from torchrec_sid.tables.adapters import CatalogLookup, PackFeatures, PackValues
from torchrec_sid.tables.catalog_map import UNKNOWN, CatalogMap
from torchrec_sid.tables.configs import SidEmbeddingBagConfig, SidEmbeddingConfig
from torchrec_sid.tables.pieces import PieceTrainerConfig, SidPieces, train_pieces
from torchrec_sid.tables.schemes import (
    HashedId,
    HashedPrefix,
    NGramGroups,
    PerLevel,
    Scheme,
    SentencePiece,
)
from torchrec_sid.tables.side_scheme import Side
from torchrec_sid.tables.tokenizer import SidTokenizer, Tokens
from torchrec_sid.tables.transform import SidTransform

__all__ = [
    "UNKNOWN",
    "CatalogLookup",
    "CatalogMap",
    "HashedId",
    "HashedPrefix",
    "NGramGroups",
    "PackFeatures",
    "PackValues",
    "PerLevel",
    "PieceTrainerConfig",
    "Scheme",
    "SentencePiece",
    "Side",
    "SidPieces",
    "SidTokenizer",
    "Tokens",
    "train_pieces",
    "SidEmbeddingBagConfig",
    "SidEmbeddingConfig",
    "SidTransform",
]
