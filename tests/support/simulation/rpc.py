"""gRPC over the simulated network: unary calls that take time, fail with the codes of the real one, and end with either
side. It has no streams: what would open one hears that the connection is lost."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, NoReturn

import grpc
import grpc.aio

from manta.cluster.links import LENGTH_BYTES, frame
from tests.support.simulation.loop import Process, current_process
from tests.support.simulation.net import Network

_LOOK_S = 0.25
_RECONNECT_S = 0.1


class _AbortError(Exception):
    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        self.code, self.details = code, details


class _Context:
    async def abort(self, code: grpc.StatusCode, details: str = "") -> NoReturn:
        raise _AbortError(code, details)


def _error(code: grpc.StatusCode, details: str) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details)


class RpcServer:
    """What `grpc.aio.server` returns. Belongs to the process that makes it."""

    def __init__(self, network: Network) -> None:
        self.process = current_process()
        self.handlers: dict[str, Any] = {}
        self.calls: dict[asyncio.Task[bytes], None] = {}
        self.is_up = False
        self._network = network
        self._address = ""

    def add_generic_rpc_handlers(self, handlers: object) -> None: ...

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        self.handlers |= {f"/{service}/{name}": handler for name, handler in handlers.items()}

    def add_insecure_port(self, address: str) -> int:
        if address.endswith(":0"):
            address = self._network.new_address()
        other = self._network.servers.get(address)
        if other is not None and other.is_up and other.process.is_alive:
            raise RuntimeError(f"{address} is in use")
        self._address = address
        return int(address.rpartition(":")[2])

    async def start(self) -> None:
        self._network.servers[self._address] = self
        self.is_up = True

    async def stop(self, grace_s: float | None) -> None:
        self.is_up = False
        for call in list(self.calls):
            call.cancel()
        await asyncio.gather(*self.calls, return_exceptions=True)

    def handle(self, method: str, message: bytes) -> "asyncio.Task[bytes]":
        call = self.process.spawn(self._handle(self.handlers[method], message))
        self.calls[call] = None
        call.add_done_callback(lambda call: self.calls.pop(call, None))
        return call

    @staticmethod
    async def _handle(handler: Any, message: bytes) -> bytes:
        request = handler.request_deserializer(message)
        try:
            if handler.response_streaming:
                responses = [response async for response in handler.unary_stream(request, _Context())]
                return b"".join(map(frame, map(handler.response_serializer, responses)))
            response = await handler.unary_unary(request, _Context())
        except _AbortError as error:
            raise _error(error.code, error.details) from None
        except Exception as error:
            details = f"Unexpected {type(error)}: {error}"
            raise _error(grpc.StatusCode.UNKNOWN, details) from error
        data: bytes = handler.response_serializer(response)
        return data


class Channel:
    """What `grpc.aio.insecure_channel` returns."""

    def __init__(self, network: Network, address: str, options: Any = ()) -> None:
        known = dict(options)
        pings_after_ms, waits_ms = known.get("grpc.keepalive_time_ms"), known.get("grpc.keepalive_timeout_ms", 20_000)
        self._patience_s = (pings_after_ms + waits_ms) / 1000 if pings_after_ms else float("inf")
        self._network = network
        self._address = address
        self._calls: dict[asyncio.Task[Any], None] = {}

    def unary_unary(
        self, method: str, request_serializer: Any, response_deserializer: Any, **_: object
    ) -> Callable[..., Coroutine[Any, Any, Any]]:
        async def call(request: Any, timeout: float | None = None, wait_for_ready: bool = False) -> Any:
            work = asyncio.create_task(self._call(method, request_serializer(request), wait_for_ready))
            self._calls[work] = None
            work.add_done_callback(lambda work: self._calls.pop(work, None))
            try:
                async with asyncio.timeout(timeout):
                    return response_deserializer(await work)
            except TimeoutError:
                raise _error(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded") from None

        return call

    def unary_stream(
        self, method: str, request_serializer: Any, response_deserializer: Any, **_: object
    ) -> Callable[..., AsyncIterator[Any]]:
        """All messages come at once."""
        call = self.unary_unary(method, request_serializer, bytes)

        async def stream(request: Any) -> AsyncIterator[Any]:
            data = await call(request)
            while data:
                end = LENGTH_BYTES + int.from_bytes(data[:LENGTH_BYTES], "little")
                yield response_deserializer(data[LENGTH_BYTES:end])
                data = data[end:]

        return stream

    async def __aenter__(self) -> "Channel":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def stream_stream(self, method: str, *_: object, **__: object) -> Callable[[], "NoStream"]:
        return NoStream

    async def close(self) -> None:
        """Calls under way are cancelled, and who waits for one is, too: as in the real one."""
        for call in list(self._calls):
            call.cancel()

    async def _call(self, method: str, message: bytes, wait_for_ready: bool) -> bytes:
        here = current_process()
        while (server := self._network.servers.get(self._address)) is None or not (
            server.is_up and server.process.is_alive
        ):
            if not wait_for_ready:
                raise _error(grpc.StatusCode.UNAVAILABLE, "failed to connect to all addresses: Connection refused")
            await asyncio.sleep(_RECONNECT_S)
        await self._pass(here, server.process)
        running = server.handle(method, message)
        try:
            while not running.done():
                await asyncio.wait([running], timeout=_LOOK_S)
                if not running.done() and self._network.is_silent(here, server.process):
                    await self._pass(here, server.process)
        except BaseException:
            running.cancel()
            raise
        await self._pass(here, server.process)
        if running.cancelled() or not server.process.is_alive:
            raise _error(grpc.StatusCode.UNAVAILABLE, "Socket closed")
        return running.result()

    async def _pass(self, here: Process, there: Process) -> None:
        """One way. Pings notice a silent side."""
        await asyncio.sleep(self._network.latency_s())
        waited_s = 0.0
        while self._network.is_silent(here, there):
            if waited_s >= self._patience_s:
                raise _error(grpc.StatusCode.UNAVAILABLE, "keepalive watchdog timeout")
            await asyncio.sleep(_LOOK_S)
            waited_s += _LOOK_S


class NoStream:
    """A stream whose connection is lost."""

    async def read(self) -> bytes:
        raise _error(grpc.StatusCode.UNAVAILABLE, "Connection reset")

    async def write(self, data: bytes) -> None:
        raise _error(grpc.StatusCode.UNAVAILABLE, "Connection reset")

    def cancel(self) -> None: ...
