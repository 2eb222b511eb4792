"""torch.distributed.run for the TorchX component: the same options, and it ends with a message.

`python -m torchrec_sid.apps.torchrun [options of torch.distributed.run] -m MODULE ...`. Two things are
added. A port that another program holds is found before the machines wait for one another on it, which they
would do for ever. And where a process fails, the report on all processes comes without the launcher's own
traceback.
"""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as run

from torchrec_sid.errors import SidError

from .cli import plain_errors

_ANSWERS_WITHIN = 20.0
"""Seconds after which a program that accepts connections is not the one that is looked for."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Check the meeting point, then run."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    with plain_errors():
        if "--rdzv_endpoint" in arguments:
            check_endpoint(arguments[arguments.index("--rdzv_endpoint") + 1])
    try:
        run(arguments)
    except ChildFailedError as error:
        sys.exit(str(error))


def check_endpoint(endpoint: str, seconds: float = _ANSWERS_WITHIN) -> None:
    """Find out whether something else listens where the processes are to meet.

    Args:
        endpoint: ``HOST:PORT``; nobody listening there yet is fine.
        seconds: how long to wait for an answer.

    Raises:
        SidError: what listens there is not a store of torch.distributed.
    """
    host, _, port = endpoint.rpartition(":")
    if port == "0" or not _listens(host, int(port), seconds):
        return
    answered = threading.Event()

    def ask() -> None:
        try:
            dist.TCPStore(  # type: ignore[attr-defined]  # torch does not export it formally
                host, int(port), is_master=False, timeout=timedelta(seconds=seconds), wait_for_workers=False
            )
        except RuntimeError:
            return
        answered.set()

    # A thread, because torch's client waits for an answer for ever, whatever its time-out.
    threading.Thread(target=ask, daemon=True).start()
    if not answered.wait(seconds):
        raise SidError(
            f"port {port} of {host}",
            "is in use by another program",
            "Choose another with --rdzv_port, the same on all machines.",
        )


def _listens(host: str, port: int, seconds: float) -> bool:
    try:
        socket.create_connection((host, port), timeout=seconds).close()
    except OSError:
        return False
    return True


if __name__ == "__main__":
    main()
