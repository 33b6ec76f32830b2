"""Opens both doors in the running event loop and closes them again."""

import asyncio
import contextlib
import errno
import socket
import time
from collections.abc import Iterator

import grpc
import uvicorn
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from starlette.applications import Starlette

from manta.cluster.doors import patience
from manta.cluster.doors.authentication import RpcKeys
from manta.cluster.doors.http import build_app
from manta.cluster.doors.http_protocol import DoorProtocol
from manta.cluster.doors.peers import PeerError, Peers
from manta.cluster.doors.rpc import InferenceServicer
from manta.cluster.doors.rpc_health import HealthServicer
from manta.cluster.doors.rpc_messages import add_service
from manta.cluster.doors.service import Service
from manta.cluster.doors.tls import Certificates
from manta.protos import inference_pb2

KEEP_ALIVE_S = 75  # idle HTTP connections; longer than the 60 s after which common proxies drop theirs
QUIET_S = 6.0  # common clients close connections that were idle for 5 s: nothing is on its way over them then
HANDSHAKE_TIMEOUT_S = 10.0  # of TLS, with a client that a frontend takes last
CLOSE_TIMEOUT_S = 1  # for the last bytes, once the calls have ended
PING_INTERVAL_MS, PING_TIMEOUT_MS = 30_000, 20_000  # over gRPC: who does not answer is gone, and its calls are aborted
_LAST_ANSWER = (b"connection", b"close")
_LOOK_S = 0.05
_INFERENCE = inference_pb2.DESCRIPTOR.services_by_name["Inference"]
_GRPC_NAMES = (_INFERENCE.full_name,)


class PortError(OSError):
    """A port cannot be listened on; the message is one sentence."""


