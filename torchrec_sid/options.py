"""Configuration dataclasses from what people write: a YAML, TOML or JSON file, or words of a command line.

Unknown keys are named with the nearest known one, values are checked by jsonargparse, and no message shows
more of a file than the key and the value that are wrong.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import tomllib
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import docstring_parser
import jsonargparse
import yaml

from torchrec_sid.errors import SidError

T = TypeVar("T")
Values = dict[str, Any]
"""Field -> value; of a field that is a dataclass itself, the same again."""
Label = Callable[[str], str]
"""Dotted name of a field -> how a message names it."""
_SCIENTIFIC = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+")


class Option(NamedTuple):
    """One field that holds a value, of a dataclass or of one within it."""

    name: str
    """Dotted, e.g. ``model.dim``."""
    hint: Any
    default: Any
    """``dataclasses.MISSING`` where there is none."""
    text: str
    """What its docstring says."""
    group: str
    """What the docstring of the dataclass's own field says; empty at the top."""


def options_of(kind: type[Any], default: Any = dataclasses.MISSING) -> list[Option]:
    """The fields of a dataclass in order, those of nested dataclasses in their place.

    Args:
        kind: the dataclass.
        default: an instance whose values are the defaults; else those of the fields.
    """
    return list(_walk(kind, default, "", ""))


def load_options(kind: type[T], path: str | Path) -> T:
    """Read a configuration from a file.

    Args:
        kind: the dataclass to make.
        path: ``.yaml``, ``.yml``, ``.json`` or ``.toml``; fields with defaults may be left out.

    Raises:
        SidError: no such file, another suffix, a syntax error, an unknown key, a value of the wrong type or
            out of range; the key is named with its path in the file.
    """
    return make_options(kind, read_mapping(path), str(path))


def make_options(kind: type[T], values: Any, where: str) -> T:
    """The configuration that nested mappings describe; errors begin with ``where``."""

    def label(key: str) -> str:
        return f"{where}: {key}" if key else where

    return construct(kind, check_values(kind, values, label), label)


def read_mapping(path: str | Path) -> Any:
    """What a YAML, TOML or JSON file says; an empty file is an empty mapping.

    Raises:
        SidError: no such file, another suffix, a syntax error (its place is named, the text is not shown).
    """
    path = Path(path)
    if not path.is_file():
        raise SidError(str(path), "no such file", "Pass a configuration in YAML, TOML or JSON.")
    if path.suffix not in (".yaml", ".yml", ".toml", ".json"):
        raise SidError(str(path), f"unknown suffix {path.suffix!r}", "Use .yaml, .yml, .toml or .json.")
    try:
        text = path.read_text()
        value = tomllib.loads(text) if path.suffix == ".toml" else yaml.safe_load(text)
    except (yaml.YAMLError, tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise SidError(str(path), f"cannot be read ({_problem(error)})", "Mend the syntax.") from None
    return {} if value is None else value


def check_values(kind: type[Any], values: Any, label: Label, *, text: bool = False) -> Values:
    """Check names and types; what is absent stays absent.

    Args:
        kind: the dataclass.
        values: field -> value, nested.
        label: see :data:`Label`.
        text: values are words, from which numbers, lists and null are read; else only numbers such as 1e9.

    Raises:
        SidError: an unknown field, or a value of another type.
    """
    return _check_fields(kind, values, label, "", text)


def construct(kind: type[T], values: Values, label: Label, default: Any = None) -> T:
    """The dataclass of checked values.

    Args:
        kind: the dataclass.
        values: of :func:`check_values`.
        label: see :data:`Label`.
        default: an instance from which the other fields are taken.

    Raises:
        SidError: a field without default is absent, or the dataclass refuses a value.
    """
    made: T = _construct(kind, values, label, "", default)
    return made


def plain(value: Any) -> Any:
    """A configuration as nested mappings, lists and values that YAML and JSON can say, without Nones."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items() if item is not None}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def nearest(name: str, known: Iterable[str], before: str = "") -> str:
    """A remedy for a name that nobody knows: the one that was meant, or all of them."""
    known = list(known)
    near = difflib.get_close_matches(name, known, 1)
    return (
        f"Did you mean {before}{near[0]}?" if near else f"Known are {', '.join(before + k for k in known)}."
    )


def describe_type(hint: Any) -> str:
    """A type in words: ``an int``, ``none or a float``, ``one of dot, dcn``, ``a list, each an int``."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        parts = [describe_type(part) for part in arguments if part is not type(None)]
        return " or ".join(parts + ["null"] * (type(None) in arguments))
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin in (tuple, list):
        return f"a list, each {describe_type(arguments[0])}"
    if origin is not None or dataclasses.is_dataclass(hint):
        return "a mapping"
    return {int: "an int", str: "text", bool: "true or false"}.get(hint, f"a {hint.__name__}")


def nested_dataclass(hint: Any) -> type[Any] | None:
    """The dataclass that a field holds, if it does."""
    parts = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    found = [part for part in parts if dataclasses.is_dataclass(part) and isinstance(part, type)]
    return found[0] if len(found) == 1 else None


def _walk(kind: type[Any], default: Any, prefix: str, group: str) -> Iterable[Option]:
    hints = typing.get_type_hints(kind)
    texts = {p.arg_name: p.description or "" for p in docstring_parser.parse_from_object(kind).params}
    for field in dataclasses.fields(kind):
        text = " ".join(texts.get(field.name, "").split())
        value = _default(field) if default is dataclasses.MISSING else getattr(default, field.name)
        inner = nested_dataclass(hints[field.name])
        if inner is None:
            yield Option(prefix + field.name, hints[field.name], value, text, group)
        else:
            within = dataclasses.MISSING if value is None else value
            yield from _walk(inner, within, f"{prefix}{field.name}.", text or field.name)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _check_fields(kind: type[Any], values: Any, label: Label, key: str, text: bool) -> Values:
    if not isinstance(values, Mapping):
        raise SidError(label(key), f"a {type(values).__name__}", "It must be a mapping of names to values.")
    hints = typing.get_type_hints(kind)
    for name in values:
        if name not in hints:
            raise SidError(label(key), f"unknown key {name!r}", _known_keys(str(name), hints))
    return {
        name: _check(hints[name], item, label, f"{key}.{name}" if key else name, text)
        for name, item in values.items()
    }


def _known_keys(name: str, hints: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, hints, 1)
    return (f"Did you mean {near[0]}? " if near else "") + f"Known keys are {', '.join(hints)}."


def _check(hint: Any, value: Any, label: Label, key: str, text: bool) -> Any:
    inner = nested_dataclass(hint)
    if inner is not None and value is not None:
        return _check_fields(inner, value, label, key, text)
    item = _item_dataclass(hint)
    if item is not None and value is not None:
        if not isinstance(value, Mapping):
            raise SidError(label(key), f"a {type(value).__name__}", "It must be a mapping, by name.")
        return {
            str(name): _check_fields(item, one, label, f"{key}.{name}", text) for name, one in value.items()
        }
    many = item_type(hint)
    if many is not None and value is not None:
        if text and isinstance(value, str):
            value, text = _list_of_text(value)
        # A single value stands for a list of one, as everybody writes it once.
        items = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_check(many, item, label, f"{key}[{i}]", text) for i, item in enumerate(items))
    return _check_value(hint, value, label, key, text)


