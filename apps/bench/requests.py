"""One user, many candidates: `python -m apps.bench.requests [--quick] --before CHECKOUT --json FILE`.

The attention operator alone, from absorbed queries and packed events (systems ``code_space``: as modules
call it, with its checks; ``code_space_rows``: the operator of ``--before``, a checkout of another commit,
on the same input in a process of its own) against scaled_dot_product_attention over events whose keys and
values are at hand (``sdpa_dense``, 384 dims; ``sdpa_narrow``, 32) and over dense events with the query
absorbed (``absorbed_dense``). Backward: the gradient of the queries, and for SDPA of keys and values too.
Errors are against float64, for the first candidates. Peaks count tensors; the compiled kernel's own tables
and copy of the events (under 2 MB a thread and 30 bytes an event) come on top.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from torchrec_sid.artifact import write_json
from torchrec_sid.side.event_layout import FeatureLayout
from torchrec_sid.side.kernels.attention_operator import code_attention, code_attention_backward

from .alternating import alternate, peak_mb
from .kernel_before import KernelBefore

CPU = torch.device("cpu")
CHECKED = 4
"""Candidates whose results are compared with float64."""


@dataclass(frozen=True)
class RequestBenchConfig:
    """What to run."""

    quick: bool = False
    """Small requests, three rounds (under a minute)."""
    json: str | None = None
    """File for the rows."""
    before: str | None = None
    """Checkout whose operator is code_space_rows; none: that system is left out."""
    rounds: int = 7
    """Timed runs of each system; 3 with --quick."""
    heads: int = 4
    """Attention heads."""
    seed: int = 0
    """Of events and queries."""


class Request(NamedTuple):
    """Shape of one request."""

    events: int
    candidates: int
    code_bytes: int
    """Bytes of a SID, five trits each."""
    actions: int
    age_buckets: int
    zipf: bool
    """SIDs by Zipf's law, so that events repeat; False: uniform."""


class Work(NamedTuple):
    """One system and pass."""

    run: Callable[[], Tensor | None]
    """The output, or the gradient of the queries by candidate; None: another process has it."""
    truth: Tensor
    """The same in float64, of the first candidates."""


def requests(config: RequestBenchConfig) -> Iterator[Request]:
    """The main request, then one thing changed at a time."""
    if config.quick:
        yield Request(1_000, 50, 5, 2, 8, False)
        yield Request(1_000, 50, 1, 2, 8, True)
        return
    yield Request(10_000, 500, 5, 2, 8, False)
    yield Request(10_000, 500, 1, 2, 8, True)
    yield Request(10_000, 500, 1, 2, 8, False)
    for events in (1_000, 100_000):
        yield Request(events, 500, 5, 2, 8, False)
    for candidates in (1, 20, 1_000):
        yield Request(10_000, candidates, 5, 2, 8, False)


def make_events(request: Request, layout: FeatureLayout, generator: torch.Generator) -> Tensor:
    """``[E, S]`` uint8."""
    columns = []
    for number, column in enumerate(layout.columns):
        weights = torch.ones(column.values)
        if request.zipf and number < request.code_bytes:
            weights = 1 / torch.arange(1.0, column.values + 1)
        columns.append(torch.multinomial(weights, request.events, True, generator=generator))
    return torch.stack(columns, 1).to(torch.uint8)


def code_space(
    request: Request, events: Tensor, layout: FeatureLayout, config: RequestBenchConfig
) -> tuple[dict[tuple[str, str], Work], KernelBefore | None]:
    """``{(system, pass): Work}`` of the operator, and that of the checkout before."""
    generator, heads = torch.Generator().manual_seed(config.seed), config.heads
    rows = request.candidates * heads
    query = torch.randn(1, rows, layout.num_features, generator=generator) * 0.3
    upstream = torch.randn(1, rows, layout.num_features, generator=generator)
    lengths, nothing = torch.tensor([request.events]), torch.zeros(1, rows)
    static = (layout.text, heads, "softmax")

    def step() -> Tensor:
        out = code_attention(query, events, lengths, None, None, *static, "auto", False)
        return code_attention_backward(
            upstream, nothing, *out, query, events, lengths, None, None, *static, "auto"
        )[0]

    first = query[0, : CHECKED * heads].double().requires_grad_()
    phi = layout.expand(events, torch.float64)
    z = torch.softmax(first @ phi.T, -1) @ phi
    grad = torch.autograd.grad((z * upstream[0, : len(first)]).sum(), first)[0]

    def forward() -> Tensor:
        return code_attention(query, events, lengths, None, None, *static, "auto", False)[0]

    works = {
        ("code_space", "forward"): Work(forward, z.detach()),
        ("code_space", "forward+backward"): Work(step, grad),
    }
    if config.before is None:
        return works, None
    before = KernelBefore(config.before, query, events, upstream, layout.text, heads)
    for (_, name), work in list(works.items()):
        works["code_space_rows", name] = Work(partial(before.run, name), work.truth)
    return works, before


