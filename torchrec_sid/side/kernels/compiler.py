"""Compile the CPU kernels with the machine's own C++ compiler, once, into a cache directory.

The sources use no PyTorch header, so that this takes seconds, needs nothing but a compiler, and the result
is independent of the PyTorch version. Without a compiler, plain PyTorch computes the same, slower.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

_SOURCES = ("code_attention.cpp", "similarity.cpp")
_HEADERS = ("columns.h", "parallel.h", "vectors.h")
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fPIC", "-shared")
CACHE_VARIABLE = "TORCHREC_SID_CACHE"
DISABLE_VARIABLE = "TORCHREC_SID_NO_COMPILE"

logger = logging.getLogger(__name__)


class Built(NamedTuple):
    """The result of :func:`load_library`."""

    library: ctypes.CDLL | None
    """The loaded kernels, or None."""
    reason: str
    """Why there are none; empty otherwise."""


def cache_directory() -> Path:
    """Where compiled kernels are kept: ``$TORCHREC_SID_CACHE``, else the user's cache directory."""
    if CACHE_VARIABLE in os.environ:
        return Path(os.environ[CACHE_VARIABLE])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "torchrec_sid"


@lru_cache(maxsize=1)
def load_library() -> Built:
    """The compiled kernels, compiling them on the first call of a machine (about three seconds).

    To compile while building an image, call this once there with ``TORCHREC_SID_CACHE`` set. The file name
    carries the processor's features, so that a shared home directory is safe.
    """
    if os.environ.get(DISABLE_VARIABLE):
        return Built(None, f"{DISABLE_VARIABLE} is set")
    compiler = os.environ.get("CXX") or next(
        filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None
    )
    if compiler is None:
        return Built(None, "there is no C++ compiler (install g++)")
    try:
        path = _compile(compiler)
        return Built(ctypes.CDLL(str(path)), "")
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        reason = f"{compiler} failed: {detail.strip().splitlines()[-1] if detail.strip() else error!r}"
        logger.warning("Code-space attention runs in plain PyTorch: %s", reason)
        return Built(None, reason)


def _compile(compiler: str) -> Path:
    folder = Path(__file__).parent
    digest = hashlib.sha256()
    for name in (*_SOURCES, *_HEADERS):
        digest.update((folder / name).read_bytes())
    digest.update(" ".join((compiler, *_FLAGS, _processor())).encode())
    name = f"kernels-{digest.hexdigest()[:20]}.so"
    cache = cache_directory()
    if (cache / name).is_file():
        return cache / name
    try:
        cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, temporary = tempfile.mkstemp(dir=cache, prefix=f".{name}.")
    except OSError:
        cache = Path(tempfile.mkdtemp(prefix="torchrec_sid-"))
        handle, temporary = tempfile.mkstemp(dir=cache, prefix=f".{name}.")
    os.close(handle)
    logger.info("Compiling the CPU kernels into %s", cache)
    try:
        sources = [str(folder / source) for source in _SOURCES]
        command = [compiler, *_FLAGS, *sources, "-o", temporary]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
        # Processes that compile at the same time each rename their own file; the last one stays.
        Path(temporary).replace(cache / name)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return cache / name


def _processor() -> str:
    """What ``-march=native`` depends on."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            if line.lower().startswith(("flags", "features")):
                return f"{platform.machine()} {line}"
    return f"{platform.machine()} {platform.processor()} {platform.node()}"


def c_fields(pointers: str, integers: str = "") -> list[tuple[str, type]]:
    """Fields of a C structure of pointers followed by int64s, for ``ctypes.Structure``."""
    return [(n, ctypes.c_void_p) for n in pointers.split()] + [
        (n, ctypes.c_int64) for n in integers.split()
    ]
