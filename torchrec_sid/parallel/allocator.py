"""Memory of processes that train on CPU: keep it, instead of asking the kernel for it in every step."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_KEEP = 2**30


def keep_freed_memory() -> None:
    """Let glibc's malloc hold on to freed blocks of up to 1 GiB; elsewhere, do nothing.

    By default it returns every large tensor to the kernel, which maps and clears it again in the next
    step: a tenth to a third of the time of a step. The price is that the process stays at its peak.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _KEEP)
        mallopt(_M_TRIM_THRESHOLD, _KEEP)
