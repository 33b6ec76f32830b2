"""The gRPC service that frontends connect to (protos/engine.proto), around an Engine."""

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio

from manta.cluster.engine.engine import Engine
from manta.cluster.engine.frontend import Frontend, SlowFrontendError
from manta.protos import engine_pb2 as pb
from manta.protos import engine_pb2_grpc

logger = logging.getLogger(__name__)

SERVER_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.max_ping_strikes", 0),  # frontends ping too
    ("grpc.so_reuseport", 0),
)


class EngineService(engine_pb2_grpc.EngineServicer):
    """Each Connect stream is one frontend."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def Connect(
        self, messages: AsyncIterator[pb.FrontendMessage], context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> None:
        """When either side ends the stream, what the frontend had open is aborted."""
        frontend = self._engine.open_frontend()
        reader = asyncio.create_task(self._read(frontend, messages))
        try:
            while (message := await frontend.take()) is not None:
                await context.write(message)
            await reader
        except SlowFrontendError as error:
            logger.warning("a frontend is cut off: %s", error)
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
        except ValueError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        finally:
            reader.cancel()
            self._engine.close_frontend(frontend)

    async def _read(self, frontend: Frontend, messages: AsyncIterator[pb.FrontendMessage]) -> None:
        try:
            async for message in messages:
                if message.HasField("submit"):
                    self._engine.submit(frontend, message.submit)
                else:
                    self._engine.abort(frontend, list(message.abort.handles))
        finally:
            frontend.close()

    async def GetInfo(self, request: pb.InfoRequest, context: object) -> pb.InfoResponse:
        return self._engine.info()

    async def GetLoad(self, request: pb.LoadRequest, context: object) -> pb.LoadResponse:
        return self._engine.load()

    async def GetMetrics(self, request: pb.MetricsRequest, context: object) -> pb.MetricsResponse:
        return pb.MetricsResponse(text=self._engine.metrics_text())

    async def GetBlockTables(self, request: pb.BlockTablesRequest, context: object) -> pb.BlockTablesResponse:
        return self._engine.block_tables()

    async def Drain(self, request: pb.DrainRequest, context: object) -> pb.DrainResponse:
        return pb.DrainResponse(drained=await self._engine.drain(request.timeout_s))


async def serve(engine: Engine, host: str, port: int) -> tuple["grpc.aio.Server", str]:
    """Starts the service; returns the server and its "host:port". Port 0 takes a free one."""
    server = grpc.aio.server(options=SERVER_OPTIONS)
    engine_pb2_grpc.add_EngineServicer_to_server(EngineService(engine), server)
    bound = server.add_insecure_port(f"{host}:{port}")
    await server.start()
    return server, f"{host}:{bound}"
