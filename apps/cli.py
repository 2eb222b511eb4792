"""Command lines: a frozen dataclass as options, and errors as one message."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, get_type_hints

from jsonargparse import ArgumentParser

from torchrec_sid.errors import SidError

T = TypeVar("T")


def parse_config(kind: type[T], description: str | None, argv: Sequence[str] | None = None) -> T:
    """Read a configuration from the command line: one option per field, ``--config FILE`` for YAML.

    Args:
        kind: the dataclass; nested dataclasses become dotted options, e.g. ``--model.dim``.
        description: shown by ``--help``.
        argv: arguments; those of the process by default.
    """
    parser = ArgumentParser(description=description)
    parser.add_argument("--config", action="config", help="YAML file with any of the options.")
    parser.add_class_arguments(kind, None)
    arguments = [_underscored(word) for word in (sys.argv[1:] if argv is None else argv)]
    arguments = _flags(kind, arguments)
    parsed = parser.instantiate_classes(parser.parse_args(arguments))
    values = {name: value for name, value in parsed.as_dict().items() if name != "config"}
    return kind(**values)


@contextmanager
def plain_errors() -> Iterator[None]:
    """End the program with the message of a SidError and status 1, without a traceback."""
    try:
        yield
    except SidError as error:
        sys.exit(f"{type(error).__name__}: {error}")


def _underscored(word: str) -> str:
    """``--world-size=8`` as ``--world_size=8``: both spellings of an option work."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}"


def _flags(kind: type[Any], words: list[str]) -> list[str]:
    """A bare ``--quick`` as ``--quick=true``, for boolean fields."""
    booleans = {f"--{name}" for name, hint in get_type_hints(kind).items() if hint is bool}
    follows = [*words, "--"][1:]
    return [
        f"{word}=true" if word in booleans and after.startswith("--") else word
        for word, after in zip(words, follows, strict=True)
    ]
