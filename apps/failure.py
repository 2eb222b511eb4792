"""How a run of several processes fails: one message with the cause, whoever had it, and status 1.

When one process fails, the others soon fail as well, in the middle of a collective, and say so at length.
Here the first one to fail speaks for all. Its message also goes where torch.distributed.run and TorchX look
for it, so that their reports name the cause.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from torchrec_sid.errors import SidError
from torchrec_sid.training.recorder import rank_log

_KEY = "torchrec_sid/failures"
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "ncclRemoteError")
"""What gloo and NCCL say where another process has gone."""


@contextmanager
def one_message() -> Iterator[None]:
    """End a failing process with status 1; the first to fail prints why.

    A :class:`SidError` or ``OSError`` is its message, a lost process one line, anything else its traceback.
    Use it inside the process group, and leave the group afterwards.
    """
    try:
        yield
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        rank_log.error("%s", text, exc_info=error)
        if not _is_first():
            sys.exit(1)
        if any(sign in text for sign in _LOST):
            # Not the cause: the launcher knows which process it was and how that ended.
            sys.exit(f"Another process of this run has ended, and this one cannot go on ({_line(text)}).")
        # An OSError names its file: a full disk, a directory that may not be written.
        if not isinstance(error, (SidError, OSError)):
            text = traceback.format_exc().rstrip()
        _tell_launcher(text)
        sys.exit(text)


def _is_first() -> bool:
    """Whether no other process has failed before."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return True
    try:
        return bool(_get_default_store().add(_KEY, 1) == 1)
    except RuntimeError:
        # The store went with rank 0, which was killed: a rank that fails has it until it has spoken.
        return True


def _tell_launcher(text: str) -> None:
    """Write the file that torch.distributed.run and TorchX read the cause from, in its format."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file is not None:
        extra = {"py_callstack": text, "timestamp": str(int(time.time()))}
        Path(file).write_text(json.dumps({"message": {"message": _line(text), "extraInfo": extra}}))


def _line(text: str) -> str:
    """The last line, which names an exception."""
    return text.rsplit("\n", 1)[-1]
