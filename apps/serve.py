"""Serve an exported model over the Open Inference Protocol, REST and gRPC.

    torchrec-sid serve --folder out/run/served/float --http_port 8080 --grpc_port 8081

It stops on SIGTERM when the requests in flight are answered. See docs/serving.md; the environment is
that of requirements-serve.txt.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from torchrec_sid.errors import SidError
from torchrec_sid.serving.batching import ServerConfig

from .cli import parse_config, plain_errors


@dataclass(frozen=True)
class ServeConfig(ServerConfig):
    """A server process."""

    threads: int = 1
    """Threads of one run of the model; more processes serve more requests, threads one sooner."""
    access_log: bool = False
    """Log every request."""


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s: %(message)s")
    logging.getLogger("torchrec_sid").setLevel(logging.INFO)
    config = parse_config(ServeConfig, __doc__, argv)
    logging.getLogger("uvicorn.access").setLevel(logging.INFO if config.access_log else logging.WARNING)
    # It writes a traceback for every request that it refuses; the client and the metrics have the reason.
    logging.getLogger("kserve").setLevel(logging.CRITICAL)
    torch.set_num_threads(config.threads)
    with plain_errors():
        try:
            from torchrec_sid.serving.server import serve_folder
        except ModuleNotFoundError as error:
            raise SidError(
                "serve", f"{error.name} is not installed", "Make an environment of requirements-serve.txt."
            ) from error
        serve_folder(config)


if __name__ == "__main__":
    main()
