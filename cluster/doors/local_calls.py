"""Requests that this server answers to itself: the same endpoints as over HTTP, without a connection."""

import asyncio
from collections.abc import Iterable

from starlette.routing import BaseRoute, Route
from starlette.types import Message

from manta.cluster.doors.caller import Caller, set_caller


class LocalCalls:
    """Posts JSON to endpoints of an application. `salts`: tenants share no cached prompts."""

    def __init__(self, routes: Iterable[BaseRoute], salts: bool) -> None:
        self._apps = {path: route.app for path, route in post_routes(routes).items()}
        self._salts = salts

    async def __call__(self, url: str, body: bytes, tenant: str, request_id: str) -> tuple[int, bytes]:
        """Status and body of the answer. `url` must be the path of an endpoint."""
        set_caller(Caller(tenant, tenant if self._salts else ""))
        scope = {
            "type": "http",
            "method": "POST",
            "path": url,
            "headers": [(b"content-type", b"application/json")],
            "request_id": request_id,
        }
        messages = [{"type": "http.request", "body": body, "more_body": False}]
        status, parts = 500, []

        async def receive() -> Message:
            if not messages:
                await asyncio.Event().wait()  # this client does not leave
            return messages.pop()

        async def send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            else:
                parts.append(message.get("body", b""))

        await self._apps[url](scope, receive, send)
        return status, b"".join(parts)


def post_routes(routes: Iterable[BaseRoute]) -> dict[str, Route]:
    """Those that take POST, by path."""
    return {route.path: route for route in routes if isinstance(route, Route) and "POST" in (route.methods or ())}
