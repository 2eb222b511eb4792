"""The one error of this package: what is wrong, which value, and what to do about it."""

from __future__ import annotations


class SidError(ValueError):
    """Bad input or a bad artefact, refused before any work is lost.

    Args:
        where: the feature, file, column or configuration field at fault.
        found: what was found there, with the offending value.
        remedy: what the user should do next, as a full sentence.

    Example:
        >>> raise SidError("items.parquet", "item_id 7 occurs twice", "Keep one row per item.")
        Traceback (most recent call last):
        torchrec_sid.errors.SidError: items.parquet: item_id 7 occurs twice. Keep one row per item.
    """

    def __init__(self, where: str, found: str, remedy: str) -> None:
        super().__init__(f"{where}: {found}. {remedy}")
        self.where = where
        self.found = found
        self.remedy = remedy

    def __reduce__(self) -> tuple[type[SidError], tuple[str, str, str]]:
        return type(self), (self.where, self.found, self.remedy)


class ArtifactError(SidError):
    """A file on disk that is missing, truncated, of another kind, or made by something else."""
