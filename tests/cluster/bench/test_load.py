"""The load generator keeps its schedule, its limits and count of what went wrong."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import uvloop

from manta.cluster.bench.http_client import Address, HttpClient
from manta.cluster.bench.load import Endpoint, Prepared, Run, run_load
from tests.support.fake_openai import FakeServer, Reply, Request, completion_events, usage_of

GOOD = completion_events(["a", "b"], usage_of(3, 2))


def load(
    server: FakeServer,
    arrivals_s: list[float],
    max_concurrency: int | None = None,
    until: Callable[[], bool] | None = None,
) -> Run:
    """Runs one request per arrival; stops early once `until()` holds."""

    async def watch(stop: asyncio.Event) -> None:
        while until is not None and not until():
            await asyncio.sleep(0.002)
        if until is not None:
            stop.set()

    async def work() -> Run:
        client = HttpClient(Address.parse(server.url), {})
        requests = [Prepared(b'{"number": %d}' % number, 3, 2, f"id-{number}") for number in range(len(arrivals_s))]
        stop = asyncio.Event()
        watcher = asyncio.create_task(watch(stop))
        run = await run_load(Endpoint(client, "/v1/completions", False), requests, arrivals_s, max_concurrency, stop)
        watcher.cancel()
        client.close()
        return run

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(asyncio.wait_for(work(), 30))


def test_requests_go_out_when_due_though_none_is_answered() -> None:
    """An open loop: the server answers nobody before the last request has come."""
    arrivals_s = [0.0, 0.02, 0.02, 0.05, 0.09]
    came_s: list[float] = []

    async def wait_for_all(request: Request, reply: Reply) -> None:
        came_s.append(time.perf_counter())
        while len(came_s) < len(arrivals_s):
            await asyncio.sleep(0.001)
        await reply.stream(GOOD)

    with FakeServer(wait_for_all) as server:
        run = load(server, arrivals_s)
        assert [request.body["number"] for request in server.requests] in ([0, 1, 2, 3, 4], [0, 2, 1, 3, 4])
        assert {request.headers["x-request-id"] for request in server.requests} == {f"id-{i}" for i in range(5)}
    for record, arrival_s in zip(run.records, arrivals_s, strict=True):
        assert record.is_success
        assert record.due_s == pytest.approx(run.start_s + arrival_s)
        assert record.start_s >= record.due_s
        assert record.queue_s == 0
        assert record.ttft_s >= arrivals_s[-1] - arrival_s - 0.001, "nobody could be answered before the last came"
    assert run.duration_s >= arrivals_s[-1]
    assert not run.is_interrupted


@pytest.mark.parametrize("limit", [1, 3])
def test_max_concurrency(limit: int) -> None:
    under_way = most = 0

    async def count(request: Request, reply: Reply) -> None:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.003)
        under_way -= 1
        await reply.stream(GOOD)

    with FakeServer(count) as server:
        run = load(server, [0.0] * 12, limit)
        assert server.requests[0].body["number"] < limit
    assert most == limit
    assert all(record.is_success for record in run.records)
    assert [record.queue_s > 0 for record in run.records] == [False] * limit + [True] * (12 - limit)
    for record in run.records:
        assert record.due_s == pytest.approx(run.start_s + record.queue_s)
        assert record.start_s >= record.due_s


def test_failures_are_counted_one_by_one() -> None:
    async def by_number(request: Request, reply: Reply) -> None:
        answers: list[Callable[[], Awaitable[Any]]] = [
            lambda: reply.stream(GOOD),
            lambda: reply.json({"error": {"message": "queue full"}}, 503),
            reply.cut,
            lambda: reply.stream(GOOD[:1]),
        ]
        await answers[request.body["number"] % 4]()

    with FakeServer(by_number) as server:
        run = load(server, [0.0] * 8)
    errors = [record.error for record in run.records]
    assert errors == errors[:4] * 2
    assert errors[0] == ""
    assert errors[1] == "HTTP 503: queue full"
    assert "without an answer" in errors[2]
    assert "without a finish_reason" in errors[3]


def test_interrupted() -> None:
    """Two are answered, the others hang or were not sent yet."""

    async def answer_two(request: Request, reply: Reply) -> None:
        if request.body["number"] < 2:
            await reply.stream(GOOD)
        else:
            await reply.start()
            await asyncio.sleep(60)

    with FakeServer(answer_two) as server:
        run = load(server, [0.0, 0.0, 0.0, 0.0, 3600.0], until=lambda: len(server.requests) == 4)
        assert run.is_interrupted
        assert run.duration_s < 60
        assert len(run.records) == 4
        assert all(not record.error for record in run.records)
        assert not any(record.is_success for record in run.records[2:])


def test_client_time_is_measured() -> None:
    async def answer(request: Request, reply: Reply) -> None:
        await reply.stream(completion_events(["a"] * 50, usage_of(3, 50)))

    with FakeServer(answer) as server:
        run = load(server, [0.0] * 20)
    assert run.client_cpu_s > 0
    assert sum(len(record.chunk_times_s) for record in run.records) == 1000
