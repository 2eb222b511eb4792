"""Just enough of the protobuf wire format to take one string out of a SentencePiece model.

The library records where it read its seeds from, a temporary file, so that equal trainings would give
unequal bytes. Its own protobuf module needs another protobuf release than most environments hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

_TRAINER_SPEC = 2
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class _Field(NamedTuple):
    number: int
    raw: bytes
    """The field as it stands in the message, tag included."""
    content: bytes | None
    """Payload of a length-delimited field."""


def without_string(model: bytes, text: str) -> bytes:
    """A serialised ModelProto without the fields of its trainer spec that equal ``text``."""
    result = b""
    for field in _fields(model):
        if field.number == _TRAINER_SPEC and field.content is not None:
            kept = b"".join(f.raw for f in _fields(field.content) if f.content != text.encode())
            result += _varint(_TRAINER_SPEC << 3 | _BYTES) + _varint(len(kept)) + kept
        else:
            result += field.raw
    return result


def _fields(message: bytes) -> Iterator[_Field]:
    place = 0
    while place < len(message):
        start = place
        tag, place = _read_varint(message, place)
        content, wire = None, tag & 7
        if wire == _VARINT:
            _, place = _read_varint(message, place)
        elif wire == _BYTES:
            size, place = _read_varint(message, place)
            content, place = message[place : place + size], place + size
        elif wire in (_FIXED64, _FIXED32):
            place += 8 if wire == _FIXED64 else 4
        else:
            raise ValueError(f"wire type {wire} at byte {start} is not of this format")
        yield _Field(tag >> 3, message[start:place], content)


def _read_varint(message: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place


def _varint(value: int) -> bytes:
    result = b""
    while value > 127:
        result += bytes([value & 127 | 128])
        value >>= 7
    return result + bytes([value])
