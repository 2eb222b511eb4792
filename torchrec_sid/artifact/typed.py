"""Plain values (JSON, YAML, TOML) as dataclasses and named tuples, or an error that says where."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")
_hints = functools.cache(typing.get_type_hints)


class MismatchError(ValueError):
    """A value that does not fit.

    Args:
        at: its place, as in ``tables.user.ranks[0]``; empty for the whole.
        found: what is there.
        wanted: what belongs there, as a sentence.
    """

    def __init__(self, at: str, found: str, wanted: str) -> None:
        super().__init__(f"{at}: {found}. {wanted}" if at else f"{found}. {wanted}")
        self.at, self.found, self.wanted = at, found, wanted


def read_typed(hint: type[T], value: Any, at: str = "") -> T:
    """``value`` as the type ``hint`` says.

    Args:
        hint: a dataclass, a NamedTuple, ``int``, ``float``, ``str``, ``bool``, ``Any``, ``Literal``, a
            union, ``tuple[X, ...]``, ``list[X]`` or ``dict[str, X]``.
        value: plain.
        at: where it stands, for the error.

    Raises:
        MismatchError: a value of another type, a field that is missing or unknown.

    Example:
        >>> read_typed(tuple[int, ...], [1, 2])
        (1, 2)
    """
    result: T = _convert(hint, value, at)
    return result


def _convert(hint: Any, value: Any, at: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _union(arguments, value, at)
    if origin is typing.Literal:
        if value not in arguments or type(value) not in {type(a) for a in arguments}:
            raise MismatchError(at, _short(value), f"It must be one of {', '.join(map(repr, arguments))}.")
        return value
    if origin in (tuple, list):
        return _sequence(origin, arguments, value, at)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise MismatchError(at, _kind(value), "It must be a mapping of names to values.")
        return {_text(k, at): _convert(arguments[1], v, _join(at, str(k))) for k, v in value.items()}
    if _fields(hint) is not None:
        return _build(hint, value, at)
    if hint is float and type(value) is int:
        return float(value)
    if not isinstance(value, hint) or (hint is not bool and isinstance(value, bool)):
        raise MismatchError(at, _short(value), f"It must be {_article(hint.__name__)}.")
    return value


def _union(arguments: tuple[Any, ...], value: Any, at: str) -> Any:
    if value is None and type(None) in arguments:
        return None
    kinds = [a for a in arguments if a is not type(None)]
    for kind in kinds[:-1]:
        try:
            return _convert(kind, value, at)
        except MismatchError:
            continue
    return _convert(kinds[-1], value, at)


def _sequence(origin: Any, arguments: tuple[Any, ...], value: Any, at: str) -> Any:
    if not isinstance(value, list | tuple):
        raise MismatchError(at, _short(value), "It must be a list.")
    if origin is tuple and arguments[-1] is not Ellipsis:
        if len(value) != len(arguments):
            raise MismatchError(at, f"{len(value)} values", f"It must have {len(arguments)}.")
        pairs = zip(arguments, value, strict=True)
        return tuple(_convert(hint, item, f"{at}[{i}]") for i, (hint, item) in enumerate(pairs))
    return origin(_convert(arguments[0], item, f"{at}[{i}]") for i, item in enumerate(value))


def _build(hint: Any, value: Any, at: str) -> Any:
    if not isinstance(value, Mapping):
        raise MismatchError(at, _kind(value), "It must be a mapping of names to values.")
    fields = _fields(hint)
    assert fields is not None
    hints = _hints(hint)
    for name in value:
        if name not in fields:
            raise MismatchError(at, f"unknown key {_short(name)}", f"Known keys are {', '.join(fields)}.")
    for name, needed in fields.items():
        if needed and name not in value:
            raise MismatchError(
                at, f"no {name!r}", f"It must have {', '.join(n for n in fields if fields[n])}."
            )
    return hint(**{name: _convert(hints[name], item, _join(at, name)) for name, item in value.items()})


def _fields(hint: Any) -> dict[str, bool] | None:
    """Name -> whether it must be given, of a dataclass or NamedTuple; None for anything else."""
    if dataclasses.is_dataclass(hint):
        missing = dataclasses.MISSING
        return {
            f.name: f.default is missing and f.default_factory is missing for f in dataclasses.fields(hint)
        }
    if isinstance(hint, type) and issubclass(hint, tuple) and hasattr(hint, "_field_defaults"):
        named = typing.cast(type[NamedTuple], hint)
        return {name: name not in named._field_defaults for name in named._fields}
    return None


def _text(key: Any, at: str) -> str:
    if not isinstance(key, str):
        raise MismatchError(at, f"the key {_short(key)}", "Keys must be text.")
    return key


def _short(value: Any) -> str:
    return f"{repr(value)[:80]} ({_kind(value)})"


def _kind(value: Any) -> str:
    return _article(type(value).__name__)


def _article(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def _join(at: str, name: str) -> str:
    return f"{at}.{name}" if at else name
