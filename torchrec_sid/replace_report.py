"""What `replace_embeddings` changed, as numbers and as a table to print."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import nn
from torchrec.modules.embedding_configs import EmbeddingConfig, data_type_to_dtype


class TableSize(NamedTuple):
    """One physical table."""

    name: str
    features: tuple[str, ...]
    rows: int
    dim: int
    bytes: int


class CollectionChange(NamedTuple):
    """One collection."""

    path: str
    """Where it stands in the model; empty for the model itself."""
    kind: str
    """Class of what it replaced."""
    before: tuple[TableSize, ...]
    after: tuple[TableSize, ...]


@dataclass(frozen=True)
class ReplacementReport:
    """What changed; ``print(report)`` shows it."""

    model: nn.Module
    """The model, with its collections swapped."""
    collections: tuple[CollectionChange, ...]

    @property
    def rows_before(self) -> int:
        """Rows of all tables of the changed collections, before."""
        return sum(table.rows for change in self.collections for table in change.before)

    @property
    def rows_after(self) -> int:
        """Rows after."""
        return sum(table.rows for change in self.collections for table in change.after)

    @property
    def bytes_before(self) -> int:
        """Bytes of all tables of the changed collections, before."""
        return sum(table.bytes for change in self.collections for table in change.before)

    @property
    def bytes_after(self) -> int:
        """Bytes after."""
        return sum(table.bytes for change in self.collections for table in change.after)

    def __str__(self) -> str:
        lines = []
        for change in self.collections:
            lines.append(f"{change.path or '(the model)'}: {change.kind}")
            for word, tables in (("before", change.before), ("after", change.after)):
                for table in tables:
                    features = ", ".join(table.features)
                    lines.append(
                        f"  {word:<6}  {table.name:<24} {table.rows:>13,} rows x {table.dim:<5} "
                        f"{table.bytes:>15,} bytes  {features}"
                    )
        lines.append(
            f"rows {self.rows_before:,} -> {self.rows_after:,}, "
            f"bytes {self.bytes_before:,} -> {self.bytes_after:,}"
        )
        return "\n".join(lines)


def table_size(config: EmbeddingConfig) -> TableSize:
    """Size of the table that a configuration describes."""
    width = data_type_to_dtype(config.data_type).itemsize
    size = config.num_embeddings * config.embedding_dim * width
    names = tuple(config.feature_names)
    return TableSize(config.name, names, config.num_embeddings, config.embedding_dim, size)
