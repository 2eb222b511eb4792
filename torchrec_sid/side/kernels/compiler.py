"""The CPU kernels as a library: from the wheel, from a cache, or compiled now by the machine's compiler.

The sources use no PyTorch header, so that compiling takes seconds, needs nothing but a compiler, and the
result is independent of the PyTorch version. A wheel holds them for three kinds of x86-64 processors
(``setup.py`` runs :func:`compile_kernels` for each of :data:`LEVELS`). Without a library, plain PyTorch
computes the same, slower. Nothing of the package is imported here: ``setup.py`` loads this file alone.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

_FOLDER = Path(__file__).parent
PREBUILT = _FOLDER / "prebuilt"
"""Where a wheel has its libraries: one of each level, ``LEVEL.so``."""
_FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fPIC", "-shared")
_V3 = frozenset(["abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "xsave"])
_V4 = _V3 | frozenset(["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"])
LEVELS = {"x86-64-v4": _V4, "x86-64-v3": _V3, "x86-64": frozenset[str]()}
"""``-march`` of a prebuilt library -> what /proc/cpuinfo has to name for it, best first."""
CACHE_VARIABLE = "TORCHREC_SID_CACHE"
DISABLE_VARIABLE = "TORCHREC_SID_NO_COMPILE"
# A compiler takes seconds; what is older was left behind by one that was killed.
_ABANDONED_SECONDS = 3600

logger = logging.getLogger(__name__)


class Built(NamedTuple):
    """The result of :func:`load_library`."""

    library: ctypes.CDLL | None
    """The loaded kernels, or None."""
    reason: str
    """Why there are none; empty otherwise."""
    origin: str = ""
    """Where they come from, for people; empty if there are none."""


def cache_directory() -> Path | None:
    """Where compiled kernels are kept: ``$TORCHREC_SID_CACHE``, else the user's cache directory.

    None for a user without a home.
    """
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen)
    parent = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))  # noqa: PTH111
    # Path.expanduser raises where expanduser leaves the ~ alone: no HOME, no entry in the user database.
    return parent / "torchrec_sid" if parent.is_absolute() else None


def find_compiler() -> list[str]:
    """The command of the C++ compiler: ``$CXX`` as a shell would split it, else g++, clang++ or c++."""
    if command := shlex.split(os.environ.get("CXX", "")):
        return command
    return [found for found in map(shutil.which, ("g++", "clang++", "c++")) if found][:1]


def compile_kernels(target: Path, march: str, compiler: list[str]) -> None:
    """Write the library ``target`` and its checksum ``target.sha256``, each whole or not at all.

    Args:
        target: in a directory that exists; readable by everybody, as an image needs it.
        march: the compiler's name of the processor.
        compiler: from :func:`find_compiler`.

    Raises:
        OSError, subprocess.SubprocessError: the compiler cannot be run or fails.
    """
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".kernels-") as folder:
        output = Path(folder) / target.name
        sources = sorted(map(str, _FOLDER.glob("*.cpp")))
        command = [*compiler, *_FLAGS, f"-march={march}", *sources, "-o", str(output)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
        seal = Path(folder) / _seal_of(target).name
        seal.write_text(hashlib.sha256(output.read_bytes()).hexdigest())
        # Processes that compile at the same time each put theirs in place; a library between two seals is
        # compiled again.
        for path in (output, seal):
            path.chmod(0o644)
            path.replace(target.parent / path.name)


@lru_cache(maxsize=1)
def load_library() -> Built:
    """The kernels, compiled at the first call of a machine (some seconds) where the wheel has none for it.

    To compile while building an image, call this once there with ``TORCHREC_SID_CACHE`` set; any user of
    the image may read what root has compiled. The file name carries the processor's features, so that a
    shared home directory is safe.
    """
    if os.environ.get(DISABLE_VARIABLE):
        return Built(None, f"{DISABLE_VARIABLE} is set")
    if (prebuilt := _load_prebuilt()) is not None:
        return prebuilt
    compiler = find_compiler()
    if not compiler:
        return _without("there is no C++ compiler (install g++, or set CXX)")
    try:
        with _compiled(compiler) as path:
            return Built(ctypes.CDLL(str(path)), "", f"compiled into {path.parent}")
    except (OSError, subprocess.SubprocessError) as error:
        detail = (getattr(error, "stderr", None) or str(error)).strip()
        return _without(f"{shlex.join(compiler)} failed: {detail.splitlines()[-1] if detail else error!r}")


def _without(reason: str) -> Built:
    logger.warning("Code-space attention runs in plain PyTorch, several times slower: %s", reason)
    return Built(None, reason)


def _load_prebuilt() -> Built | None:
    flags = _processor_flags()
    for level, needs in LEVELS.items():
        path = PREBUILT / f"{level}.so"
        if needs <= flags and path.is_file() and _is_intact(path):
            try:
                return Built(ctypes.CDLL(str(path)), "", f"prebuilt for {level}")
            except OSError as error:  # another C library than the one it was linked to
                logger.info("%s cannot be loaded: %s", path, error)
    return None


@contextmanager
def _compiled(compiler: list[str]) -> Iterator[Path]:
    """The library for this machine, from the cache, compiled into it, or for this process."""
    name = f"kernels-{_digest(compiler)}.so"
    cache = cache_directory()
    problem = "this user has no home directory"
    if cache is not None:
        path = cache / name
        if _is_trusted(cache) and _is_trusted(path) and _is_intact(path):
            yield path
            return
        if not (problem := _prepare_cache(cache)):
            logger.warning("Compiling the CPU kernels into %s, once: some seconds.", cache)
            compile_kernels(path, "native", compiler)
            yield path
            return
    with tempfile.TemporaryDirectory(prefix="torchrec_sid-") as folder:
        logger.warning(
            "Compiling the CPU kernels for this process alone: %s. Set %s to a folder of yours.",
            problem,
            CACHE_VARIABLE,
        )
        compile_kernels(Path(folder) / name, "native", compiler)
        yield Path(folder) / name


def _prepare_cache(cache: Path) -> str:
    """Make the folder and sweep it; says why nothing can be kept there, or nothing."""
    try:
        cache.mkdir(parents=True, exist_ok=True, mode=0o755)
        if not _is_trusted(cache):
            return f"{cache} belongs to another user or others may write into it"
        for leftover in cache.glob(".kernels-*"):
            if time.time() - leftover.stat().st_mtime > _ABANDONED_SECONDS:
                shutil.rmtree(leftover, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".kernels-"):
            return ""
    except OSError as error:
        return str(error)


def _is_trusted(path: Path) -> bool:
    """Whether only this user or root can have put it there; a library that is a link is not."""
    try:
        found = path.stat()
        link = path.suffix == ".so" and path.is_symlink()
    except OSError:
        return False
    return not link and (
        not hasattr(os, "geteuid")
        or (found.st_uid in (0, os.geteuid()) and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH))
    )


def _is_intact(path: Path) -> bool:
    """Whether the library is the one that was compiled: a cut one ends the process when it is mapped."""
    try:
        return _seal_of(path).read_text() == hashlib.sha256(path.read_bytes()).hexdigest()
    except (OSError, UnicodeDecodeError):
        return False


def _seal_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _digest(compiler: list[str]) -> str:
    digest = hashlib.sha256(" ".join((*compiler, *_FLAGS, _processor())).encode())
    for path in sorted((*_FOLDER.glob("*.cpp"), *_FOLDER.glob("*.h"))):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:20]


def _processor() -> str:
    """What ``-march=native`` depends on."""
    flags = " ".join(sorted(_processor_flags()))
    return f"{platform.machine()} {flags or f'{platform.processor()} {platform.node()}'}"


def _processor_flags() -> frozenset[str]:
    """What Linux says that the processor has; nothing elsewhere."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            if line.lower().startswith(("flags", "features")):
                return frozenset(line.partition(":")[2].split())
    return frozenset()


def c_fields(pointers: str, integers: str = "") -> list[tuple[str, type]]:
    """Fields of a C structure of pointers followed by int64s, for ``ctypes.Structure``."""
    return [(n, ctypes.c_void_p) for n in pointers.split()] + [
        (n, ctypes.c_int64) for n in integers.split()
    ]
