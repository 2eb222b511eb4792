"""SID tables: schemes that say which rows a SID addresses, and the transforms that evaluate them."""

from torchrec_sid.tables.catalog_map import UNKNOWN, CatalogMap
from torchrec_sid.tables.configs import SidEmbeddingBagConfig, SidEmbeddingConfig, SidTableConfig
from torchrec_sid.tables.scheme_registry import SCHEMES, Scheme
from torchrec_sid.tables.schemes import HashedId, HashedPrefix, NGramGroups, PerLevel
from torchrec_sid.tables.sentencepiece import (
    PieceTrainerConfig,
    SentencePiece,
    SidPieces,
    SidTokenizer,
    Tokens,
    train_pieces,
)
from torchrec_sid.tables.side_scheme import Side
from torchrec_sid.tables.transform import SidTransform

__all__ = [
    "SCHEMES",
    "UNKNOWN",
    "CatalogMap",
    "HashedId",
    "HashedPrefix",
    "NGramGroups",
    "PerLevel",
    "PieceTrainerConfig",
    "Scheme",
    "SentencePiece",
    "Side",
    "SidEmbeddingBagConfig",
    "SidEmbeddingConfig",
    "SidPieces",
    "SidTableConfig",
    "SidTokenizer",
    "SidTransform",
    "Tokens",
    "train_pieces",
]
