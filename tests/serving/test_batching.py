"""Requests that arrive together are answered together; too many are refused; nobody waits for ever."""

import asyncio
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrec_sid.errors import SidError
from torchrec_sid.serving.batching import BatchLimits, MicroBatcher, Overloaded


def serve(ask, run, limits, rows=lambda request: request):
    """``await ask(batcher)`` over a fresh batcher."""

    async def session():
        batcher = MicroBatcher(run, rows, limits)
        try:
            return await ask(batcher)
        finally:
            await batcher.close()

    return asyncio.run(session())


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 60))
def test_every_request_gets_its_own_answer_and_no_batch_is_too_large(sizes, most):
    batches = []

    def run(requests):
        batches.append(list(requests))
        return [("answer to", size) for size in requests]

    async def ask(batcher):
        return await asyncio.gather(*(batcher.ask(size) for size in sizes))

    limits = BatchLimits(max_rows=most, max_queued_rows=10_000, timeout_ms=60_000)
    assert serve(ask, run, limits) == [("answer to", size) for size in sizes]
    assert sum(batches, []) == sizes, "first come, first served"
    assert all(sum(batch) <= most or len(batch) == 1 for batch in batches)


def test_what_waits_while_the_model_runs_is_one_batch():
    running, go = threading.Event(), threading.Event()
    batches = []

    def run(requests):
        batches.append(len(requests))
        running.set()
        go.wait(10)
        return requests

    async def ask(batcher):
        first = asyncio.create_task(batcher.ask(1))
        await asyncio.to_thread(running.wait, 10)
        others = [asyncio.create_task(batcher.ask(1)) for _ in range(5)]
        await asyncio.sleep(0)
        go.set()
        await asyncio.gather(first, *others)

    serve(ask, run, BatchLimits(max_wait_ms=0))
    assert batches == [1, 5]


def test_a_full_queue_refuses_at_once_and_recovers():
    go = threading.Event()

    def run(requests):
        go.wait(10)
        return requests

    async def ask(batcher):
        running = asyncio.create_task(batcher.ask(10))
        await asyncio.sleep(0.05)
        waiting = asyncio.create_task(batcher.ask(10))
        await asyncio.sleep(0.05)
        began = time.perf_counter()
        with pytest.raises(Overloaded, match="10 candidates"):
            await batcher.ask(1)
        assert time.perf_counter() - began < 1
        go.set()
        await asyncio.gather(running, waiting)
        assert batcher.queued_rows == 0
        assert await batcher.ask(3) == 3

    serve(ask, run, BatchLimits(max_rows=10, max_queued_rows=10, max_wait_ms=0))


def test_a_request_that_waited_too_long_is_not_run():
    seen = []

    def run(requests):
        seen.extend(requests)
        time.sleep(0.2)
        return requests

    async def ask(batcher):
        first = asyncio.create_task(batcher.ask(1))
        await asyncio.sleep(0.05)
        with pytest.raises(TimeoutError, match="waited"):
            await batcher.ask(2)
        await first

    serve(ask, run, BatchLimits(max_rows=1, max_wait_ms=0, timeout_ms=50))
    assert seen == [1]


def test_an_error_of_the_model_is_the_answer_of_its_batch_only():
    def run(requests):
        if 13 in requests:
            raise RuntimeError("unlucky")
        return requests

    async def ask(batcher):
        with pytest.raises(RuntimeError, match="unlucky"):
            await batcher.ask(13)
        return await batcher.ask(7)

    assert serve(ask, run, BatchLimits()) == 7


def test_a_client_that_left_is_not_run_and_disturbs_nobody():
    seen = []

    def run(requests):
        seen.extend(requests)
        time.sleep(0.1)
        return requests

    async def ask(batcher):
        first = asyncio.create_task(batcher.ask(1))
        await asyncio.sleep(0.03)
        gone = asyncio.create_task(batcher.ask(2))
        await asyncio.sleep(0.01)
        gone.cancel()
        assert await batcher.ask(3) == 3
        await first

    serve(ask, run, BatchLimits(max_rows=1, max_wait_ms=0))
    assert seen == [1, 3]


def test_a_batcher_that_closes_leaves_nobody_waiting():
    async def session():
        batcher = MicroBatcher(lambda rs: [time.sleep(0.1)] * len(rs), lambda r: 1, BatchLimits(max_rows=1))
        asks = [asyncio.create_task(batcher.ask(i)) for i in range(4)]
        await asyncio.sleep(0.03)
        await batcher.close()
        return await asyncio.wait_for(asyncio.gather(*asks, return_exceptions=True), 5)

    assert all(isinstance(end, asyncio.CancelledError) for end in asyncio.run(session()))


@pytest.mark.parametrize(
    "wrong",
    [{"max_rows": 0}, {"timeout_ms": 0}, {"max_wait_ms": -1}, {"max_rows": 9, "max_queued_rows": 8}],
)
def test_limits_that_make_no_sense_are_refused(wrong):
    with pytest.raises(SidError, match="BatchLimits"):
        BatchLimits(**wrong)
