"""Responses that can be asked for later: those in the making, and a bounded number of those that have ended."""

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import orjson

from manta.cluster.doors.caller import current_tenant
from manta.cluster.doors.checks import shown
from manta.cluster.doors.errors import Kind, RequestError
from manta.cluster.doors.responses.events import EventLog
from manta.cluster.doors.responses.items import Item
from manta.cluster.doors.responses.run import Run

OVERHEAD_BYTES = 1024  # of one response in this process, beside the JSON texts


@dataclass(slots=True, eq=False)
class Turn:
    """What one response adds to a conversation, as JSON texts of lists. It lives as long as any response has it as its
    own, or continues it."""

    input: bytes
    parent: "Turn | None"
    output: bytes = b"[]"
    num_holders: int = 0

    @property
    def num_bytes(self) -> int:
        return len(self.input) + len(self.output) + OVERHEAD_BYTES

    def items(self) -> list[Item]:
        """The conversation from its first item on."""
        turns: list[Turn] = []
        turn: Turn | None = self
        while turn is not None:
            turns.append(turn)
            turn = turn.parent
        return [item for turn in reversed(turns) for text in (turn.input, turn.output) for item in orjson.loads(text)]

    def total_bytes(self) -> int:
        """Of the whole conversation."""
        total, turn = 0, self
        while True:
            total += turn.num_bytes
            if turn.parent is None:
                return total
            turn = turn.parent


@dataclass(slots=True, eq=False)
class Stored:
    """One response. `run` makes it; once it has ended, `head` is all of it but its output, as JSON."""

    id: str
    tenant: str
    turn: Turn
    run: Run | None
    log: EventLog | None = None  # of a stream in the background
    head: bytes = b""
    num_bytes: int = 0  # of the head and the events

    def body(self) -> dict[str, Any]:
        """The response object as it is now, to be encoded at once."""
        if self.run is not None:
            return self.run.body()
        head: dict[str, Any] = orjson.loads(self.head)
        return head | {"output": orjson.Fragment(self.turn.output)}


@dataclass(slots=True)
class _Tenant:
    running: dict[str, Stored] = field(default_factory=dict)
    ended: OrderedDict[str, Stored] = field(default_factory=OrderedDict)  # the oldest first
    num_bytes: int = 0


def packed(value: Any) -> bytes:
    """As JSON text in no more memory than it needs: orjson's own has room for up to ten times as much."""
    return bytes(memoryview(orjson.dumps(value)))


class ResponseStore:
    """Owned by one frontend. Tenants do not see each other's responses.

    When there are more ended responses than `max_responses`, or more bytes than `max_bytes`, the oldest one of the
    tenant who has most goes: no tenant can drive out those of one who has less. Those in the making stay.
    """

    def __init__(self, max_responses: int, max_bytes: int) -> None:
        self.max_responses, self.max_bytes = max_responses, max_bytes
        self._tenants: dict[str, _Tenant] = {}
        self._num_ended = 0
        self.num_bytes = 0

    @property
    def is_on(self) -> bool:
        return self.max_responses > 0

    def __len__(self) -> int:
        return sum(len(one.running) + len(one.ended) for one in self._tenants.values())

    def get(self, response_id: str, param: str = "response_id") -> Stored:
        """Raises RequestError (NOT_FOUND), whoever else may have it."""
        tenant = self._tenants.get(current_tenant())
        found = tenant and (tenant.running.get(response_id) or tenant.ended.get(response_id))
        if not found:
            raise not_found(response_id, param)
        return found

    def open(self, run: Run, turn: Turn, log: EventLog | None = None) -> Stored:
        """Takes a response that is in the making."""
        stored = Stored(run.id, current_tenant(), turn, run, log)
        tenant = self._tenants.setdefault(stored.tenant, _Tenant())
        tenant.running[stored.id] = stored
        self._hold(turn, tenant)
        self._shrink()
        return stored

    def close(self, stored: Stored) -> None:
        """The response has ended; nothing happens if it was removed before."""
        tenant = self._tenants.get(stored.tenant)
        if tenant is None or tenant.running.pop(stored.id, None) is None:
            return
        assert stored.run is not None
        body = stored.run.body()
        output = packed(body.pop("output"))
        stored.head, stored.run = packed(body), None
        stored.num_bytes = len(stored.head) + (stored.log.num_bytes if stored.log is not None else 0)
        self._count(tenant, stored.num_bytes + len(output) - len(stored.turn.output))
        stored.turn.output = output
        tenant.ended[stored.id] = stored
        self._num_ended += 1
        if stored.num_bytes + stored.turn.num_bytes > self.max_bytes:  # alone, so that it does not drive all others out
            self.remove(stored)
        self._shrink()

    def remove(self, stored: Stored) -> None:
        """Its part of conversations that continue it stays with these."""
        tenant = self._tenants.get(stored.tenant)
        if tenant is None:
            return
        if tenant.ended.pop(stored.id, None) is not None:
            self._num_ended -= 1
            self._count(tenant, -stored.num_bytes)
        elif tenant.running.pop(stored.id, None) is None:
            return
        self._release(stored.turn, tenant)
        if not tenant.running and not tenant.ended:
            del self._tenants[stored.tenant]

    def _hold(self, turn: Turn | None, tenant: _Tenant) -> None:
        while turn is not None:
            turn.num_holders += 1
            if turn.num_holders > 1:
                return
            self._count(tenant, turn.num_bytes)
            turn = turn.parent  # which may have been let go of since this turn was begun

    def _release(self, turn: Turn | None, tenant: _Tenant) -> None:
        while turn is not None:
            turn.num_holders -= 1
            if turn.num_holders:
                return
            self._count(tenant, -turn.num_bytes)
            turn = turn.parent

    def _count(self, tenant: _Tenant, num_bytes: int) -> None:
        tenant.num_bytes += num_bytes
        self.num_bytes += num_bytes

    def _shrink(self) -> None:
        while self._num_ended > self.max_responses:
            self._remove_oldest(max(self._tenants.values(), key=lambda one: len(one.ended)))
        while self.num_bytes > self.max_bytes and self._num_ended:
            have_ended = [one for one in self._tenants.values() if one.ended]
            self._remove_oldest(max(have_ended, key=lambda one: one.num_bytes))

    def _remove_oldest(self, tenant: _Tenant) -> None:
        self.remove(next(iter(tenant.ended.values())))


def not_found(response_id: str, param: str) -> RequestError:
    message = (
        f"there is no response {shown(response_id)}: it was not stored, was deleted, or had to make room for newer ones"
    )
    return RequestError(message, param, "response_not_found", Kind.NOT_FOUND)
