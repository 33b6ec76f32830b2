"""Requests whose output follows a grammar wait here until the workers have compiled it, so that no step ever does."""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

import grpc
import grpc.aio

from manta.cluster.engine.workers import WorkerGroup
from manta.protos import engine_pb2 as pb
from manta.protos import worker_pb2
from manta.protos.sampling_pb2 import Grammar

logger = logging.getLogger(__name__)

MAX_WAITING = 1024  # requests
NUM_AT_ONCE = 2  # grammars that workers compile side by side: the cores are for steps
TIMEOUT_S = 60.0  # the first grammar makes workers load the vocabulary
_RETRY_AFTER_S = 1.0
_ASK_AGAIN_S = 0.1
_NOT_STARTED = pb.Refused(code=pb.Refused.UNAVAILABLE, message="no worker can compile the grammar: none has started")

Ready = Callable[[pb.Refused | None], None]


class GrammarGate:
    """Asks every rank that samples, on all replicas, to compile a grammar; equal ones at the same time are one call."""

    def __init__(self, groups: list[WorkerGroup]) -> None:
        self._groups = groups
        self._waiting: dict[int, Ready] = {}  # by request id
        self._compiling: dict[tuple[int, str], asyncio.Task[pb.Refused | None]] = {}
        self._slots = asyncio.Semaphore(NUM_AT_ONCE)

    def hold(self, request_id: int, grammar: Grammar, ready: Ready, *, resubmitted: bool = False) -> pb.Refused | None:
        """Calls `ready` when workers can follow the grammar, or with the reason why not. Returns a reason at once when
        too many wait; one that was accepted before is never too many."""
        if len(self._waiting) >= MAX_WAITING and not resubmitted:
            message = f"{MAX_WAITING} requests wait for their grammars to be compiled"
            return pb.Refused(code=pb.Refused.QUEUE_FULL, message=message, retry_after_s=_RETRY_AFTER_S)
        self._waiting[request_id] = ready
        key = (grammar.kind, grammar.text)
        task = self._compiling.get(key)
        if task is None:
            task = self._compiling[key] = asyncio.create_task(self._compile(grammar))
            task.add_done_callback(lambda _: self._compiling.pop(key, None))
        task.add_done_callback(lambda task: self._release(request_id, task))
        return None

    @property
    def num_held(self) -> int:
        """Requests that wait here."""
        return len(self._waiting)

    def drop(self, request_id: int) -> bool:
        """Forgets a request; False if it does not wait here."""
        return self._waiting.pop(request_id, None) is not None

    async def close(self) -> None:
        """Forgets all requests."""
        self._waiting.clear()
        tasks = list(self._compiling.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _release(self, request_id: int, task: "asyncio.Task[pb.Refused | None]") -> None:
        ready = self._waiting.pop(request_id, None)
        if ready is None or task.cancelled():
            return
        error = task.exception()
        if error is not None:
            logger.error("compiling a grammar failed", exc_info=error)
            ready(pb.Refused(code=pb.Refused.UNAVAILABLE, message=f"the grammar could not be compiled: {error!r}"))
            return
        refused = task.result()
        # Each request is told by a message of its own, which gets its handle.
        ready(None if refused is None else pb.Refused(code=refused.code, message=refused.message))

    async def _compile(self, grammar: Grammar) -> pb.Refused | None:
        """Where all that there are meet the other ranks of their replica again, waits for them."""
        began_s = time.monotonic()
        while True:
            async with self._slots:
                stubs = [stub for group in self._groups for stub in group.stubs[group.output_rank :]]
                errors = await asyncio.gather(*(_compile_on(stub, grammar) for stub in stubs))
            if not errors:
                return None
            invalid = next((error for error in errors if error and error.code == pb.Refused.INVALID), None)
            if invalid is not None or None in errors:  # a replica that is lost takes no requests
                return invalid
            if _NOT_STARTED not in errors or time.monotonic() - began_s > TIMEOUT_S:
                return errors[0]
            await asyncio.sleep(_ASK_AGAIN_S)


async def _compile_on(stub: Any, grammar: Grammar) -> pb.Refused | None:
    """None, too, for a worker that is gone: those that come in its place compile the grammar when it reaches them."""
    try:
        await stub.Compile(worker_pb2.CompileRequest(grammar=grammar), timeout=TIMEOUT_S)
    except asyncio.CancelledError:
        if (task := asyncio.current_task()) is not None and task.cancelling():
            raise
        return None  # not this task was cancelled: the worker has been replaced and its channel closed
    except grpc.aio.AioRpcError as error:
        if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
            return None
        if error.code() is grpc.StatusCode.INVALID_ARGUMENT:
            return pb.Refused(code=pb.Refused.INVALID, message=error.details() or "the grammar cannot be followed")
        if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            message = f"structured_outputs took the workers more than {TIMEOUT_S:.0f} s to compile"
            return pb.Refused(code=pb.Refused.INVALID, message=message)
        if error.code() is grpc.StatusCode.FAILED_PRECONDITION:
            return _NOT_STARTED
        message = f"no worker can compile the grammar: {error.details() or error.code().name}"
        return pb.Refused(code=pb.Refused.UNAVAILABLE, message=message)
    return None
