"""A frozen dataclass as a command line: one option per field, `--config FILE` for YAML."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from jsonargparse import ActionConfigFile, ArgumentParser

T = TypeVar("T")


def parse_config(kind: type[T], description: str | None, argv: Sequence[str] | None = None) -> T:
    """Read a configuration from the command line.

    Args:
        kind: the dataclass; nested dataclasses become dotted options, e.g. ``--model.dim``.
        description: shown by ``--help``.
        argv: arguments; those of the process by default.
    """
    parser = ArgumentParser(description=description)
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file with any of the options.")
    parser.add_class_arguments(kind, None)
    parsed = parser.instantiate_classes(parser.parse_args(argv))
    values = {name: value for name, value in vars(parsed).items() if name != "config"}
    return kind(**values)
