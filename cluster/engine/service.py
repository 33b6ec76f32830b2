"""What frontends connect to (protos/engine.proto): a gRPC service, and links, around an Engine."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from manta.cluster.engine.bringup import BringUpError
from manta.cluster.engine.engine import Engine
from manta.cluster.engine.frontend import Frontend, SlowFrontendError
from manta.cluster.engine.workers import WorkerError
from manta.cluster.link_listener import LinkListener
from manta.cluster.links import Link
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
    """Each Connect stream and each link is one frontend."""

    def __init__(self, engine: Engine, host: str) -> None:
        self._engine = engine
        self.links = LinkListener(host, self.serve_link)

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
                self._take(frontend, message)
        finally:
            frontend.close()

    def _take(self, frontend: Frontend, message: pb.FrontendMessage) -> None:
        if message.HasField("submit"):
            self._engine.submit(frontend, message.submit)
        else:
            self._engine.abort(frontend, list(message.abort.handles))

    async def serve_link(self, link: Link) -> None:
        """As Connect. Raises LinkLostError when the frontend is gone."""
        frontend = self._engine.open_frontend()
        writer = asyncio.create_task(self._write(frontend, link))
        try:
            while True:
                self._take(frontend, pb.FrontendMessage.FromString(await link.read()))
        except (DecodeError, ValueError) as error:
            link.write(pb.EngineMessage(error=str(error)).SerializeToString())
        finally:
            writer.cancel()
            self._engine.close_frontend(frontend)

    @staticmethod
    async def _write(frontend: Frontend, link: Link) -> None:
        try:
            while (message := await frontend.take()) is not None:
                link.write(message.SerializeToString())
                await link.drain()
        except SlowFrontendError as error:
            logger.warning("a frontend is cut off: %s", error)
            link.write(pb.EngineMessage(error=str(error)).SerializeToString())
        finally:
            link.close()  # whatever it was: nothing more comes

    async def GetInfo(self, request: pb.InfoRequest, context: object) -> pb.InfoResponse:
        info = self._engine.info()
        info.link_port, info.link_socket, info.link_key = self.links.port, self.links.socket_name, self.links.key
        return info

    async def GetLoad(self, request: pb.LoadRequest, context: object) -> pb.LoadResponse:
        return self._engine.load()

    async def GetMetrics(self, request: pb.MetricsRequest, context: object) -> pb.MetricsResponse:
        return pb.MetricsResponse(text=self._engine.metrics_text())

    async def GetBlockTables(self, request: pb.BlockTablesRequest, context: object) -> pb.BlockTablesResponse:
        return self._engine.block_tables()

    async def Drain(self, request: pb.DrainRequest, context: object) -> pb.DrainResponse:
        return pb.DrainResponse(drained=await self._engine.drain(request.timeout_s))

    async def ReplaceWorkers(
        self, request: pb.ReplaceWorkersRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> pb.ReplaceWorkersResponse:
        began_s = time.perf_counter()
        try:
            await self._engine.replace_workers(request.replica, list(request.workers))
        except (WorkerError, BringUpError, IndexError) as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        return pb.ReplaceWorkersResponse(took_s=time.perf_counter() - began_s)

    async def RetireReplica(
        self, request: pb.RetireReplicaRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> pb.RetireReplicaResponse:
        try:
            await self._engine.retire(request.replica)
        except IndexError as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        return pb.RetireReplicaResponse()

    async def GiveUpReplica(self, request: pb.GiveUpReplicaRequest, context: object) -> pb.GiveUpReplicaResponse:
        self._engine.give_up(request.replica, request.reason)
        return pb.GiveUpReplicaResponse()


class EngineServer:
    """The service on a port. Build it with `await EngineServer.start(...)`."""

    def __init__(self, server: "grpc.aio.Server", links: LinkListener, address: str) -> None:
        self.address = address  # "host:port"
        self._server = server
        self._links = links

    @classmethod
    async def start(cls, engine: Engine, host: str, port: int) -> "EngineServer":
        """Port 0 takes a free one."""
        service = EngineService(engine, host)
        server = grpc.aio.server(options=SERVER_OPTIONS)
        engine_pb2_grpc.add_EngineServicer_to_server(service, server)
        bound = server.add_insecure_port(f"{host}:{port}")
        await server.start()
        service.links.start()
        return cls(server, service.links, f"{host}:{bound}")

    async def stop(self, grace_s: float | None) -> None:
        """Ends the streams; calls get `grace_s` to finish."""
        await asyncio.gather(self._links.stop(grace_s), self._server.stop(grace_s))
