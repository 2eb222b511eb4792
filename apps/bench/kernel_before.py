"""The attention operator of another checkout, in a process of its own that runs when it is told to."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from torchrec_sid.artifact import save_artifact
from torchrec_sid.errors import SidError

from .alternating import peak_mb

_INPUT = "bench_input"
# Runs in the checkout, whose modules have the names of ours; plain safetensors go in and out.
_WORKER = """
from __future__ import annotations
import sys, time
import torch
import torch.profiler
from safetensors.torch import load_file, save_file
try:
    from torchrec_sid.side.kernels import operator as found
except ImportError:
    from torchrec_sid.side.kernels import attention_operator as found
given = load_file(sys.argv[1])
layout, heads = sys.argv[2], int(sys.argv[3])
query, events, lengths, upstream = (given[n] for n in ("query", "events", "lengths", "upstream"))

def forward():
    return found.code_attention(
        query, events, lengths, None, None, layout, heads, "softmax", "auto", False
    )[0]

def both():
    out = found.code_attention(query, events, lengths, None, None, layout, heads, "softmax", "auto", False)
    none = torch.zeros(query.shape[:2])
    return found.code_attention_backward(
        upstream, none, *out, query, events, lengths, None, None, layout, heads, "softmax", "auto"
    )[0]

def _wait(device):
    pass

{peak}
works = {{"forward": forward, "forward+backward": both}}
print("ready", flush=True)
for line in sys.stdin:
    kind, threads, name = line.split()
    torch.set_num_threads(int(threads))
    if kind == "peak":
        print(peak_mb(works[name], torch.device("cpu")), flush=True)
        continue
    began = time.perf_counter()
    answer = works[name]()
    print(1000 * (time.perf_counter() - began), flush=True)
    if kind == "save":
        save_file({{"answer": answer.detach().contiguous()}}, sys.argv[4])
        print("saved", flush=True)
"""


class KernelBefore:
    """The operator of a checkout on one input.

    Args:
        checkout: folder of the repository at the commit to compare with.
        query: ``[1, rows, F]`` float32.
        events: ``[E, S]`` uint8.
        upstream: like the query, the gradient that goes backward.
        layout: of the events, as text.
        heads: of attention.

    Raises:
        SidError: no such checkout, or its operator does not run.
    """

    def __init__(
        self, checkout: str, query: Tensor, events: Tensor, upstream: Tensor, layout: str, heads: int
    ) -> None:
        self.checkout = Path(checkout)
        if not (self.checkout / "torchrec_sid" / "side" / "kernels").is_dir():
            raise SidError("before", f"{checkout!r} holds no torchrec_sid", "Pass a checkout of it.")
        self._folder = tempfile.TemporaryDirectory()
        self._answer = Path(self._folder.name) / "answer.safetensors"
        given = Path(self._folder.name) / "input.safetensors"
        lengths = torch.tensor([len(events)])
        tensors = {"query": query, "events": events, "upstream": upstream, "lengths": lengths}
        save_artifact(given, kind=_INPUT, version=1, config={}, tensors=tensors)
        program = _WORKER.format(peak=inspect.getsource(peak_mb))
        command = [sys.executable, "-c", program, str(given), layout, str(heads), str(self._answer)]
        self._process = subprocess.Popen(
            command,
            cwd=self.checkout,
            env={**os.environ, "PYTHONPATH": str(self.checkout.absolute())},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.milliseconds: dict[str, list[float]] = {}
        """Pass -> what the process itself measured, run by run."""
        self._read()

    def run(self, step: str) -> None:
        """One pass: ``forward`` or ``forward+backward``."""
        found = float(self._ask("run", step))
        self.milliseconds.setdefault(step, []).append(found)

    def answer(self, step: str) -> Tensor:
        """What a pass returns: the output, or the gradient of the queries."""
        from safetensors.torch import load_file

        self._ask("save", step)
        self._read()
        return load_file(self._answer)["answer"]

    def peak_mb(self, step: str) -> float:
        """Peak of the tensors of a pass, in 10^6 bytes."""
        return float(self._ask("peak", step))

    def close(self) -> None:
        """End the process."""
        self._process.communicate()
        self._folder.cleanup()

    def _ask(self, kind: str, step: str) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{kind} {torch.get_num_threads()} {step}\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SidError("before", f"{self.checkout} ended", "Its message is above.")
        return line
