"""Sends the lines of a batch to a server, a bounded number at a time, and writes each answer as it comes."""

import asyncio
import dataclasses
from collections.abc import Callable, Iterable
from typing import Protocol

import orjson

from manta.cluster.batches.lines import BatchLineError, BatchRequest, answer_line, error_line, read_line

MAX_TRIES = 6
FIRST_PAUSE_S = 0.5  # before a request is sent again; twice as long each time
_BUSY = (429, 503)


class SendError(Exception):
    """The request got no answer; the message says what happened instead."""


class Send(Protocol):
    """Posts `body` to the server's path `url`; gives status and body of the answer. Raises SendError."""

    async def __call__(self, url: str, body: bytes) -> tuple[int, bytes]: ...


@dataclasses.dataclass(slots=True)
class Counts:
    """How the lines of a batch ended so far."""

    answered: int = 0
    refused: int = 0  # answers with an error status
    failed: int = 0  # no request, or no answer


async def run_lines(
    lines: Iterable[bytes],
    send: Send,
    write: Callable[[bytes], object],
    window: int,
    on_done: Callable[[], object] = lambda: None,
) -> Counts:
    """Every line that is not blank gets one output line, in the order of their ends. At most `window` run at once, and
    no more lines than these are in memory."""
    counts = Counts()
    places = asyncio.Semaphore(window)
    running: set[asyncio.Task[None]] = set()

    async def run(line: bytes, number: int) -> None:
        try:
            write(await _answer(line, number, send, counts))
            on_done()
        finally:
            places.release()

    try:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                await places.acquire()
                _raise_failure(running)
                running.add(asyncio.create_task(run(line, number)))
        await asyncio.gather(*running)
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
    return counts


def _raise_failure(running: set[asyncio.Task[None]]) -> None:
    """Forgets tasks that have ended. Raises what one of them did not foresee, such as a full disk."""
    for task in [task for task in running if task.done()]:
        running.discard(task)
        task.result()


async def _answer(line: bytes, number: int, send: Send, counts: Counts) -> bytes:
    try:
        request = read_line(line, number)
    except BatchLineError as error:
        counts.failed += 1
        return error_line(error.custom_id, "invalid_request", str(error))
    try:
        status, body = await _send_patiently(request, send)
    except SendError as error:
        counts.failed += 1
        return error_line(request.custom_id, "no_answer", str(error))
    if status < 400:
        counts.answered += 1
    else:
        counts.refused += 1
    return answer_line(request, status, body)


async def _send_patiently(request: BatchRequest, send: Send) -> tuple[int, bytes]:
    """Again, after a pause, while the server is busy."""
    body, pause_s = orjson.dumps(request.body), FIRST_PAUSE_S
    for _ in range(MAX_TRIES - 1):
        status, answer = await send(request.url, body)
        if status not in _BUSY:
            return status, answer
        await asyncio.sleep(pause_s)
        pause_s *= 2
    return await send(request.url, body)