def dense(request: Request, dims: int, absorbed: bool, config: RequestBenchConfig) -> Any:
    """``{pass: Work}`` over dense events; ``absorbed``: every head scores the events themselves."""
    generator, heads = torch.Generator().manual_seed(config.seed), config.heads
    width = dims if absorbed else dims // heads

    def normal(kind: int, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * (0.3 if kind == 0 else 1.0)

    query = normal(0, 1, heads, request.candidates, width).requires_grad_()
    shared = (1, 1 if absorbed else heads, request.events, width)
    key = normal(1, *shared).requires_grad_(not absorbed)
    value = key if absorbed else normal(1, *shared).requires_grad_()
    upstream = normal(1, *query.shape)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not absorbed:
            return F.scaled_dot_product_attention(q, k, v)
        scores = q.flatten(0, 2) @ k[0, 0].T * width**-0.5
        return (scores.softmax(-1) @ v[0, 0]).view(q.shape)

    def forward() -> Tensor:
        with torch.no_grad():
            return attend(query, key, value)[0].transpose(0, 1)

    def step() -> Tensor:
        leaves = (query,) if absorbed else (query, key, value)
        return torch.autograd.grad(attend(query, key, value), leaves, upstream)[0][0].transpose(0, 1)

    first = query.detach()[:, :, :CHECKED].double().requires_grad_()
    truth = attend(first, key.detach().double(), value.detach().double())
    grad = torch.autograd.grad(truth, first, upstream[:, :, :CHECKED].double())[0]
    return {
        "forward": Work(forward, truth.detach()[0].transpose(0, 1)),
        "forward+backward": Work(step, grad[0].transpose(0, 1)),
    }


def measure(request: Request, config: RequestBenchConfig) -> list[dict[str, Any]]:
    """The rows of one request, all systems in turn."""
    text = ",".join(["3x3x3x3x3"] * request.code_bytes + [f"#{request.actions}", f"#{request.age_buckets}"])
    layout = FeatureLayout.parse(text)
    events = make_events(request, layout, torch.Generator().manual_seed(config.seed))
    works, before = code_space(request, events, layout, config)
    rivals = (("sdpa_dense", 384, False), ("sdpa_narrow", 32, False), ("absorbed_dense", 384, True))
    for name, dims, absorbed in rivals:
        found = dense(request, dims, absorbed, config)
        works |= {(name, step): work for step, work in found.items()}
    threads, rows = torch.get_num_threads(), []
    for count in sorted({1, threads}):
        torch.set_num_threads(count)
        named = {" ".join(key): work.run for key, work in works.items()}
        rounds = 3 if config.quick else config.rounds
        times = alternate(named, rounds, CPU)
        for (system, step), work in works.items():
            truth = work.truth
            answer, milliseconds = work.run(), times[f"{system} {step}"]
            if answer is None:
                assert before is not None
                milliseconds = median(before.milliseconds[step][-rounds - 1 : -1])
                answer, peak = before.answer(step), before.peak_mb(step)
            else:
                peak = peak_mb(work.run, CPU)
            found = answer.detach().double().reshape(-1, truth.shape[-1])[: truth[..., 0].numel()]
            error = (found - truth.reshape(found.shape)).abs().max() / truth.abs().max()
            rows.append(
                {
                    "events": request.events,
                    "candidates": request.candidates,
                    "heads": config.heads,
                    "code_bytes": request.code_bytes,
                    "actions": request.actions,
                    "age_buckets": request.age_buckets,
                    "distinct_events": len(torch.unique(events, dim=0)),
                    "threads": count,
                    "system": system,
                    "pass": step,
                    "ms": milliseconds,
                    "peak_mb": peak,
                    "max_error": float(error),
                }
            )
    torch.set_num_threads(threads)
    if before is not None:
        before.close()
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Print the rows of one request, with how many times slower each system is than ``code_space``."""
    first = rows[0]
    print(
        f"\n{first['events']} events ({first['distinct_events']} distinct) of {first['code_bytes']} code "
        f"bytes, {first['candidates']} candidates, {first['heads']} heads"
    )
    for row in rows:
        ours = next(
            r["ms"]
            for r in rows
            if (r["system"], r["pass"], r["threads"]) == ("code_space", row["pass"], row["threads"])
        )
        print(
            f"{row['threads']} threads {row['system']:16}{row['pass']:18}{row['ms']:10.2f} ms "
            f"{row['ms'] / ours:7.1f} x {row['peak_mb']:9.1f} MB  error {row['max_error']:.1e}"
        )


def main() -> None:
    """Run, print, and write the rows."""
    from ..cli import parse_config

    config = parse_config(RequestBenchConfig, __doc__)
    print(f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.2f}, torch {torch.__version__}")
    rows: list[dict[str, Any]] = []
    for request in requests(config):
        measured = measure(request, config)
        show(measured)
        rows += measured
    if config.json:
        write_json(Path(config.json), {"rows": rows})


if __name__ == "__main__":
    main()
