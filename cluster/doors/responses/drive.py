"""Runs a response to its end: for a client that waits for it, one that reads its events, and one that comes later."""

import asyncio
import contextlib

from manta.cluster.doors.exchange import Reply
from manta.cluster.doors.openai_call import started
from manta.cluster.doors.responses.events import EventLog
from manta.cluster.doors.responses.run import Run
from manta.cluster.doors.service import Service


async def collect(service: Service, run: Run) -> None:
    """Raises RequestError."""
    with service.running.call(run.id, run.resolved) as call:
        async with contextlib.aclosing(call.deltas()) as deltas:
            async for _, delta in deltas:
                run.push(delta)


async def stream(service: Service, run: Run, reply: Reply) -> None:
    """Tells every event at once. An error is an event, too, once there was another one; before it is raised."""
    with service.running.call(run.id, run.resolved) as call:
        try:
            opening = b"".join(run.opening())
            async with contextlib.aclosing(started(call.deltas(), reply, opening)) as deltas:
                async for _, delta in deltas:
                    run.push(delta)
                    new = b"".join(run.take_events())
                    if run.ended.is_set():
                        await reply.end_events(new, is_done_told=False)
                    elif new:
                        await reply.events(new)
        except Exception as error:
            if not reply.is_streaming:
                raise
            run.fail(error)
            await reply.end_events(b"".join(run.take_events()), is_done_told=False)


async def run_in_background(service: Service, run: Run, log: EventLog | None) -> None:
    """Whatever happens, the run has ended and the log is complete when this returns."""
    try:
        if log is not None:
            log.append(run.opening())
        with service.running.call(run.id, run.resolved) as call:
            async with contextlib.aclosing(call.deltas()) as deltas:
                async for _, delta in deltas:
                    run.push(delta)
                    if log is not None and not run.ended.is_set():
                        log.append(run.take_events())
    except Exception as error:  # noqa: BLE001 - told as the response's error
        run.fail(error)
    except asyncio.CancelledError:
        run.give_up()
        raise
    finally:
        if log is not None:
            log.append(run.take_events(), is_last=True)


async def send_log(log: EventLog, start: int, reply: Reply) -> None:
    """The events from number `start` on, up to the last one."""
    await reply.start_events()
    async with contextlib.aclosing(log.read(start)) as pieces:
        async for piece in pieces:
            await reply.events(piece)
    await reply.end_events(is_done_told=False)
