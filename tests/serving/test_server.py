"""A server in its own environment, over the loopback, asked by a client that no one here wrote."""

import json
import os
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.models.test_ranking import ITEMS
from tests.serving.test_ranker import DENSE, export_items
from tests.serving.test_rankers import make_ranking
from torchrec_sid.serving.ranker import Ranker, RankRequest

_ROOT = Path(__file__).resolve().parents[2]
_PYTHON = _ROOT / ".venv-serve" / "bin" / "python"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not _PYTHON.is_file(), reason="no environment of a server: make serve-setup"),
]
_CLIENT = """
import json, sys
import numpy as np
import tritonclient.{protocol} as triton
client = triton.InferenceServerClient("127.0.0.1:{port}")
inputs = []
for name, (kind, values) in json.loads(sys.argv[1]).items():
    array = np.array(values, np.float32 if kind == "FP32" else np.int64)
    inputs.append(triton.InferInput(name, list(array.shape), kind))
    inputs[-1].set_data_from_numpy(array)
answer = client.infer("ranker", inputs)
print(json.dumps([answer.as_numpy("candidates").tolist(), answer.as_numpy("scores").tolist()]))
"""


@pytest.fixture(scope="module")
def versions(tmp_path_factory):
    """Two versions of a served folder, which answer differently."""
    folders = []
    for arm in ("hashed_prefix+side", "full_id"):
        folder = tmp_path_factory.mktemp(arm.replace("+", "-")) / "served"
        export_items(make_ranking(arm), folder, 100 + torch.arange(ITEMS))
        folders.append(folder)
    return folders


class Running:
    """A server process and where it listens."""

    def __init__(self, folder, *options):
        with socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", 0))
            two.bind(("127.0.0.1", 0))
            self.http, self.grpc = one.getsockname()[1], two.getsockname()[1]
        command = [str(_PYTHON), "-m", "apps", "serve", f"--folder={folder}", "--watch_seconds=0.1"]
        command += [f"--http_port={self.http}", f"--grpc_port={self.grpc}", *options]
        self.process = subprocess.Popen(command, cwd=_ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
        until = time.monotonic() + 120
        while not self.ready():
            assert self.process.poll() is None, "the server ended"
            assert time.monotonic() < until, "the server is not ready"
            time.sleep(0.1)

    def ready(self):
        try:
            return self.get("/v2/health/ready") is not None
        except OSError:
            return False

    def get(self, path):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.http}{path}", timeout=10) as answer:
            return answer.read().decode()

    def ask(self, inputs):
        """Status and body of one REST request."""
        body = {
            "inputs": [
                {"name": n, "shape": [len(v)], "datatype": k, "data": v} for n, (k, v) in inputs.items()
            ]
        }
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.http}/v2/models/ranker/infer",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)


@contextmanager
def running(folder, *options):
    server = Running(folder, *options)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.wait()


def inputs(dense, events=3, rows=4, **changes):
    draw = np.random.default_rng(0)
    values = {
        "candidates": ("INT64", draw.integers(100, 100 + ITEMS, rows).tolist()),
        "history": ("INT64", draw.integers(100, 100 + ITEMS, events).tolist()),
        "history_action": ("INT64", draw.integers(0, 2, events).tolist()),
        "history_ts": ("INT64", [10 * (i + 1) for i in range(events)]),
        "ts": ("INT64", [1000]),
        **{name: ("FP32", [0.5]) for name in DENSE[:dense]},
    }
    return values | changes


def expected(folder, asked):
    ranker = Ranker.load(folder)
    rows = len(asked["candidates"][1])
    dense = np.tile(np.array([asked[n][1][0] for n in ranker.dense_names], np.float32), (rows, 1))
    integers = (
        np.array(asked[n][1], np.int64) for n in ("candidates", "history", "history_action", "history_ts")
    )
    return ranker.rank([RankRequest(*integers, asked["ts"][1][0], dense)])[0].scores


def test_both_protocols_answer_as_the_model_and_refuse_by_name(versions):
    dense = len(Ranker.load(versions[0]).dense_names)
    asked = inputs(dense)
    wanted = expected(versions[0], asked)
    with running(versions[0]) as server:
        for protocol, port in (("http", server.http), ("grpc", server.grpc)):
            script = _CLIENT.format(protocol=protocol, port=port)
            done = subprocess.run(
                [str(_PYTHON), "-c", script, json.dumps(asked)], capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr[-1000:]
            ids, scores = json.loads(done.stdout)
            assert ids == asked["candidates"][1]
            np.testing.assert_allclose(scores, wanted, atol=1e-5)
        for wrong, named in (
            (inputs(dense, rows=0), "candidates"),
            (inputs(dense, candidates=("INT64", [5])), "item 5 is not in this model"),
            (inputs(dense, history_action=("INT64", [1])), "history_action has 1"),
            (inputs(dense, ts=("INT64", [1])), "after ts 1"),
            (inputs(dense, colour=("INT64", [1])), "colour"),
            (inputs(dense, candidates=("FP32", [100.0])), "INT64"),
            ({n: v for n, v in asked.items() if n != "a"}, "a: missing"),
        ):
            status, answer = server.ask(wrong)
            assert status == 400, (named, answer)
            assert named in answer["error"]
        metrics = server.get("/metrics")
        assert 'sid_requests_total{status="ok"} 2.0' in metrics
        assert 'sid_requests_total{status="refused"} 7.0' in metrics
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0, "it ends by itself when asked to"


def test_versions_are_exchanged_without_an_error(versions, tmp_path):
    import shutil

    folder = tmp_path / "served"
    shutil.copytree(versions[0], folder)
    dense = len(Ranker.load(versions[0]).dense_names)
    asked = inputs(dense)
    answers = {
        i: np.round(expected(version, asked).astype(float), 4).tolist()
        for i, version in enumerate(versions)
    }
    assert answers[0] != answers[1]
    with running(folder) as server:
        seen, stop = [], threading.Event()

        def ask():
            while not stop.is_set():
                status, answer = server.ask(asked)
                scores = (
                    next(o["data"] for o in answer["outputs"] if o["name"] == "scores")
                    if status == 200
                    else None
                )
                seen.append((status, np.round(scores, 4).tolist() if scores else answer))

        thread = threading.Thread(target=ask)
        thread.start()
        for number in (1, 0, 1):
            coming, going = tmp_path / "coming", tmp_path / "going"
            shutil.copytree(versions[number], coming)
            folder.rename(going)
            coming.rename(folder)
            shutil.rmtree(going)
            until = time.monotonic() + 60
            while (not seen or seen[-1] != (200, answers[number])) and time.monotonic() < until:
                time.sleep(0.05)
            assert seen[-1] == (200, answers[number])
        stop.set()
        thread.join()
    assert {status for status, _ in seen} == {200}
    assert all(scores in answers.values() for _, scores in seen)


def test_too_much_is_refused_and_the_server_lives(versions):
    dense = len(Ranker.load(versions[0]).dense_names)
    few = ("--limits.max_rows=8", "--limits.max_queued_rows=8", "--max_candidates=16")
    with running(versions[0], *few) as server:
        status, answer = server.ask(inputs(dense, rows=17))
        assert (status, "at most 16" in answer["error"]) == (400, True)
        ends = []
        threads = [
            threading.Thread(target=lambda: ends.append(server.ask(inputs(dense, rows=8))[0]))
            for _ in range(40)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert set(ends) == {200, 429}, "some are answered, the others told to come back"
        assert server.ask(inputs(dense))[0] == 200
