"""One batch from whatever state it is in to its end."""

import asyncio
import contextlib
import logging
import os
import time
from pathlib import Path
from typing import Any, Protocol

import orjson

from manta.cluster.batches.background import current_place
from manta.cluster.batches.check import InputCheck
from manta.cluster.batches.files import content_path
from manta.cluster.batches.gate import Gate, Place
from manta.cluster.batches.lines import BatchRequest, answer_line, error_line, read_line
from manta.cluster.batches.output import end_batch
from manta.cluster.batches.records import (
    BatchRecord,
    Line,
    Result,
    Status,
    add_lines,
    forget_lines,
    get_batch,
    open_lines,
    set_status,
)
from manta.cluster.batches.results import ResultLog
from manta.cluster.batches.store import BatchStore

MAX_UNSAVED = 256  # answers that wait for the disk
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 16.0  # before a line is tried again; twice as long each time
MAX_FAILURES = 3  # of the server at one line
_BUSY = (429, 503)
_CHECK_BYTES = 1 << 18  # of an input file that are checked at a time
_PAGE = 256  # lines that are looked up at a time
logger = logging.getLogger("manta.batches")


class LocalCall(Protocol):
    """Answers a request as this server would over HTTP; gives status and body."""

    async def __call__(self, url: str, body: bytes, tenant: str, request_id: str) -> tuple[int, bytes]: ...


class Runner:
    def __init__(self, store: BatchStore, call: LocalCall, gate: Gate, max_line_bytes: int) -> None:
        self._store = store
        self._database = store.database
        self._call = call
        self._gate = gate
        self._max_line_bytes = max_line_bytes
        self._checking = asyncio.Lock()  # one input file at a time

    async def run(self, batch: BatchRecord, cancelled: asyncio.Event) -> None:
        """May be cancelled at any time, and called again. Raises StorageError."""
        if batch.status is Status.VALIDATING:
            async with self._checking:
                batch = await self._check(batch)
        if batch.status is Status.IN_PROGRESS:
            batch = await self._answer_all(batch, cancelled)
        if batch.status in (Status.IN_PROGRESS, Status.FINALIZING, Status.CANCELLING):
            await end_batch(self._database, batch)
            logger.info("batch %s has ended", batch.id)

    async def _check(self, batch: BatchRecord) -> BatchRecord:
        await self._database.write(forget_lines, batch.place)
        try:
            check = InputCheck(self._path(batch), batch.endpoint, self._max_line_bytes)
        except OSError as error:
            message = f"the input file cannot be read: {error.strerror or error}"
            return await self._fail(batch, [{"code": "unreadable_file", "line": None, "message": message}])
        with contextlib.closing(check):
            while (lines := await asyncio.to_thread(check.read, _CHECK_BYTES)) is not None:
                if lines and not check.errors:
                    await self._database.write(add_lines, batch.place, lines)
        if check.errors:
            return await self._fail(batch, check.errors)
        return await self._database.write(
            set_status, batch.place, Status.IN_PROGRESS, (Status.VALIDATING,), num_total=check.num_requests
        )

    async def _fail(self, batch: BatchRecord, errors: list[dict[str, Any]]) -> BatchRecord:
        await self._database.write(forget_lines, batch.place)
        told = orjson.dumps(errors).decode()
        return await self._database.write(set_status, batch.place, Status.FAILED, (Status.VALIDATING,), errors=told)

    async def _answer_all(self, batch: BatchRecord, cancelled: asyncio.Event) -> BatchRecord:
        """Until every line has a result, or the batch is cancelled, or its time is over."""
        answering = asyncio.create_task(self._answer_lines(batch))
        stopping = asyncio.create_task(cancelled.wait())
        left_s = max(0.0, batch.expires_s - time.time())
        try:
            await asyncio.wait({answering, stopping}, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                answering.result()
                return await self._database.write(set_status, batch.place, Status.FINALIZING, (Status.IN_PROGRESS,))
        finally:
            for task in (answering, stopping):
                task.cancel()
            await asyncio.gather(answering, stopping, return_exceptions=True)
        found = await self._database.read(get_batch, batch.tenant, batch.id)
        assert found is not None
        return found

    async def _answer_lines(self, batch: BatchRecord) -> None:
        results = ResultLog(self._database, batch.place)
        unsaved = asyncio.Semaphore(MAX_UNSAVED)
        after = 0
        async with asyncio.TaskGroup() as running:
            while page := await self._database.read(open_lines, batch.place, after, _PAGE):
                after = page[-1].number
                for line in page:
                    await unsaved.acquire()
                    place = await self._gate.enter(1)
                    running.create_task(self._answer_line(batch, line, place, results, unsaved))

    async def _answer_line(
        self, batch: BatchRecord, line: Line, place: Place, results: ResultLog, unsaved: asyncio.Semaphore
    ) -> None:
        try:
            result = await self._result(batch, line, place)
        except Exception:
            logger.exception("line %d of batch %s failed", line.number, batch.id)
            message = "the server failed at this line; its log has the details"
            result = Result(line.number, False, error_line(line.custom_id, "internal_error", message))
        await results.save(result)
        unsaved.release()

    async def _result(self, batch: BatchRecord, line: Line, place: Place) -> Result:
        """Gives the place back. Tries again while the server is busy, with places of its own."""
        request_id, pause_s, num_failures = f"{batch.id}-{line.number}", FIRST_PAUSE_S, 0
        try:
            data = await asyncio.to_thread(_read, self._path(batch), line)
            request = read_line(data, line.number, batch.endpoint)
            body = orjson.dumps(request.body)
            place.num_sequences = num_sequences(request)
            while True:
                current_place.set(place)
                status, answer = await self._call(request.url, body, batch.tenant, request_id)
                num_failures += status == 500
                if status not in _BUSY and (status != 500 or num_failures == MAX_FAILURES):
                    return Result(line.number, status < 400, answer_line(request, status, answer, request_id))
                self._gate.leave(place)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
                place = await self._gate.enter(place.num_sequences)
        finally:
            self._gate.leave(place)

    def _path(self, batch: BatchRecord) -> Path:
        return content_path(self._store.folder, batch.input_file)


def _read(path: Path, line: Line) -> bytes:
    handle = os.open(path, os.O_RDONLY)
    try:
        return os.pread(handle, line.num_bytes, line.start)
    finally:
        os.close(handle)


def num_sequences(request: BatchRequest) -> int:
    """How many sequences the request will have, as far as its fields are what they should be."""
    prompt = request.body.get("prompt", request.body.get("input"))
    num_prompts = len(prompt) if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list) else 1
    wanted = [request.body.get(name) for name in ("n", "best_of")]
    return num_prompts * max(each if type(each) is int and each > 0 else 1 for each in wanted)