def _item_dataclass(hint: Any) -> type[Any] | None:
    """The dataclass that each value of a mapping is; None for other fields."""
    for part in (hint, *typing.get_args(hint)):
        origin, arguments = typing.get_origin(part), typing.get_args(part)
        if isinstance(origin, type) and issubclass(origin, Mapping):
            return nested_dataclass(arguments[1])
    return None


def item_type(hint: Any) -> Any:
    """What the elements of a list-like field are; None for other fields and tuples of a fixed make-up."""
    for part in (hint, *typing.get_args(hint)):
        arguments = typing.get_args(part)
        if typing.get_origin(part) is list or (
            typing.get_origin(part) is tuple and arguments[1:] == (...,)
        ):
            return arguments[0]
    return None


def _list_of_text(word: str) -> tuple[Any, bool]:
    """A list that is written as one word, with what its elements are; else the word alone."""
    if word.startswith("["):
        try:
            return yaml.safe_load(word), False
        except yaml.YAMLError:
            pass
    return [word], True


def _check_value(hint: Any, value: Any, label: Label, key: str, text: bool) -> Any:
    parts = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    number = _number(value, int in parts, float in parts)
    if number is None and isinstance(value, str) and not text and str not in parts and not _words(parts):
        raise _wrong(label(key), value, hint, text)
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=hint)
    try:
        return parser.parse_object({"value": value if number is None else number}).value
    except (jsonargparse.ArgumentError, TypeError, ValueError):
        raise _wrong(label(key), value, hint, text) from None


def _words(parts: Iterable[Any]) -> bool:
    """Whether a type is written as a word though it is none of the plain ones."""
    return any(typing.get_origin(part) is typing.Literal or part is Path or part is Any for part in parts)


def _number(value: Any, whole: bool, real: bool) -> int | float | None:
    """A number that YAML takes for text or, where a whole one is wanted, for a real one: 1e9."""
    if isinstance(value, str) and _SCIENTIFIC.fullmatch(value) and (whole or real):
        found = float(value)
        return int(found) if whole and found.is_integer() else found if real else None
    if isinstance(value, float) and whole and not real and value.is_integer():
        return int(value)
    return None


def _wrong(where: str, value: Any, hint: Any, text: bool) -> SidError:
    found = repr(value) if text else f"{value!r} is a {type(value).__name__}"
    return SidError(where, found, f"It must be {describe_type(hint)}.")


def _construct(kind: type[Any], values: Values, label: Label, key: str, default: Any) -> Any:
    hints = typing.get_type_hints(kind)
    arguments = {}
    for field in dataclasses.fields(kind):
        name = f"{key}.{field.name}" if key else field.name
        usual = _default(field) if default is None else getattr(default, field.name)
        if field.name not in values:
            if usual is dataclasses.MISSING:
                raise SidError(label(name), "is missing", "Give it.")
            arguments[field.name] = usual
            continue
        value, inner = values[field.name], nested_dataclass(hints[field.name])
        if inner is not None and value is not None:
            usual = None if usual is dataclasses.MISSING else usual
            value = _construct(inner, value, label, name, usual)
        elif (item := _item_dataclass(hints[field.name])) is not None and value is not None:
            value = {n: _construct(item, one, label, f"{name}.{n}", None) for n, one in value.items()}
        arguments[field.name] = value
    try:
        return kind(**arguments)
    except SidError as error:
        raise SidError(_within(label(key), error.where), error.found, error.remedy) from error


def _within(where: str, field: str) -> str:
    return f"{where}: {field}" if where else field


def _problem(error: Exception) -> str:
    """What is wrong and where, without the text around it."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"{error.problem} in line {error.problem_mark.line + 1}"
    if isinstance(error, UnicodeDecodeError):
        return "it is not text"
    return " ".join(str(error).split())
