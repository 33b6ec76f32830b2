"""grpc.health.v1: SERVING while the engine is healthy and the server takes requests."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from manta.cluster.doors.errors import RequestError
from manta.cluster.doors.service import Service
from manta.cluster.doors.state import check_health

WATCH_INTERVAL_S = 1.0
_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class HealthServicer(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """Answers for the server as a whole ("") and for each of `names`; every check asks the engine."""

    def __init__(self, service: Service, names: tuple[str, ...]) -> None:
        self._service = service
        self._names = frozenset(names) | {""}

    async def Check(self, request: Any, context: Any) -> Any:
        if request.service not in self._names:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"service {request.service!r} is not known")
        return health_pb2.HealthCheckResponse(status=await self._status())

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[Any]:
        """The status now and whenever it changes."""
        last = None
        while True:
            status = await self._status() if request.service in self._names else _UNKNOWN
            if status != last:
                yield health_pb2.HealthCheckResponse(status=status)
                last = status
            await asyncio.sleep(WATCH_INTERVAL_S)

    async def _status(self) -> int:
        try:
            self._service.running.check_open()
            await check_health(self._service)
        except RequestError:
            return int(_NOT_SERVING)
        return int(_SERVING)
