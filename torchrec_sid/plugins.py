"""Extension from outside: registries of named parts, and the plugins that add to them.

A plugin is a Python module whose import adds to a registry, for instance a quantizer of one's own under
``@register_quantizer``. It is found in one of two ways:

* installed: a package names its module under the entry-point group ``torchrec_sid.plugins``;
* a file: ``--plugin FILE.py`` of the commands, or :func:`load_plugins` with its path. Processes that this
  one starts load the file too: its path travels in the environment variable ``TORCHREC_SID_PLUGINS``.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Generic, TypeVar

from torchrec_sid.errors import SidError

GROUP = "torchrec_sid.plugins"
"""Entry-point group of installed plugins."""
VARIABLE = "TORCHREC_SID_PLUGINS"
"""Environment variable: paths of plugin files, separated like those of ``PATH``."""

T = TypeVar("T")


class Registry(Generic[T]):
    """Parts of one sort by name; plugins are loaded before a name counts as unknown.

    Args:
        what: the sort, for errors, e.g. ``"quantizer"``.

    Example:
        >>> shapes = Registry[int]("shape")
        >>> shapes.add("triangle", 3), shapes["triangle"], "circle" in shapes
        (3, 3, False)
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._parts: dict[str, T] = {}

    def add(self, name: str, part: T) -> T:
        """Name a part, and return it.

        Raises:
            SidError: the name belongs to another part.
        """
        if self._parts.setdefault(name, part) is not part:
            raise SidError(
                f"{self._what} {name!r}",
                f"is {self._parts[name]!r} already, not {part!r}",
                "Give the new one another name.",
            )
        return part

    def __getitem__(self, name: str) -> T:
        """The part of a name.

        Raises:
            SidError: no such part, in this package or a plugin.
        """
        if name not in self:
            near = get_close_matches(name, self._parts, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"Choose one of {', '.join(self)}."
            raise SidError(self._what, f"no {name!r}", f"{hint} A plugin's file is named by --plugin.")
        return self._parts[name]

    def __contains__(self, name: object) -> bool:
        if name not in self._parts:
            load_plugins()
        return name in self._parts

    def __iter__(self) -> Iterator[str]:
        """Names in the order in which they were added, those of plugins last."""
        load_plugins()
        return iter(tuple(self._parts))

    def __len__(self) -> int:
        load_plugins()
        return len(self._parts)


_loaded: set[str] = set()


def load_plugins(file: str | Path | None = None) -> None:
    """Load every installed plugin and those that the environment names; each at most once.

    Args:
        file: a plugin file to load as well, here and in every process that this one starts.

    Raises:
        SidError: no such file, or a plugin whose import fails; the message says which and why.
    """
    if file is not None:
        path = Path(file).resolve()
        if not path.is_file():
            raise SidError(f"plugin {file}", "no such file", "Pass the path of a Python file.")
        known = [name for name in os.environ.get(VARIABLE, "").split(os.pathsep) if name]
        if str(path) not in known:
            os.environ[VARIABLE] = os.pathsep.join([*known, str(path)])
    for point in entry_points(group=GROUP):
        _load_once(f"{point.name} = {point.value}", point)
    for name in os.environ.get(VARIABLE, "").split(os.pathsep):
        if name:
            _load_once(name, Path(name))


def _load_once(name: str, source: EntryPoint | Path) -> None:
    if name in _loaded:
        return
    # Marked first: a plugin may look into a registry while it is imported.
    _loaded.add(name)
    try:
        if isinstance(source, Path):
            _import_file(source)
        else:
            source.load()
    except Exception as error:
        _loaded.discard(name)
        raise SidError(
            f"plugin {name}", f"{type(error).__name__}: {error}", "Mend the plugin, or leave it out."
        ) from error


def _import_file(path: Path) -> None:
    # A name of its own, so that two files of one name do not meet, and that pickle finds its classes.
    mark = hashlib.sha256(str(path).encode()).hexdigest()[:8]
    name = f"torchrec_sid_plugin_{path.stem}_{mark}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path.name} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
