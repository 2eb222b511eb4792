"""Command lines: a frozen dataclass as options, and errors as one message."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn, TypeVar

from rich.console import Console

from torchrec_sid.errors import SidError
from torchrec_sid.options import (
    Option,
    Values,
    check_values,
    construct,
    describe_type,
    item_type,
    nearest,
    options_of,
    read_mapping,
)
from torchrec_sid.plugins import load_plugins

T = TypeVar("T")


def parse_config(
    kind: type[T] | Callable[[], type[T]], description: str | None, argv: Sequence[str] | None = None
) -> T:
    """Read a configuration from the command line: one option per field, ``--config FILE`` for YAML.

    ``--world-size`` is ``--world_size``, ``--size=3`` is ``--size 3``, ``--quick`` is ``--quick true``, a
    whole number may be ``1e9``, and a list is its words: ``--arms full_id side``. What is wrong ends the
    program with status 2 and one line.

    Args:
        kind: the dataclass, or what makes it once the files after ``--plugin`` are loaded; nested
            dataclasses become dotted options, e.g. ``--model.dim``.
        description: shown by ``--help``.
        argv: arguments; those of the process by default.

    Raises:
        SidError: the dataclass refuses the values.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    for file in _after_plugin(words):
        load_plugins(file)
    kind = kind if isinstance(kind, type) else kind()
    options = {option.name: option for option in options_of(kind)}
    if "-h" in words or "--help" in words:
        _print_help(description or "", list(options.values()))
        sys.exit(0)
    try:
        given = _given(words, options)
        files = given.pop("config", None)
        if files == []:
            raise SidError("--config", "has no value", "Name a file.")
        values: Values = {}
        for file in files or ():
            found = check_values(kind, read_mapping(file), partial(_in_file, file))
            _merge(values, found)
        typed = {name: _value(options[name], found) for name, found in given.items()}
        _merge(values, check_values(kind, _nested(typed), _option, text=True))
        missing = [
            o for o in options.values() if o.default is dataclasses.MISSING and not _has(values, o.name)
        ]
        if missing:
            _refuse(f"--{missing[0].name} is missing: {missing[0].text}")
    except SidError as error:
        _refuse(f"{error.where}: {error.found}. {error.remedy}")
    return construct(kind, values, lambda _: "")


def _after_plugin(words: Sequence[str]) -> Iterator[str]:
    """The files that ``--plugin`` names: other options may be made of what they register."""
    named = False
    for word in words:
        name, equals, value = word.partition("=")
        if word.startswith("--"):
            named = name == "--plugin"
            if named and equals:
                yield value
        elif named:
            yield word


@contextmanager
def plain_errors() -> Iterator[None]:
    """End the program with the message of a SidError and status 1, without a traceback."""
    try:
        yield
    except SidError as error:
        sys.exit(f"{type(error).__name__}: {error}")


def command_line() -> str:
    """This process's command, as one would write it again."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    installed = sys.argv[0].startswith("torchrec-sid")
    begin = sys.argv[0] if installed or spec is None else f"python -m {spec.name}"
    return shlex.join([*begin.split(" "), *sys.argv[1:]])


def wide_console(width: int) -> Console:
    """A terminal; where the output goes to a file, one of ``width`` columns, so that no table is cut."""
    console = Console()
    return console if console.is_terminal else Console(width=width)


def _refuse(message: str) -> NoReturn:
    program = sys.argv[0].rpartition("/")[2] or "python"
    print(f"{program}: error: {message} (--help explains all options.)", file=sys.stderr)
    sys.exit(2)


def _option(key: str) -> str:
    return f"--{key}"


def _in_file(file: str, key: str) -> str:
    return f"{file}: {key}" if key else file


def _given(words: Sequence[str], options: Mapping[str, Option]) -> dict[str, list[str]]:
    """The words after each option."""
    given: dict[str, list[str]] = {}
    last: list[str] | None = None
    for word in words:
        if re.match(r"--[A-Za-z]", word):
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            if name not in options and name != "config":
                raise _unknown(name, options)
            last = given.setdefault(name, [])
            if name != "config":
                last.clear()  # the last one counts
            if equals:
                last.append(value)
        elif last is None:
            raise SidError(
                repr(word), "is no option", f"Options begin with --: --{next(iter(options))} ..."
            )
        else:
            last.append(word)
    return given


def _unknown(name: str, options: Mapping[str, Option]) -> SidError:
    within = [option for option in options if option.startswith(f"{name}.")]
    if within:
        return SidError(
            f"--{name}", "is made of options", f"There are {', '.join(f'--{o}' for o in within)}."
        )
    # --dim for --model.dim: the end of a dotted name is how people remember it.
    ends = [option for option in options if option.endswith(f".{name}")]
    if ends:
        return SidError(
            f"--{name}", "no such option", f"Did you mean {' or '.join(f'--{o}' for o in ends)}?"
        )
    if difflib.get_close_matches(name, options, 1):
        return SidError(f"--{name}", "no such option", nearest(name, options, "--"))
    return SidError(f"--{name}", "no such option", "See the list that --help prints.")


def _value(option: Option, words: list[str]) -> Any:
    """One word, or the list of them where the option is a list."""
    many = item_type(option.hint) is not None
    if not words:
        if option.hint is bool:
            return "true"
        if many:
            return []
        raise SidError(f"--{option.name}", "has no value", option.text or "Give one.")
    if len(words) == 1:
        return words[0]
    if many:
        return words
    raise SidError(
        f"--{option.name}", f"takes one value, not {len(words)}", f"Quote it: --{option.name} '...'."
    )


def _nested(values: Mapping[str, Any]) -> Values:
    nested: Values = {}
    for name, value in values.items():
        *path, last = name.split(".")
        at = nested
        for part in path:
            at = at.setdefault(part, {})
        at[last] = value
    return nested


def _merge(into: Values, values: Values) -> None:
    for name, value in values.items():
        if isinstance(value, dict) and isinstance(into.get(name), dict):
            _merge(into[name], value)
        else:
            into[name] = value


def _has(values: Values, name: str) -> bool:
    at: Any = values
    for part in name.split("."):
        if not isinstance(at, dict) or part not in at:
            return False
        at = at[part]
    return True


def _print_help(description: str, options: Sequence[Option]) -> None:
    program = sys.argv[0].rpartition("/")[2]
    parser = argparse.ArgumentParser(
        prog=program,
        usage=f"{program} [options]",
        description=description.strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    groups: dict[str, Any] = {"": parser.add_argument_group("options")}
    text = "YAML, TOML or JSON file with any of the options, nested; those of the command line win"
    groups[""].add_argument("--config", metavar="", help=text)
    for option in options:
        if option.group not in groups:
            groups[option.group] = parser.add_argument_group(option.group.rstrip("."))
        groups[option.group].add_argument(f"--{option.name}", metavar="", help=_explained(option))
    parser.print_help()


def _explained(option: Option) -> str:
    if option.default is dataclasses.MISSING:
        default = "required"
    else:
        value = option.default
        shown = " ".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)
        default = f"default: {'null' if value is None else shown or 'none'}"
    # argparse formats help texts with %.
    return f"{option.text} [{describe_type(option.hint)}; {default}]".strip().replace("%", "%%")
