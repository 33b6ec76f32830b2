"""The Responses API as routes. Several frontends may serve one port: who has a response is told by its id, and the
others pass requests for it on."""

import secrets
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import orjson
from starlette.requests import Request
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from manta.cluster.doors.exchange import Reply, exchange, read_json, until_disconnect
from manta.cluster.doors.peers import NAME_CHARACTERS, Peers
from manta.cluster.doors.responses.create import CreateResponse
from manta.cluster.doors.responses.store import ResponseStore, not_found
from manta.cluster.doors.responses.stored import StoredResponses
from manta.cluster.doors.service import Service

_PREFIX = "resp_"
StoredHandler = Callable[[Request, Reply], Coroutine[Any, Any, None]]


def response_routes(service: Service, peers: Peers) -> list[Route]:
    store = ResponseStore(service.config.max_stored_responses, service.config.max_stored_response_bytes)
    create = CreateResponse(service, store, lambda: f"{_PREFIX}{peers.name}{secrets.token_hex(20)}")
    stored = StoredResponses(service, store)
    one = "/v1/responses/{response_id}"
    return [
        Route("/v1/responses", _CreateEndpoint(create, peers), methods=["POST"]),
        Route(
            one, _StoredEndpoint({"GET": stored.retrieve, "DELETE": stored.delete}, peers), methods=["GET", "DELETE"]
        ),
        Route(f"{one}/cancel", _StoredEndpoint({"POST": stored.cancel}, peers), methods=["POST"]),
        Route(f"{one}/input_items", _StoredEndpoint({"GET": stored.input_items}, peers), methods=["GET"]),
    ]


def _owner(peers: Peers, response_id: Any) -> Path | None:
    """Where the frontend listens that has this response, if it is another one than this."""
    if not isinstance(response_id, str) or not response_id.startswith(_PREFIX):
        return None
    return peers.socket_of(response_id.removeprefix(_PREFIX)[:NAME_CHARACTERS])


class _CreateEndpoint:
    """A conversation goes on where it was begun."""

    def __init__(self, create: CreateResponse, peers: Peers) -> None:
        self._create, self._peers = create, peers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply = Reply(send)
        await exchange(self._work(scope, receive, send, reply), scope["request_id"], reply)

    async def _work(self, scope: Scope, receive: Receive, send: Send, reply: Reply) -> None:
        body = await read_json(scope, receive)
        await until_disconnect(receive, self._answer(body, scope, send, reply))

    async def _answer(self, body: dict[str, Any], scope: Scope, send: Send, reply: Reply) -> None:
        previous_id = body.get("previous_response_id")
        owner = _owner(self._peers, previous_id)
        if owner is None:
            await self._create(body, scope["request_id"], reply)
        elif not await self._peers.pass_on(owner, scope, orjson.dumps(body), send):
            raise not_found(str(previous_id), "previous_response_id")


class _StoredEndpoint:
    def __init__(self, handlers: dict[str, StoredHandler], peers: Peers) -> None:
        self._handlers, self._peers = handlers, peers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply = Reply(send)
        work = until_disconnect(receive, self._answer(scope, send, reply))
        await exchange(work, scope["request_id"], reply)

    async def _answer(self, scope: Scope, send: Send, reply: Reply) -> None:
        response_id = scope["path_params"]["response_id"]
        owner = _owner(self._peers, response_id)
        if owner is None:
            await self._handlers["GET" if scope["method"] == "HEAD" else scope["method"]](Request(scope), reply)
        elif not await self._peers.pass_on(owner, scope, b"", send):
            raise not_found(response_id, "response_id")
