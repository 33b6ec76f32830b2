"""A network in memory: connections that take time, break, or fall silent."""

import asyncio
import contextvars
import random
from collections import deque
from collections.abc import Callable
from typing import Any

from tests.support.simulation.loop import Process, current_process

_EOF = b""


class Network:
    """Owns the connections. Faults: a process that is killed or stopped, a host that vanishes, a cut between two."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.servers: dict[str, Any] = {}  # "host:port" -> an RpcServer
        self.listeners: dict[str, Listener] = {}
        self.cuts: set[frozenset[Process]] = set()  # processes that do not reach each other
        self.sockets: dict[Socket, None] = {}  # open ones
        self.held: dict[Socket, None] = {}  # what they have sent waits for the end of a silence
        self._num_ports = 20_000

    def new_address(self) -> str:
        self._num_ports += 1
        return f"127.0.0.1:{self._num_ports}"

    def latency_s(self) -> float:
        return self.rng.choice((0.0001, 0.0002, 0.001, 0.004))

    def is_silent(self, one: Process, other: Process) -> bool:
        """Nothing passes between them, and neither hears why."""
        if one.has_vanished or other.has_vanished or one.is_stopped or other.is_stopped:
            return True
        return frozenset((one, other)) in self.cuts

    def changed(self) -> None:
        """Something may pass again."""
        held, self.held = list(self.held), {}
        for sock in held:
            sock.pump()

    def drop_connections(self, one: Process, other: Process) -> None:
        """Both sides see them break."""
        for sock in list(self.sockets):
            if {sock.process, sock.peer.process} == {one, other}:
                sock.reset()

    async def connect(self, address: str) -> "Socket":
        listener = self.listeners.get(address)
        here = current_process()
        if listener is None or not listener.process.is_alive:
            if listener is not None and listener.process.has_vanished:
                await asyncio.sleep(20.0)
            raise ConnectionRefusedError(111, "Connection refused")
        while self.is_silent(here, listener.process):
            await asyncio.sleep(0.1)
        await asyncio.sleep(self.latency_s())
        mine, other = Socket(self, here), Socket(self, listener.process)
        mine.peer, other.peer = other, mine
        self.sockets |= {mine: None, other: None}
        listener.waiting.put_nowait(other)
        return mine


class Socket:
    """One end of a connection; what links use of a socket."""

    family = 2
    peer: "Socket"

    def __init__(self, network: Network, process: Process) -> None:
        self.process = process
        self._network = network
        self._sent: deque[tuple[float, bytes]] = deque()  # when it arrives, and what
        self._received = bytearray()
        self._ended = False  # by the peer
        self._broken = False
        self._closed = False
        self._callback: Callable[[], object] | None = None
        self._waiter: asyncio.Future[None] | None = None
        process.on_kill.append(self.close)

    def setsockopt(self, *_: object) -> None: ...

    def watch(self, callback: Callable[[], object] | None) -> None:
        """As add_reader."""
        context = contextvars.copy_context()
        loop = asyncio.get_running_loop()
        self._callback = None if callback is None else lambda: loop.call_soon(self._call, context=context)
        self._reader = callback
        self._notify()

    def _call(self) -> None:
        if self._callback is not None and self._is_readable() and self._reader is not None:
            self._reader()
            self._notify()

    def send(self, data: bytes | bytearray) -> int:
        if self._closed or self._broken:
            raise BrokenPipeError(32, "Broken pipe")
        self._post(bytes(data))
        return len(data)

    def recv_into(self, buffer: bytearray) -> int:
        if self._broken:
            raise ConnectionResetError(104, "Connection reset by peer")
        if not self._is_readable():
            raise BlockingIOError
        count = min(len(buffer), len(self._received))
        buffer[:count] = self._received[:count]
        del self._received[:count]
        return count

    async def receive(self, num_bytes: int) -> bytes:
        while not self._is_readable():
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        buffer = bytearray(num_bytes)
        return bytes(buffer[: self.recv_into(buffer)])

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._callback = None
            self._network.sockets.pop(self, None)
            if not self.process.has_vanished:
                self._post(_EOF)

    def reset(self) -> None:
        """Breaks at this end now; what is on its way is lost."""
        self._broken = True
        self._sent.clear()
        self._notify()

    def pump(self) -> None:
        """Lets arrive what is due."""
        now_s = asyncio.get_running_loop().time()
        while self._sent and self._sent[0][0] <= now_s:
            if self._network.is_silent(self.process, self.peer.process):
                self._network.held[self] = None
                return
            self.peer._arrive(self._sent.popleft()[1])

    def _post(self, data: bytes) -> None:
        loop = asyncio.get_running_loop()
        arrives_s = loop.time() + self._network.latency_s()
        if self._sent:
            arrives_s = max(arrives_s, self._sent[-1][0])
        self._sent.append((arrives_s, data))
        loop.call_at(arrives_s + 1e-6, self.pump)

    def _arrive(self, data: bytes) -> None:
        if data == _EOF:
            self._ended = True
        self._received += data
        self._notify()

    def _is_readable(self) -> bool:
        return bool(self._received) or self._ended or self._broken

    def _notify(self) -> None:
        if not self._is_readable() or self._closed:
            return
        if self._callback is not None:
            self._callback()
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Listener:
    """What `socket.create_server` returns."""

    def __init__(self, network: Network) -> None:
        self.process = current_process()
        self.waiting: asyncio.Queue[Socket] = asyncio.Queue()
        self._network = network
        self._address = network.new_address()
        network.listeners[self._address] = self

    def getsockname(self) -> tuple[str, int]:
        host, _, port = self._address.rpartition(":")
        return host, int(port)

    def setblocking(self, blocks: bool) -> None: ...

    async def accept(self) -> tuple[Socket, None]:
        return await self.waiting.get(), None

    def close(self) -> None:
        self._network.listeners.pop(self._address, None)


class SocketModule:
    """In place of the module `socket`, for what listens."""

    AF_INET, AF_INET6, AF_UNIX, SOCK_STREAM, IPPROTO_TCP, TCP_NODELAY = 2, 10, 1, 1, 6, 1

    def __init__(self, network: Network) -> None:
        self._network = network

    def create_server(self, *_: object, **__: object) -> Listener:
        return Listener(self._network)

    @staticmethod
    def socket(*_: object) -> Any:
        raise OSError("the simulated network has TCP alone")
