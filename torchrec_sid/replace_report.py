"""What `replace_embeddings` changed, as numbers and as a table to print."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import nn
from torchrec.modules.embedding_configs import BaseEmbeddingConfig, data_type_to_dtype


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
    """Where it stands in the model, at its first name; empty for the model itself."""
    kind: str
    """Class of what it replaced."""
    before: tuple[TableSize, ...]
    after: tuple[TableSize, ...]
    names: tuple[str, ...] = ()
    """Every name it stands under."""
    notes: tuple[str, ...] = ()
    """What could not be kept, and what was carried over or dropped on the way: one sentence each."""


@dataclass(frozen=True)
class ReplacementReport:
    """What changed; ``print(report)`` shows it."""

    model: nn.Module
    """The model, with its collections swapped; as it was after a dry run."""
    collections: tuple[CollectionChange, ...]

    @property
    def notes(self) -> tuple[str, ...]:
        """All notes, each with the collection's path."""
        return tuple(f"{c.path or 'the model'}: {note}" for c in self.collections for note in c.notes)

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
            also = f" (also {', '.join(change.names[1:])})" if len(change.names) > 1 else ""
            lines.append(f"{change.path or '(the model)'}: {change.kind}{also}")
            for word, tables in (("before", change.before), ("after", change.after)):
                for table in tables:
                    features = ", ".join(table.features)
                    lines.append(
                        f"  {word:<6}  {table.name:<24} {table.rows:>13,} rows x {table.dim:<5} "
                        f"{table.bytes:>15,} bytes  {features}"
                    )
            lines += [f"  note    {note}" for note in change.notes]
        lines.append(
            f"rows {self.rows_before:,} -> {self.rows_after:,}, "
            f"bytes {self.bytes_before:,} -> {self.bytes_after:,}"
        )
        return "\n".join(lines)


def table_size(config: BaseEmbeddingConfig, features: tuple[str, ...], element_bytes: int) -> TableSize:
    """Size of a table, of its configuration and of the element it is made of now."""
    rows, dim = config.num_embeddings, config.embedding_dim
    width = element_bytes or data_type_to_dtype(config.data_type).itemsize
    return TableSize(config.name, features, rows, dim, rows * dim * width)
