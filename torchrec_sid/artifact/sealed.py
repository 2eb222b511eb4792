"""The one form of a manifest: JSON with a kind, a version, a configuration and a seal over all of it.

The seal is the SHA-256 of the manifest without it, so that a manifest that was cut or edited is refused;
the text must be what this package writes, byte for byte. A seal does not stop an attacker, who can compute
one. Where ``TORCHREC_SID_KEY`` is set, manifests are signed too (HMAC-SHA-256), those without a signature
of that key are refused, and whatever they list is compared with them byte by byte when it is opened.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torchrec_sid.errors import ArtifactError, SidError

KEY_VARIABLE = "TORCHREC_SID_KEY"
_SHORTEST_KEY = 16
_LARGEST = 64 << 20
_HASH = re.compile(r"[0-9a-f]{64}")
AGAIN = "The file was altered after it was written: copy it again, or make it again."


class Manifest(NamedTuple):
    """What a manifest says, checked."""

    kind: str
    """What the artefact is, e.g. ``sid_catalog``."""
    version: int
    """Of the kind's layout."""
    config: dict[str, Any]
    """What the kind keeps there."""
    contents: dict[str, Any]
    """What the seal binds to it: the files of a folder, or the tensors of a file."""
    seal: str
    """SHA-256 (hex) of the above."""
    signed: bool
    """Whether it has a signature of this environment's key."""


def signing_key() -> bytes | None:
    """The key of this environment; None without one.

    Raises:
        SidError: it is too short to keep anybody out.
    """
    key = os.environ.get(KEY_VARIABLE)
    if key is None:
        return None
    if len(key.encode()) < _SHORTEST_KEY:
        raise SidError(
            KEY_VARIABLE, f"{len(key.encode())} bytes", f"Give a random key of {_SHORTEST_KEY} or more."
        )
    return key.encode()


def seal(kind: str, version: int, config: Mapping[str, Any], contents: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest with its seal, and with a signature where the environment has a key."""
    body = {"kind": kind, "version": version, "config": dict(config), **contents}
    # Through JSON once, so that the seal is of what will be read (integer keys become strings).
    body = json.loads(json.dumps(body))
    key = signing_key()
    if key is not None:
        body["signature"] = hmac.new(key, _canonical(body), hashlib.sha256).hexdigest()
    body["seal"] = hashlib.sha256(_canonical(body)).hexdigest()
    return body


def to_text(body: Mapping[str, Any]) -> str:
    """A manifest as it stands in a file."""
    return json.dumps(body, indent=2) + "\n"


def parse_json(data: bytes, where: str, remedy: str = "Copy or make it again.") -> dict[str, Any]:
    """A JSON object from bytes of anybody's.

    Raises:
        ArtifactError: not JSON, too deep, too large, or not an object.
    """
    if len(data) > _LARGEST:
        raise ArtifactError(where, f"is not a manifest: {len(data)} bytes", remedy)
    try:
        value = json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]
        raise ArtifactError(where, f"is not a manifest ({reason})", remedy) from error
    if not isinstance(value, dict):
        raise ArtifactError(where, f"is not a manifest, but a JSON {type(value).__name__}", remedy)
    return value


def unseal(
    body: Mapping[str, Any], where: str, *, contents: tuple[str, ...], remedy: str = AGAIN
) -> Manifest:
    """Check the form, the seal and, where there is a key, the signature of a manifest.

    Args:
        body: from :func:`parse_json`.
        where: the file, for errors.
        contents: the keys that it has beside those of every manifest.
        remedy: for a manifest that was altered.

    Raises:
        ArtifactError: a key is missing, unknown or of another type; altered; without the key's signature.
    """
    wanted = {"kind", "version", "config", "seal", *contents}
    if odd := sorted(wanted ^ (set(body) - {"signature"})):
        which = "lacks" if odd[0] in wanted else "has an unknown"
        raise ArtifactError(where, f"its manifest is damaged: {which} {odd[0][:80]!r}", remedy)
    kind, version, config, mark = body["kind"], body["version"], body["config"], body["seal"]
    typed = isinstance(kind, str) and type(version) is int and isinstance(config, dict)
    if not typed or not is_hash(mark) or version < 1:
        raise ArtifactError(where, "its manifest is damaged: an entry is of another type", remedy)
    sealed = {name: value for name, value in body.items() if name != "seal"}
    if hashlib.sha256(_canonical(sealed)).hexdigest() != mark:
        raise ArtifactError(where, "was altered after it was written", remedy)
    signed = _check_signature(sealed, where)
    return Manifest(kind, version, config, {name: body[name] for name in contents}, mark, signed)


def _check_signature(sealed: dict[str, Any], where: str) -> bool:
    key = signing_key()
    if key is None:
        return False
    refuse_unsigned(where, "signature" in sealed)
    given = sealed.pop("signature")
    wanted = hmac.new(key, _canonical(sealed), hashlib.sha256).hexdigest()
    if not isinstance(given, str) or not hmac.compare_digest(given.encode(), wanted.encode()):
        raise ArtifactError(
            where, f"was signed with another key than {KEY_VARIABLE}", "Use what your own key has signed."
        )
    return True


def refuse_unsigned(where: str, signed: bool) -> None:
    """Refuse what carries no signature where the environment has a key.

    Raises:
        ArtifactError: it does, and this is not signed.
    """
    if not signed and signing_key() is not None:
        raise ArtifactError(
            where,
            f"is not signed, and {KEY_VARIABLE} is set",
            f"Make it again with the key, or unset {KEY_VARIABLE}.",
        )


def check_kind(
    where: str, kind: object, version: object, *, wanted: str, newest: int, holder: str = "file"
) -> None:
    """Refuse another kind of artefact, and a layout of a later release.

    Raises:
        ArtifactError: one of these.
    """
    if kind != wanted:
        raise ArtifactError(
            where, f"holds a {str(kind)[:80]!r}, not a {wanted!r}", f"Pass a {wanted} {holder}."
        )
    if type(version) is not int or version < 1:
        raise ArtifactError(where, f"has layout version {str(version)[:80]!r}", AGAIN)
    if version > newest:
        raise ArtifactError(
            where,
            f"has layout version {version}, this release reads up to {newest}",
            "Upgrade torchrec-sid.",
        )


def is_hash(value: object) -> bool:
    """Whether a value is a SHA-256 in hexadecimal."""
    return isinstance(value, str) and bool(_HASH.fullmatch(value))


def require_canonical(data: bytes, text: Callable[[], str], where: str, remedy: str = AGAIN) -> None:
    """Refuse bytes that mean the same as what was written, but are not that.

    Raises:
        ArtifactError: they differ.
    """
    try:
        same = data == text().encode()
    except (RecursionError, UnicodeEncodeError):
        same = False
    if not same:
        raise ArtifactError(where, "was altered after it was written", remedy)


def _canonical(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
