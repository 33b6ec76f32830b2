"""POST /v1/responses: one answer of the model, whole, as events, or in the background."""

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from manta.cluster.doors import patience
from manta.cluster.doors.answer import AnswerPlan
from manta.cluster.doors.chat import read_long_chat
from manta.cluster.doors.checks import shown
from manta.cluster.doors.errors import RequestError
from manta.cluster.doors.exchange import Reply
from manta.cluster.doors.responses.conversation import read_conversation
from manta.cluster.doors.responses.drive import collect, run_in_background, send_log, stream
from manta.cluster.doors.responses.events import EventLog
from manta.cluster.doors.responses.run import Run
from manta.cluster.doors.responses.settings import Settings, read_settings, retold
from manta.cluster.doors.responses.store import ResponseStore, Stored, Turn
from manta.cluster.doors.responses.truncation import fit_messages
from manta.cluster.doors.service import Service
from manta.cluster.doors.validate import Resolved

REFUSED_WITHIN_S = 0.2  # the engine says no sooner than that, and the client then gets the HTTP status of it


@dataclass(frozen=True, slots=True)
class _Asked:
    """A checked request."""

    settings: Settings
    turn: Turn
    resolved: Resolved
    plan: AnswerPlan


class CreateResponse:
    def __init__(self, service: Service, store: ResponseStore, new_id: Callable[[], str]) -> None:
        self._service, self._store, self._new_id = service, store, new_id
        self._tasks: set[asyncio.Task[None]] = set()

    async def __call__(self, body: dict[str, Any], header_id: str, reply: Reply) -> None:
        self._service.running.check_open()
        response_id = self._new_id()
        asked = await self._read(body, response_id)
        run = self._new_run(response_id, asked)
        if asked.settings.is_background:
            await self._background(run, asked, reply)
        elif asked.settings.streams:
            await self._stream(run, asked, reply)
        else:
            await collect(self._service, run)
            body = run.body()
            if self._stores(asked.settings):
                self._store.close(self._store.open(run, asked.turn))
            await reply.json(body)

    def _stores(self, settings: Settings) -> bool:
        return settings.is_stored and self._store.is_on

    def _new_run(self, response_id: str, asked: _Asked) -> Run:
        settings = asked.settings
        told = settings.told | {"instructions": settings.instructions, "store": self._stores(settings)}
        return Run(
            self._service, response_id, told, asked.resolved, asked.plan,
            tells=settings.streams, is_background=settings.is_background,
        )  # fmt: skip

    async def _read(self, body: dict[str, Any], response_id: str) -> _Asked:
        """Raises RequestError."""
        service, tokenizer = self._service, self._service.validator.tokenizer
        settings = read_settings(body, tokenizer)
        service.validator.check_model(settings.chat.get("model"))
        if settings.is_background and not self._store.is_on:
            message = "background needs stored responses, which --max-stored-responses 0 turned off"
            raise RequestError(message, "background", "unsupported_parameter")
        parent = None if settings.previous_id is None else self._parent(settings.previous_id)
        given = settings.given.get("input")
        conversation = await read_conversation(given, settings.instructions, parent, service.validator)

        async def resolve(messages: list[dict[str, Any]]) -> tuple[AnswerPlan, Resolved]:
            try:
                chat = settings.chat | {"messages": messages}
                ask, plan = await read_long_chat(service, chat, dict(settings.sampling))
                return plan, await service.validator.resolve(replace(ask, prompt_param="input"), response_id)
            except RequestError as error:
                raise retold(error)

        if settings.truncates:
            limits = service.validator.limits
            most = limits.max_model_len * tokenizer.max_token_characters
            plan, resolved = await fit_messages(conversation.messages, most, resolve)
        else:
            plan, resolved = await resolve(conversation.messages)
        return _Asked(settings, conversation.turn, resolved, plan)

    def _parent(self, previous_id: str) -> Turn:
        """What the conversation was before. Raises RequestError."""
        name = "previous_response_id"
        stored = self._store.get(previous_id, name)
        if stored.run is not None:
            message = f"{name}: the response {shown(previous_id)} has not ended yet; wait for it or cancel it"
            raise RequestError(message, name)
        if stored.turn.total_bytes() > patience.MAX_BODY_BYTES:
            message = f"{name}: the conversation is larger than {patience.MAX_BODY_BYTES // 2**20} MiB; begin another"
            raise RequestError(message, name, "context_length_exceeded")
        return stored.turn

    async def _stream(self, run: Run, asked: _Asked, reply: Reply) -> None:
        if not self._stores(asked.settings):
            await stream(self._service, run, reply)
            return
        stored = self._store.open(run, asked.turn)
        try:
            await stream(self._service, run, reply)
        finally:
            if reply.is_streaming:
                run.give_up()
                self._store.close(stored)
            else:  # the client never learned of it
                self._store.remove(stored)

    async def _background(self, run: Run, asked: _Asked, reply: Reply) -> None:
        log = EventLog() if asked.settings.streams else None
        stored = self._store.open(run, asked.turn, log)
        task = asyncio.create_task(self._run_stored(run, stored))
        self._tasks.add(task)  # a task that nobody holds may vanish
        task.add_done_callback(self._tasks.discard)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(run.begun.wait(), REFUSED_WITHIN_S)
        if run.refusal is not None:
            self._store.remove(stored)
            raise run.refusal
        if log is not None:
            await send_log(log, 0, reply)
        else:
            await reply.json(stored.body())

    async def _run_stored(self, run: Run, stored: Stored) -> None:
        try:
            await run_in_background(self._service, run, stored.log)
        finally:
            self._store.close(stored)
