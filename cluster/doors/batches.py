"""/v1/batches of the OpenAI API."""

import re
import sqlite3
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from manta.cluster.batches.files import get_file
from manta.cluster.batches.lines import ENDPOINTS
from manta.cluster.batches.records import BatchRecord, Status, get_batch, insert_batch, list_batches, set_status
from manta.cluster.batches.store import BatchStore
from manta.cluster.doors.caller import current_tenant
from manta.cluster.doors.checks import check_int, shown
from manta.cluster.doors.errors import Kind, RequestError
from manta.cluster.doors.exchange import ClientGoneError, read_json
from manta.cluster.doors.fields import unknown_field
from manta.cluster.doors.files import Files
from manta.cluster.doors.local_calls import post_routes
from manta.cluster.doors.state import json_response
from manta.cluster.doors.stored import missing, opened, page, read_limit, telling
from manta.cluster.doors.uploads import LIFETIMES_S

MAX_LISTED, DEFAULT_LISTED = 100, 20
LONGEST_WINDOW_S = 30 * 86400
MAX_PAIRS, MAX_KEY_CHARACTERS, MAX_VALUE_CHARACTERS = 16, 64, 512  # of metadata, as in the OpenAI API
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_FIELDS = frozenset({"input_file_id", "endpoint", "completion_window", "metadata", "output_expires_after"})
_ENDED_BY_CANCEL = (Status.CANCELLING, Status.CANCELLED)


class Batches:
    """Without a store every endpoint says what is missing. `endpoints` are those that lines may be for."""

    def __init__(self, store: BatchStore | None, endpoints: Sequence[str]) -> None:
        self._store = store
        self._endpoints = endpoints

    def routes(self) -> list[Route]:
        return [
            Route("/v1/batches", self.batches, methods=["GET", "POST"]),
            Route("/v1/batches/{id}", self.batch),
            Route("/v1/batches/{id}/cancel", self.cancel, methods=["POST"]),
        ]

    async def batches(self, request: Request) -> Response:
        store = opened(self._store)
        with telling():
            if request.method == "POST":
                return await self._create(request, store)
            limit = read_limit(request, DEFAULT_LISTED, MAX_LISTED)
            after = request.query_params.get("after")
            found = await store.database.read(list_batches, current_tenant(), after, limit + 1)
        if found is None:
            missing("batch", after or "", "after")
        return json_response(page(found, limit))

    async def batch(self, request: Request) -> Response:
        store, batch_id = opened(self._store), request.path_params["id"]
        with telling():
            found = await store.database.read(get_batch, current_tenant(), batch_id)
        if found is None:
            missing("batch", batch_id, "batch_id")
        return json_response(found.body())

    async def cancel(self, request: Request) -> Response:
        """Cancelling again is no error; what has ended otherwise, or is being written, is."""
        store, batch_id = opened(self._store), request.path_params["id"]
        with telling():
            found = await store.database.write(_cancel, current_tenant(), batch_id)
        if found is None:
            missing("batch", batch_id, "batch_id")
        if found.status not in _ENDED_BY_CANCEL:
            message = f"{batch_id} is {found.status.value} and cannot be cancelled any more"
            raise RequestError(message, "batch_id", "batch_not_cancellable", Kind.DUPLICATE)
        store.news.set()
        return json_response(found.body())

    async def _create(self, request: Request, store: BatchStore) -> Response:
        try:
            body = await read_json(request.scope, request.receive)
        except ClientGoneError:
            return Response()  # to nobody
        for name in body.keys() - _FIELDS:
            raise unknown_field(name, _FIELDS, _FIELDS)
        for name in ("input_file_id", "endpoint", "completion_window"):
            if not isinstance(body.get(name), str):
                given = "is required" if body.get(name) is None else f"must be a string, not {shown(body[name])}"
                raise RequestError(f"{name} {given}", name, "missing_required_parameter")
        endpoint = body["endpoint"]
        if endpoint not in self._endpoints:
            message = f"endpoint must be one of {', '.join(self._endpoints)}, not {shown(endpoint)}"
            raise RequestError(message, "endpoint")
        record = await store.database.write(
            _create,
            current_tenant(),
            read_window_s(body["completion_window"]),
            endpoint=endpoint,
            input_file=body["input_file_id"],
            completion_window=body["completion_window"],
            metadata=_metadata(body.get("metadata")),
            output_lifetime_s=_lifetime_s(body.get("output_expires_after")),
        )
        if record is None:
            missing("file", body["input_file_id"], "input_file_id")
        store.news.set()
        return json_response(record.body())


def batch_routes(store: BatchStore | None, others: Sequence[BaseRoute]) -> list[Route]:
    """Routes of files and batches. Lines may be for those of the `others` that batches can be for."""
    paths = post_routes(others)
    endpoints = [endpoint for endpoint in ENDPOINTS if endpoint in paths]
    return Files(store).routes() + Batches(store, endpoints).routes()


def _create(connection: sqlite3.Connection, /, tenant: str, window_s: int, **fields: Any) -> BatchRecord | None:
    """None if there is no such input file."""
    if get_file(connection, tenant, fields["input_file"]) is None:
        return None
    return insert_batch(connection, tenant, window_s, **fields)


def _cancel(connection: sqlite3.Connection, tenant: str, batch_id: str) -> BatchRecord | None:
    found = get_batch(connection, tenant, batch_id)
    if found is None:
        return None
    return set_status(connection, found.place, Status.CANCELLING, (Status.VALIDATING, Status.IN_PROGRESS))


def read_window_s(text: str) -> int:
    """Seconds of a completion window such as 24h. Raises RequestError."""
    found = re.fullmatch(r"([1-9][0-9]{0,7})([smhd])", text, re.ASCII)
    window_s = int(found[1]) * _UNITS_S[found[2]] if found else 0
    if not 0 < window_s <= LONGEST_WINDOW_S:
        message = f"completion_window must be a time from 1s to 30d such as 24h or 90m, not {shown(text)}"
        raise RequestError(message, "completion_window")
    return window_s


def _metadata(value: Any) -> dict[str, str] | None:
    if value is None:
        return None
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise RequestError(f"metadata must be an object of strings, not {shown(value)}", "metadata", "invalid_type")
    if len(value) > MAX_PAIRS or any(
        len(key) > MAX_KEY_CHARACTERS or len(text) > MAX_VALUE_CHARACTERS for key, text in value.items()
    ):
        message = (
            f"metadata has at most {MAX_PAIRS} keys of up to {MAX_KEY_CHARACTERS} characters, with texts of up to "
            f"{MAX_VALUE_CHARACTERS}"
        )
        raise RequestError(message, "metadata")
    return value


def _lifetime_s(value: Any) -> int | None:
    param = "output_expires_after"
    if value is None:
        return None
    if not isinstance(value, dict) or value.keys() != {"anchor", "seconds"} or value["anchor"] != "created_at":
        message = f'{param} must be {{"anchor": "created_at", "seconds": N}}, not {shown(value)}'
        raise RequestError(message, param)
    return check_int(value["seconds"], f"{param}.seconds", *LIFETIMES_S)
