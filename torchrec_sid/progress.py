"""A progress bar around any iterable; nothing where nobody asked for one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def track(items: Iterable[T], title: str, *, total: int | None = None, show: bool = True) -> Iterator[T]:
    """Yield ``items`` while a bar on stderr counts them.

    Args:
        items: what to iterate over.
        title: what is going on.
        total: number of items, where it is known and ``items`` has no length.
        show: False yields the items and shows nothing.

    Example:
        >>> sum(track([1, 2, 3], "adding", show=False))
        6
    """
    if not show:
        yield from items
        return
    from rich.console import Console  # only needed for the bar
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        yield from bar.track(items, total=total, description=title)
