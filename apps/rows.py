"""Rows: what is compared, as complete configurations; from a list of arms, a recipe or somebody's file."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torchrec_sid.errors import SidError
from torchrec_sid.learn import SidRecipe
from torchrec_sid.models.build import RankingConfig


@dataclass(frozen=True)
class Row:
    """One row of a table: a model and the SIDs that it reads."""

    name: str
    """In the table; unique there."""
    model: RankingConfig
    """Backbone, arm, sizes."""
    tables: str | None = None
    """Name of the SIDs that its tables read."""
    side: str | None = None
    """Name of the SIDs that its channel ``side`` reads."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """Fields of its trainings that are not what they are by default, such as rates that a search chose."""
    against: str | None = None
    """Row that its gain is measured against; None: the comparison's own reference."""
    shuffled: bool = False
    """Deal the SIDs out among items at random: a control."""
    hide_new: bool = False
    """Items without a training event have no SID: a control."""
    every_source: bool = False
    """Its channel dense reads all embedding sources, side by side; left out where a log has only one."""
    bare: bool = False
    """Without the features of the log's specification: ids, history and dense features alone."""


@dataclass(frozen=True)
class Comparison:
    """Rows in order, and how their SIDs are learned.

    Raises:
        SidError: a name twice, or a reference that is no row.
    """

    title: str
    rows: tuple[Row, ...]
    sids: Mapping[str, SidRecipe] = field(default_factory=dict)
    """By name."""
    cost: str = "bytes_per_event"
    """What the chart names beside each row: bytes_per_event, table_rows, train_seconds."""
    reference: str | None = None
    """Row that gains are measured against, where a row does not say; default: the first."""
    none: str | None = None
    """The row without any item, which cold columns are read beside; it is trained with any other."""
    features: str | None = None
    """The row with everything but ids and content of items, likewise."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the trainings that are not what they are by default, the same for every row."""

    def __post_init__(self) -> None:
        names = [row.name for row in self.rows]
        wanted = {self.reference, self.none, self.features, *(row.against for row in self.rows)}
        unknown = wanted - {None, *names}
        if len(set(names)) < len(names) or unknown:
            raise SidError(self.title, f"rows {names}, compared with {unknown}", "Name each row once.")

    def against(self, row: Row) -> str:
        """Name of the row that the gain of ``row`` is measured against."""
        return row.against or self.reference or self.rows[0].name

    def chosen(self, wanted: tuple[str, ...]) -> Comparison:
        """Only the rows that have one of ``wanted`` in their name, those they are measured against, and
        those that cold columns are read beside.

        Raises:
            SidError: a name that no row has.
        """
        names = [row.name for row in self.rows]
        for part in wanted:
            if not any(part in name for name in names):
                raise SidError("rows", repr(part), f"Choose from: {'; '.join(names)}.")
        kept = {row.name for row in self.rows if not wanted or any(part in row.name for part in wanted)}
        kept |= {self.none or "", self.features or ""}
        kept |= {self.against(row) for row in self.rows if row.name in kept}
        return self._with_rows(tuple(row for row in self.rows if row.name in kept))

    def for_sources(self, sources: tuple[str, ...]) -> Comparison:
        """Without the rows over every source, where the log has only one."""
        if len(sources) > 1:
            return self
        return self._with_rows(tuple(row for row in self.rows if not row.every_source))

    def with_features(self) -> Comparison:
        """On a log with features, a row without items that is not bare is the base without ids."""
        if all(row.bare for row in self.rows if row.name == self.none):
            return self
        return replace(self, none=None, features=self.features or self.none)

    def with_file(self, path: str | Path, items: int) -> Comparison:
        """Rows of somebody's file added.

        Args:
            path: Python with a function ``rows(items)`` that returns rows, and if they need SIDs of their
                own a mapping ``SIDS`` of name -> :class:`SidRecipe`.
            items: N of the log.

        Raises:
            SidError: no such file, one without ``rows``, one that fails, or names that are taken.
        """
        module = _import_rows(Path(path))
        try:
            rows = tuple(module.rows(items))
        except Exception as error:
            raise SidError(str(path), f"{type(error).__name__}: {error}", "Mend its rows().") from error
        sids = dict(getattr(module, "SIDS", {}))
        taken = sorted(set(sids) & set(self.sids)) + sorted(
            {row.name for row in rows} & {r.name for r in self.rows}
        )
        if taken:
            raise SidError(str(path), f"{taken} are names of this table", "Choose other names.")
        return replace(self, rows=(*self.rows, *rows), sids={**self.sids, **sids})

    def _with_rows(self, rows: tuple[Row, ...]) -> Comparison:
        kept = self.reference if self.reference in {row.name for row in rows} else None
        return replace(self, rows=rows, reference=kept)


def _import_rows(path: Path) -> Any:
    if not path.is_file():
        raise SidError(str(path), "no such file", "Pass a Python file with a function rows(items).")
    spec = importlib.util.spec_from_file_location(f"rows_of_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise SidError(str(path), "is no Python file", "Pass one with a function rows(items).")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise SidError(str(path), f"{type(error).__name__}: {error}", "Mend the file.") from error
    if not callable(getattr(module, "rows", None)):
        raise SidError(
            str(path), "has no function rows", "Define rows(items), which returns a list of Row."
        )
    return module
