"""Semantic IDs for TorchRec: learn them from content, and rank with them instead of raw ids.

What people use is here by name and imported when it is first asked for, so that ``import torchrec_sid``
is quick and the parts that need torch alone (``quantizers``, ``catalog``, ``quality``, ``side``) work where
TorchRec is not installed; ``tables``, ``collections``, ``models``, ``data.batch`` and ``parallel`` need it.

Example:
    >>> from torchrec_sid import ResidualKMeans, ResidualKMeansConfig, SidCatalog
    >>> ResidualKMeans(8, ResidualKMeansConfig(cardinalities=(4, 4))).spec
    SidSpec(cardinalities=(4, 4))
"""

# The names of the block for type checkers are those that __getattr__ gives; `X as X` exports them.
from importlib import import_module
from typing import TYPE_CHECKING, Any

from torchrec_sid.errors import ArtifactError, SidError

if TYPE_CHECKING:
    from torchrec_sid.catalog import (
        ItemValues as ItemValues,
        SidCatalog as SidCatalog,
        add_last_digit as add_last_digit,
        measure_drift as measure_drift,
    )
    from torchrec_sid.collections import (
        SidEmbeddingBagCollection as SidEmbeddingBagCollection,
        SidEmbeddingCollection as SidEmbeddingCollection,
    )
    from torchrec_sid.learn import (
        LearnedSids as LearnedSids,
        SidRecipe as SidRecipe,
        learn_sids as learn_sids,
    )
    from torchrec_sid.moved_rows import move_tables as move_tables
    from torchrec_sid.quality import (
        QualityReport as QualityReport,
        measure_quality as measure_quality,
    )
    from torchrec_sid.quantizers import (
        CategorySource as CategorySource,
        DiscretePca as DiscretePca,
        DiscretePcaConfig as DiscretePcaConfig,
        EmbeddingSource as EmbeddingSource,
        Quantizer as Quantizer,
        ResidualKMeans as ResidualKMeans,
        ResidualKMeansConfig as ResidualKMeansConfig,
        RqVae as RqVae,
        RqVaeConfig as RqVaeConfig,
        VqFusion as VqFusion,
        VqFusionConfig as VqFusionConfig,
        align_codes as align_codes,
        load_quantizer as load_quantizer,
        make_quantizer as make_quantizer,
    )
    from torchrec_sid.models.similarities import (
        ContentCosine as ContentCosine,
        PrefixOverlap as PrefixOverlap,
        SameItem as SameItem,
        pool_similarities as pool_similarities,
    )
    from torchrec_sid.replace import replace_embeddings as replace_embeddings
    from torchrec_sid.side import (
        CodeSpaceAttention as CodeSpaceAttention,
        CodeSpaceAttentionConfig as CodeSpaceAttentionConfig,
        FrozenBasis as FrozenBasis,
        SideFeatures as SideFeatures,
        SideFeaturesConfig as SideFeaturesConfig,
        SimilarityConfig as SimilarityConfig,
        SimilarityFeatures as SimilarityFeatures,
    )
    from torchrec_sid.spec import SidSpec as SidSpec
    from torchrec_sid.streams import EmbeddingStream as EmbeddingStream
    from torchrec_sid.tables import (
        CatalogMap as CatalogMap,
        HashedId as HashedId,
        HashedPrefix as HashedPrefix,
        NGramGroups as NGramGroups,
        PerLevel as PerLevel,
        PieceTrainerConfig as PieceTrainerConfig,
        Scheme as Scheme,
        SentencePiece as SentencePiece,
        Side as Side,
        SidEmbeddingBagConfig as SidEmbeddingBagConfig,
        SidEmbeddingConfig as SidEmbeddingConfig,
        SidPieces as SidPieces,
        SidTransform as SidTransform,
        train_pieces as train_pieces,
    )

__version__ = "0.1.0"

_HOMES = {
    "catalog": ("ItemValues", "SidCatalog", "add_last_digit", "measure_drift"),
    "collections": ("SidEmbeddingBagCollection", "SidEmbeddingCollection"),
    "learn": ("LearnedSids", "SidRecipe", "learn_sids"),
    "moved_rows": ("move_tables",),
    "quality": ("QualityReport", "measure_quality"),
    "quantizers": (
        "CategorySource",
        "DiscretePca",
        "DiscretePcaConfig",
        "EmbeddingSource",
        "Quantizer",
        "ResidualKMeans",
        "ResidualKMeansConfig",
        "RqVae",
        "RqVaeConfig",
        "VqFusion",
        "VqFusionConfig",
        "align_codes",
        "load_quantizer",
        "make_quantizer",
    ),
    "models.similarities": ("ContentCosine", "PrefixOverlap", "SameItem", "pool_similarities"),
    "replace": ("replace_embeddings",),
    "side": (
        "CodeSpaceAttention",
        "CodeSpaceAttentionConfig",
        "FrozenBasis",
        "SideFeatures",
        "SideFeaturesConfig",
        "SimilarityConfig",
        "SimilarityFeatures",
    ),
    "spec": ("SidSpec",),
    "streams": ("EmbeddingStream",),
    "tables": (
        "CatalogMap",
        "HashedId",
        "HashedPrefix",
        "NGramGroups",
        "PerLevel",
        "PieceTrainerConfig",
        "Scheme",
        "SentencePiece",
        "SidEmbeddingBagConfig",
        "SidEmbeddingConfig",
        "SidPieces",
        "SidTransform",
        "Side",
        "train_pieces",
    ),
}
"""Module of this package -> the names that it gives."""
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = ["ArtifactError", "SidError", "__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(f"torchrec_sid.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