class _HttpServer(uvicorn.Server):
    """uvicorn without signal handlers of its own: the process that embeds it owns the signals."""

    def __init__(self, config: uvicorn.Config, listener: socket.socket) -> None:
        super().__init__(config)
        self._listener = listener

    def stop_listening(self) -> list[socket.socket]:
        """Returns connections that nobody has taken yet: the kernel would reset them."""
        waiting: list[socket.socket] = []
        with contextlib.suppress(OSError):  # BlockingIOError: those were all
            while True:
                waiting.append(self._listener.accept()[0])
        for server in self.servers:
            server.close()
        return waiting

    async def take(self, connection: socket.socket) -> None:
        """Answers a connection as if it had been accepted in time."""
        loop, config = asyncio.get_running_loop(), self.config

        def protocol() -> asyncio.Protocol:
            return DoorProtocol(config=config, server_state=self.server_state, app_state=self.lifespan.state)

        try:
            async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
                await loop.connect_accepted_socket(protocol, connection, ssl=config.ssl)
        except OSError:  # its client has gone, or is none for TLS
            connection.close()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class DoorServer:
    """The HTTP and the gRPC server of one frontend. Not reusable after `stop`."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._http: list[_HttpServer] = []
        self._http_tasks: list[asyncio.Task[None]] = []
        self._peers = Peers()
        self._grpc: grpc.aio.Server | None = None

    async def start(self, joins: bool = False) -> dict[str, int]:
        """Listens; returns the ports as {"http": ..., "grpc": ...}. joins: another frontend of this deployment may
        listen on the same ports. Raises PortError or CertificateError."""
        config = self._service.config
        shares_port = config.api_server_count > 1
        certificates = Certificates.of(config)
        if not (joins or shares_port):
            _check_free(config.host, config.port, "HTTP port {port} on {host}", "port")
            _check_free(config.host, config.grpc_port, "gRPC port {port} on {host}", "grpc_port")
        http_socket = _listen(config.host, config.port)
        http_port = int(http_socket.getsockname()[1])
        try:
            peer_socket = self._peers.listen(http_port) if shares_port else None
            grpc_port = await self._start_grpc(config.host, config.grpc_port, certificates)
        except (PeerError, PortError) as error:
            http_socket.close()
            self._peers.close()
            raise PortError(str(error)) from None
        app = build_app(self._service, self._peers)
        await self._start_http(app, http_socket, certificates)
        if peer_socket is not None:
            await self._start_http(app, peer_socket, None)
        return {"http": http_port, "grpc": grpc_port}

    async def _start_http(self, app: Starlette, listener: socket.socket, certificates: Certificates | None) -> None:
        server = _HttpServer(
            uvicorn.Config(
                app,
                http=DoorProtocol,
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=CLOSE_TIMEOUT_S,
            ),
            listener,
        )
        if certificates is not None:
            server.config.load()
            server.config.ssl = certificates.http_context()
        task = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started and not task.done():
            await asyncio.sleep(0.01)  # uvicorn has no event for it
        if task.done():
            await task
        self._http.append(server)
        self._http_tasks.append(task)

    async def retire(self, grace_s: float) -> None:
        """Another frontend listens on the same ports by now: takes no new connections. Calls over those that there are
        are answered, but with the word that their connection ends. Returns when all have ended, or nothing has come
        over them for a while, or after `grace_s`."""
        deadline_s = time.monotonic() + grace_s
        waiting = [(server, connection) for server in self._http for connection in server.stop_listening()]
        for server in self._http:
            server.config.encoded_headers.append(_LAST_ANSWER)
            server.server_state.default_headers.append(_LAST_ANSWER)
        await asyncio.gather(*(server.take(connection) for server, connection in waiting))
        if self._grpc is not None:
            await self._grpc.stop(grace_s)  # clients are told to connect anew, and calls under way go on
        quiet_since_s = time.monotonic()
        while (now_s := time.monotonic()) < deadline_s:
            if len(self._service.running) or any(server.server_state.tasks for server in self._http):
                quiet_since_s = now_s
            elif now_s - quiet_since_s > QUIET_S or not any(server.server_state.connections for server in self._http):
                return
            await asyncio.sleep(_LOOK_S)

    async def stop(self, grace_s: float) -> bool:
        """Refuses new calls, lets running ones finish for `grace_s`, aborts the rest. True if none was aborted."""
        drained = await self._service.running.drain(grace_s)
        if self._grpc is not None:
            await self._grpc.stop(CLOSE_TIMEOUT_S)
        for server in self._http:
            server.should_exit = True
        await asyncio.gather(*self._http_tasks)
        self._peers.close()
        return drained

    async def _start_grpc(self, host: str, port: int, certificates: Certificates | None) -> int:
        server = grpc.aio.server(
            interceptors=[RpcKeys(self._service.keys)],
            options=[
                ("grpc.so_reuseport", 1),  # see _listen
                ("grpc.max_receive_message_length", patience.MAX_BODY_BYTES),
                ("grpc.max_metadata_size", patience.MAX_HEAD_BYTES),
                ("grpc.absolute_max_metadata_size", patience.MAX_HEAD_BYTES),
                ("grpc.keepalive_time_ms", PING_INTERVAL_MS),
                ("grpc.keepalive_timeout_ms", PING_TIMEOUT_MS),
                ("grpc.http2.max_ping_strikes", 0),
                ("grpc.keepalive_permit_without_calls", 1),
            ],
        )
        add_service(server, _INFERENCE, InferenceServicer(self._service))
        health_pb2_grpc.add_HealthServicer_to_server(HealthServicer(self._service, _GRPC_NAMES), server)
        reflection.enable_server_reflection((*_GRPC_NAMES, "grpc.health.v1.Health", reflection.SERVICE_NAME), server)
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            if certificates is None:
                bound = server.add_insecure_port(address)
            else:
                bound = server.add_secure_port(address, certificates.rpc_credentials())
        except RuntimeError:
            bound = 0
        if not bound:
            raise PortError(f"gRPC cannot listen on {address}: it is in use or not ours; choose another with grpc_port")
        await server.start()
        self._grpc = server
        return int(bound)


def _check_free(host: str, port: int, what: str, field: str) -> None:
    """Sockets that may share a port say nothing when somebody else's does."""
    if not port:
        return
    with _new_socket(host) as probe:
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                name = what.format(port=port, host=host)
                raise PortError(f"{name} is in use by another process; choose another with {field}") from None


def _listen(host: str, port: int) -> socket.socket:
    """With SO_REUSEPORT: frontends share their ports, and one that takes another one's place comes before that goes."""
    listener = _new_socket(host)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        listener.bind((host, port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise PortError(f"HTTP port {port} on {host} is in use by another process; choose another with port")
        raise PortError(f"HTTP cannot listen on {host}:{port}: {error.strerror or error}")
    listener.setblocking(False)
    return listener


def _new_socket(host: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's algorithm off only for sockets that say they are TCP; with it a small answer waits 40 ms.
    new = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    new.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return new
