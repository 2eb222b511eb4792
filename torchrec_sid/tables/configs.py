"""Table configurations in TorchRec's grammar, with a scheme in the place of ``num_embeddings``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torchrec.modules.embedding_configs import DataType, PoolingType

from torchrec_sid.errors import SidError
from torchrec_sid.spec import SidSpec
from torchrec_sid.tables.scheme_registry import Scheme


@dataclass(frozen=True, kw_only=True)
class SidTableConfig:
    """A table of SIDs, pooled or not.

    Args:
        name: name of the table. A scheme with several physical tables adds ``_depth1`` and the like;
            several schemes add their label, ``_prefix``, ``_id``.
        embedding_dim: D, what each scheme contributes.
        feature_names: the features that share the table; None: one feature of the table's name.
        scheme: how a SID addresses rows, or several of them for one feature.
        spec: shape of the SIDs; None: that of the collection's catalog.
        combine: how the vectors of several schemes become one: their sum (D stays), or side by side.
        data_type: element type of the rows.
        init_fn: as in TorchRec, called on each physical table's weight.
        weight_init_min: as in TorchRec, of every row.
        weight_init_max: as in TorchRec.

    Raises:
        SidError: no scheme, no feature, a feature twice, or a spec beyond 63 bits.
    """

    name: str
    embedding_dim: int
    scheme: Scheme | Sequence[Scheme]
    feature_names: Sequence[str] | None = None
    spec: SidSpec | None = None
    combine: Literal["sum", "concat"] = "sum"
    data_type: DataType = DataType.FP32
    init_fn: Callable[[Tensor], Tensor | None] | None = None
    weight_init_min: float | None = None
    weight_init_max: float | None = None

    def __post_init__(self) -> None:
        where = f"table {self.name!r}"
        if isinstance(self.feature_names, str):
            raise SidError(where, f"feature_names={self.feature_names!r}", "Pass a list of names.")
        features = tuple(self.feature_names or (self.name,))
        object.__setattr__(self, "feature_names", features)
        if len(set(features)) != len(features):
            raise SidError(where, f"feature_names={features} repeats a feature", "Name each one once.")
        if self.embedding_dim < 1:
            raise SidError(where, f"embedding_dim={self.embedding_dim}", "It is at least 1.")
        if not self.schemes:
            raise SidError(where, "no scheme", "Give one, e.g. HashedPrefix(depth=3).")
        labels = [scheme.label for scheme in self.schemes]
        if len(set(labels)) != len(labels):
            raise SidError(
                where, f"schemes {labels} repeat a kind", "Use one scheme of each kind per table."
            )
        if self.combine not in ("sum", "concat"):
            raise SidError(where, f"combine={self.combine!r}", "Choose 'sum' or 'concat'.")
        if self.spec is not None and not self.spec.fits_int64:
            raise SidError(
                where,
                f"a SID of {self.spec.bits} bits",
                "Tables take SIDs that pack into 63 bits: truncate it.",
            )

    def num_features(self) -> int:
        """Features that share the table."""
        return len(self.feature_names or ())

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """The schemes as a tuple, one or many."""
        scheme = self.scheme
        return tuple(scheme) if isinstance(scheme, Sequence) else (scheme,)


@dataclass(frozen=True, kw_only=True)
class SidEmbeddingConfig(SidTableConfig):
    """What ``EmbeddingConfig`` is to ``EmbeddingCollection``, for features that carry SIDs.

    The other arguments are those of :class:`SidTableConfig`.

    Args:
        events: what an event of several rows is. ``bag``: its rows are summed where they are and one vector
            travels; the table is sharded table-wise or column-wise (row-wise too on GPUs). ``rows``: its
            rows travel and are summed afterwards; for tables that only fit when they are sharded row-wise,
            where every rank would send a partial sum. A scheme whose rows vary in number has bags.

    Raises:
        SidError: as :class:`SidTableConfig`, or another word for ``events``.
    """

    events: Literal["bag", "rows"] = "bag"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.events not in ("bag", "rows"):
            raise SidError(f"table {self.name!r}", f"events={self.events!r}", "Choose 'bag' or 'rows'.")


@dataclass(frozen=True, kw_only=True)
class SidEmbeddingBagConfig(SidTableConfig):
    """What ``EmbeddingBagConfig`` is to ``EmbeddingBagCollection``, for features that carry SIDs.

    The rows of one item are summed, then ``pooling`` reduces the items of a bag: the mean of a bag is the
    mean over its items, by weight where there are weights. The other arguments are those of
    :class:`SidTableConfig`.

    Example:
        >>> from torchrec_sid import HashedPrefix, SidSpec
        >>> table = SidEmbeddingBagConfig(
        ...     name="t_item", embedding_dim=32, feature_names=["item", "history"],
        ...     scheme=HashedPrefix(depth=3, num_embeddings=1_000_000), spec=SidSpec((256, 256, 256)))
    """

    pooling: PoolingType = PoolingType.SUM
