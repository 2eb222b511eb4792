"""`torchrec-sid COMMAND [options]`: every program of this package behind one name.

A command is a module of `apps`, or of `torchrec_sid` itself, with a top-level `def main(argv...)`; its
docstring begins with what it does. Nothing else has to know of it, and no other command is imported.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

_HOMES = {
    __package__: Path(__file__).parent,
    "torchrec_sid": Path(importlib.import_module("torchrec_sid").__path__[0]),
}
"""Package -> where its modules lie."""
_MAIN = re.compile(r"^def main\(argv\b", re.MULTILINE)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command that the first argument names with the others, or list all."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview())
        return
    name, *options = words
    if name == "--version":
        print(f"torchrec-sid {importlib.import_module('torchrec_sid').__version__}")
        return
    found = dict(commands())
    if name not in found:
        near = difflib.get_close_matches(name, found, 1)
        hint = f"Did you mean {near[0]}?" if near else f"There are {', '.join(found)}."
        print(f"torchrec-sid: no command {name!r}. {hint}", file=sys.stderr)
        sys.exit(2)
    # What the command says of itself, in its help and in what it writes, is how it was called.
    sys.argv = [f"torchrec-sid {name}", *options]
    sys.exit(importlib.import_module(found[name]).main(options))


def commands() -> Iterator[tuple[str, str]]:
    """Name of each command, and its module."""
    seen: dict[str, str] = {}
    for package, folder in _HOMES.items():
        for path in folder.glob("[a-z]*.py"):
            if _MAIN.search(path.read_text()):
                seen[path.stem] = f"{package}.{path.stem}"
    yield from sorted(seen.items())


def overview() -> str:
    """The commands and what each does."""
    lines = ["torchrec-sid COMMAND [options]; `torchrec-sid COMMAND --help` explains the options.", ""]
    for name, module in commands():
        package, _, stem = module.rpartition(".")
        text = ast.get_docstring(ast.parse((_HOMES[package] / f"{stem}.py").read_text())) or ""
        lines.append(f"  {name:<10} {text.splitlines()[0].removesuffix(':').partition(': `')[0]}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
