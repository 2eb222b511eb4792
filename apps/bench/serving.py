"""A server under load, over loopback: `python -m apps.bench.serving --folders SERVED [--quick]`.

In the environment of requirements-serve.txt, with `tritonclient[grpc]`. The server is a process of its own,
pinned to one core, this client to another. First the largest rate that a closed loop reaches; then
latencies at 70% of it, with requests at a constant rate and as a Poisson process; then twice the largest
rate, where what is not answered has to be refused at once; then versions exchanged under load.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from torchrec_sid.artifact import write_json
from torchrec_sid.errors import SidError
from torchrec_sid.serving.ranker import Ranker

from ..cli import parse_config, plain_errors

Array = np.ndarray[Any, Any]
_NAME = "ranker"


@dataclass(frozen=True)
class ServingBenchConfig:
    """What is driven, and how."""

    folders: tuple[str, ...]
    """Folders written by export, of one precision each: versions of a model. The first is measured."""
    json: str | None = None
    """File for the rows."""
    quick: bool = False
    """Fewer sizes, and shorter."""
    events: tuple[int, ...] = (64,)
    """Lengths of histories; more than the model reads are cut to the newest."""
    candidates: tuple[int, ...] = (1, 100, 500)
    """Candidates of a request."""
    seconds: float = 10.0
    """Of each measurement."""
    swaps: int = 100
    """Versions exchanged under load."""


def main() -> None:
    """Command line."""
    config = parse_config(ServingBenchConfig, __doc__)
    with plain_errors():
        rows = asyncio.run(_bench(config))
    for row in rows:
        print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
    if config.json:
        write_json(Path(config.json), {"rows": rows})


async def _bench(config: ServingBenchConfig) -> list[dict[str, Any]]:
    if len(os.sched_getaffinity(0)) < 2:
        raise SidError("cores", "1", "Server and client need a core each.")
    seconds = 2.0 if config.quick else config.seconds
    ranker = Ranker.load(config.folders[0])
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "served"
        shutil.copytree(config.folders[0], folder)
        with _server(folder) as server:
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
            client = _client_library().InferenceServerClient(server.grpc)
            for events in config.events:
                for candidates in config.candidates[:2] if config.quick else config.candidates:
                    load = _Load(client, server.http, ranker, events, candidates)
                    rows += await _latencies(load, seconds, {"events": events, "candidates": candidates})
            load = _Load(client, server.http, ranker, config.events[0], config.candidates[0])
            if len(config.folders) > 1:
                versions = [*config.folders[1:], config.folders[0]]
                rows.append(await _swapped(load, folder, versions, 4 if config.quick else config.swaps))
            rows.append(await _growth(load, server.process, 1000 if config.quick else 100_000))
            await client.close()
            rows.append(_restart(server, folder))
    return rows


def _client_library() -> Any:
    """Imported where it is used: the options can be read without it.

    Raises:
        SidError: it is not installed.
    """
    try:
        return importlib.import_module("tritonclient.grpc.aio")
    except ModuleNotFoundError as error:
        raise SidError(
            "tritonclient", "not installed", "Use the environment that `make serve-setup` makes."
        ) from error


class _Load:
    """Requests of one shape."""

    def __init__(
        self,
        client: Any,
        http: str,
        ranker: Ranker,
        events: int,
        candidates: int,
    ) -> None:
        self.client, self.http = client, http
        draw = np.random.default_rng(0)
        ids = ranker.item_ids
        times = np.sort(draw.integers(0, 10**6, events))
        values = {
            "candidates": draw.choice(ids, candidates),
            "history": draw.choice(ids, events),
            "history_action": draw.integers(0, 2, events),
            "history_ts": times,
            "ts": np.array([2 * 10**6]),
            **{name: np.zeros(1, np.float32) for name in ranker.dense_names},
        }
        self.inputs = []
        for name, value in values.items():
            kind = "FP32" if value.dtype == np.float32 else "INT64"
            self.inputs.append(_client_library().InferInput(name, list(value.shape), kind))
            self.inputs[-1].set_data_from_numpy(value if kind == "FP32" else value.astype(np.int64))

    async def ask(self) -> tuple[float, str]:
        """Milliseconds, and how it ended."""
        began = time.perf_counter()
        try:
            await self.client.infer(_NAME, self.inputs)
            status = "ok"
        except _client_library().InferenceServerException as error:
            status = str(error.status()).removeprefix("StatusCode.")
        return 1000 * (time.perf_counter() - began), status

    async def swaps(self) -> float:
        """Versions that the server has taken up."""

        def read() -> str:
            with urllib.request.urlopen(f"{self.http}/metrics") as page:  # noqa: S310  the loopback
                return str(page.read().decode())

        text = await asyncio.to_thread(read)
        found = re.search(r'^sid_swaps_total\{status="ok"\} (\S+)', text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    async def closed(self, seconds: float, clients: int = 32) -> float:
        """Answers per second of clients that ask again as soon as they are answered."""
        until = time.perf_counter() + seconds

        async def loop() -> int:
            done = 0
            while time.perf_counter() < until:
                done += (await self.ask())[1] == "ok"
            return done

        return sum(await asyncio.gather(*(loop() for _ in range(clients)))) / seconds

    async def open(self, gaps: Array) -> list[tuple[float, str]]:
        """Requests at given times, whether earlier ones are answered or not."""
        at = time.perf_counter() + np.cumsum(gaps)
        tasks = []
        for moment in at:
            await asyncio.sleep(max(0.0, moment - time.perf_counter()))
            tasks.append(asyncio.create_task(self.ask()))
        return list(await asyncio.gather(*tasks))


async def _latencies(load: _Load, seconds: float, shape: dict[str, int]) -> list[dict[str, Any]]:
    await load.closed(1.0)
    most = await load.closed(seconds)
    rate = 0.7 * most
    count = max(10, int(rate * seconds))
    gaps = {
        "constant": np.full(count, 1 / rate),
        "poisson": np.random.default_rng(1).exponential(1 / rate, count),
        "overload": np.full(2 * max(10, int(most * seconds)), 1 / (2 * most)),
    }
    rows = []
    for name, times in gaps.items():
        answers = await load.open(times)
        ok = np.array([ms for ms, status in answers if status == "ok"] or [np.nan])
        refused = np.array([ms for ms, status in answers if status == "RESOURCE_EXHAUSTED"] or [0.0])
        p50, p99 = (float(p) for p in np.percentile(ok, (50, 99)))
        rows.append(
            {
                **shape,
                "load": name,
                "max_rate": most,
                "rate": 1 / float(times.mean()),
                "requests": len(answers),
                "ok": int((~np.isnan(ok)).sum()),
                "refused": sum(status == "RESOURCE_EXHAUSTED" for _, status in answers),
                "p50_ms": p50,
                "p99_ms": p99,
                "p99_over_p50": p99 / p50,
                "refused_p99_ms": float(np.percentile(refused, 99)),
            }
        )
    return rows


async def _swapped(load: _Load, folder: Path, versions: Sequence[str], swaps: int) -> dict[str, Any]:
    """The served folder replaced by each version in turn while requests come, one after the other."""
    stop = asyncio.Event()
    ends: list[str] = []

    async def ask() -> None:
        while not stop.is_set():
            ends.append((await load.ask())[1])

    asking = asyncio.create_task(ask())
    taken = await load.swaps()
    for number in range(swaps):
        coming, going = folder.with_name("coming"), folder.with_name("going")
        shutil.copytree(versions[number % len(versions)], coming)
        folder.rename(going)
        coming.rename(folder)
        shutil.rmtree(going)
        while await load.swaps() == taken:
            await asyncio.sleep(0.02)
        taken = await load.swaps()
    stop.set()
    await asking
    return {"load": "swaps", "swaps": swaps, "requests": len(ends), "errors": sum(e != "ok" for e in ends)}


async def _growth(load: _Load, process: subprocess.Popen[bytes], requests: int) -> dict[str, Any]:
    """Resident memory of the server after a tenth of the requests and after all of them."""
    sizes = []
    for part in (requests // 10, requests - requests // 10):
        for _ in range(part // 50):
            await asyncio.gather(*(load.ask() for _ in range(50)))
        status = Path(f"/proc/{process.pid}/status").read_text()
        sizes.append(int(status.split("VmRSS:")[1].split()[0]) / 1024)
    return {"load": "growth", "requests": requests, "mb_before": sizes[0], "mb_after": sizes[1]}


def _restart(server: _Server, folder: Path) -> dict[str, Any]:
    """Seconds from a start after kill -9 to the first answer of the health check."""
    server.process.send_signal(signal.SIGKILL)
    server.process.wait()
    began = time.perf_counter()
    with _server(folder):
        return {"load": "restart", "seconds": time.perf_counter() - began}


class _Server(NamedTuple):
    process: subprocess.Popen[bytes]
    http: str
    grpc: str


@contextmanager
def _server(folder: Path) -> Iterator[_Server]:
    """A server of a folder on free ports of the loopback, on the last core; ready when this returns."""
    core = str(max(os.sched_getaffinity(os.getppid())))
    http, grpc = _free_port(), _free_port()
    program = [sys.executable, "-m", str(__package__).rpartition(".")[0], "serve"]
    options = [f"--folder={folder}", f"--http_port={http}", f"--grpc_port={grpc}", "--watch_seconds=0.05"]
    process = subprocess.Popen(["taskset", "-c", core, *program, *options])  # noqa: S603, S607
    server = _Server(process, f"http://127.0.0.1:{http}", f"127.0.0.1:{grpc}")
    try:
        while not _answers(f"{server.http}/v2/health/ready"):
            if process.poll() is not None:
                raise SidError("server", f"ended with status {process.returncode}", "Its message is above.")
            time.sleep(0.05)
        yield server
    finally:
        process.terminate()
        process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=1):  # noqa: S310  the loopback
            return True
    except OSError:
        return False


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


if __name__ == "__main__":
    main()
