"""Keys at both doors: an ASGI middleware and a gRPC interceptor. What tells only that the server lives needs no key."""

from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from manta.cluster.doors.api_keys import KeyRing
from manta.cluster.doors.caller import set_caller
from manta.cluster.doors.errors import RequestError
from manta.cluster.doors.exchange import Reply
from manta.cluster.doors.rpc_errors import fail

OPEN_PATHS = frozenset({"/health", "/health/live", "/health/ready", "/live", "/ready", "/ping"})
_OPEN_SERVICE = "/grpc.health.v1.Health/"


class HttpKeys:
    """ASGI middleware: the rest of the application knows its caller, or is not reached."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], keys: KeyRing) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            try:
                set_caller(self._keys.caller(_http_authorization(Headers(scope=scope))))
            except RequestError as error:
                return await Reply(send).error(error)
        await self._app(scope, receive, send)


def _http_authorization(headers: Headers) -> str | None:
    """The Authorization header, or the one that clients of the Anthropic API send."""
    key = headers.get("x-api-key")
    return headers.get("authorization") or (f"Bearer {key}" if key else None)


class RpcKeys(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Server interceptor: as HttpKeys, with the key in the `authorization` metadata."""

    def __init__(self, keys: KeyRing) -> None:
        self._keys = keys

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        handler = await continuation(details)
        if handler is None or details.method.startswith(_OPEN_SERVICE):
            return handler
        try:
            set_caller(self._keys.caller(_authorization(details.invocation_metadata)))
        except RequestError as error:
            return _refusing(handler, error)
        return handler


def _authorization(metadata: Any) -> str | None:
    for name, value in metadata or ():
        if name == "authorization" and isinstance(value, str):
            return value
    return None


def _refusing(handler: Any, error: RequestError) -> Any:
    """A handler of the same shape that reads nothing and ends with the error."""

    async def refuse(_: Any, context: Any) -> None:
        await fail(context, error)

    makers = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }
    return makers[bool(handler.request_streaming), bool(handler.response_streaming)](refuse)
