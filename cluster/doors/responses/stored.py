"""What can be done with a response that was stored: read it or its input, follow its events, cancel it, delete it."""

import re
from collections.abc import Mapping
from typing import Any

import orjson
from starlette.requests import Request

from manta.cluster.doors.checks import shown
from manta.cluster.doors.errors import RequestError
from manta.cluster.doors.exchange import Reply
from manta.cluster.doors.fields import unknown_field
from manta.cluster.doors.responses.drive import send_log
from manta.cluster.doors.responses.store import ResponseStore, Stored
from manta.cluster.doors.service import Service

MAX_LISTED = 100
_RETRIEVE = frozenset({"stream", "starting_after", "include", "include[]", "include_obfuscation"})
_LIST = frozenset({"after", "limit", "order", "include", "include[]"})


class StoredResponses:
    """Handlers of requests with a response_id in the path. All raise RequestError."""

    def __init__(self, service: Service, store: ResponseStore) -> None:
        self._service, self._store = service, store

    async def retrieve(self, request: Request, reply: Reply) -> None:
        query = _query(request, _RETRIEVE)
        stored = self._get(request)
        streams = _as_bool(query.get("stream", "false"), "stream")
        after = _as_int(query.get("starting_after", "-1"), "starting_after", -1, 2**31)
        if not streams:
            await reply.json(stored.body())
            return
        if stored.log is None:
            message = "stream=true is for responses that were created with background=true and stream=true"
            raise RequestError(message, "stream")
        await send_log(stored.log, after + 1, reply)

    async def input_items(self, request: Request, reply: Reply) -> None:
        query = _query(request, _LIST)
        stored = self._get(request)
        limit = _as_int(query.get("limit", "20"), "limit", 1, MAX_LISTED)
        order = query.get("order", "desc")
        if order not in ("asc", "desc"):
            raise RequestError(f"order must be asc or desc, not {shown(order)}", "order")
        items = orjson.loads(stored.turn.input)
        if order == "desc":
            items.reverse()
        if "after" in query:
            places = [index for index, item in enumerate(items) if item["id"] == query["after"]]
            if not places:
                raise RequestError(f"after: there is no item {shown(query['after'])} in this input", "after")
            items = items[places[0] + 1 :]
        told = items[:limit]
        ends = {"first_id": told[0]["id"], "last_id": told[-1]["id"]} if told else {"first_id": "", "last_id": ""}
        await reply.json({"object": "list", "data": told, "has_more": len(items) > limit, **ends})

    async def cancel(self, request: Request, reply: Reply) -> None:
        """The response, which has ended now, in whatever way."""
        _query(request, frozenset())
        stored = self._get(request)
        if not stored.body()["background"]:
            message = "only responses that were created with background=true can be cancelled; others: by disconnecting"
            raise RequestError(message, "response_id")
        if stored.run is not None:
            self._service.running.abort(stored.id)
            await stored.run.ended.wait()
        await reply.json(stored.body())

    async def delete(self, request: Request, reply: Reply) -> None:
        """Ends it, too."""
        _query(request, frozenset())
        stored = self._get(request)
        self._store.remove(stored)
        if stored.run is not None:
            self._service.running.abort(stored.id)
        await reply.json({"id": stored.id, "object": "response", "deleted": True})

    def _get(self, request: Request) -> Stored:
        return self._store.get(request.path_params["response_id"])


def _query(request: Request, known: frozenset[str]) -> Mapping[str, Any]:
    for name in request.query_params.keys() - known:
        raise unknown_field(name, known, known) if known else RequestError(f"unknown field {name!r}", name)
    return request.query_params


def _as_bool(text: str, param: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise RequestError(f"{param} must be true or false, not {shown(text)}", param, "invalid_type")
    return text.lower() == "true"


def _as_int(text: str, param: str, low: int, high: int) -> int:
    if not re.fullmatch("-?[0-9]{1,12}", text) or not low <= int(text) <= high:
        raise RequestError(f"{param} must be a number from {low} to {high}, not {shown(text)}", param)
    return int(text)
