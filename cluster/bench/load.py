"""Sends requests when they are due, whether or not earlier ones have been answered (an open loop)."""

import asyncio
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from manta.cluster.bench.answers import AnswerReader, Record
from manta.cluster.bench.http_client import AnswerError, HttpClient


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request that only needs to be written to a connection."""

    body: bytes
    prompt_len: int  # tokens
    output_len: int  # tokens asked for
    request_id: str = ""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where requests go and how answers are read."""

    client: HttpClient
    path: str
    is_chat: bool
    keeps_text: bool = False


@dataclass(slots=True)
class Run:
    """What one load gave. Records are in the order of sending; those still under way when it stopped have no end."""

    records: list[Record]
    start_s: float  # time.perf_counter()
    duration_s: float
    client_cpu_s: float  # processor time of this process meanwhile
    is_interrupted: bool


async def run_load(
    endpoint: Endpoint,
    requests: Sequence[Prepared],
    arrivals_s: Sequence[float],
    max_concurrency: int | None,
    stop: asyncio.Event,
    on_end: Callable[[Record], object] = lambda record: None,
) -> Run:
    """Sends request i at `arrivals_s[i]` (ascending, from the start) until all have ended or `stop` is set.

    With `max_concurrency` a request also waits until fewer are under way.
    """
    records: list[Record] = []
    gc.collect()
    gc.freeze()  # the collector need not look at the prepared requests again
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    sender = asyncio.create_task(
        _send_all(endpoint, requests, [start_s + arrival for arrival in arrivals_s], max_concurrency, records, on_end)
    )
    stopper = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({sender, stopper}, return_when=asyncio.FIRST_COMPLETED)
        duration_s = time.perf_counter() - start_s
        client_cpu_s = time.process_time() - start_cpu_s
        is_interrupted = not sender.done()
    finally:
        stopper.cancel()
        sender.cancel()
        gc.unfreeze()
        await asyncio.wait({sender, stopper})
    if not is_interrupted:
        sender.result()
    return Run(records, start_s, duration_s, client_cpu_s, is_interrupted)


async def send_one(endpoint: Endpoint, request: Prepared, record: Record) -> None:
    """One request from its start to its end or error, both noted in `record`."""
    reader = AnswerReader(record, endpoint.is_chat, endpoint.keeps_text)
    headers = b"X-Request-Id: %b\r\n" % request.request_id.encode() if request.request_id else b""
    record.start_s = time.perf_counter()
    try:
        await endpoint.client.request("POST", endpoint.path, request.body, reader, headers)
        reader.close(time.perf_counter())
    except AnswerError as error:
        record.error = record.error or str(error)


async def _send_all(
    endpoint: Endpoint,
    requests: Sequence[Prepared],
    times_s: Sequence[float],
    max_concurrency: int | None,
    records: list[Record],
    on_end: Callable[[Record], object],
) -> None:
    free_slots = asyncio.Semaphore(max_concurrency or len(requests) or 1)

    async def run_one(request: Prepared, record: Record) -> None:
        try:
            await send_one(endpoint, request, record)
        finally:
            free_slots.release()
        on_end(record)

    ready_s = 0.0  # since when nothing has held the sender back
    async with asyncio.TaskGroup() as group:
        for request, time_s in zip(requests, times_s, strict=True):
            while (left_s := time_s - time.perf_counter()) > 0:
                await asyncio.sleep(left_s)
            if free_slots.locked():
                await free_slots.acquire()
                ready_s = time.perf_counter()
            else:
                await free_slots.acquire()
            due_s = max(time_s, ready_s)
            record = Record(request.prompt_len, request.output_len, due_s, due_s - time_s)
            records.append(record)
            group.create_task(run_one(request, record))
