"""Where links come in: a TCP port and, where there are abstract sockets (Linux), a Unix socket."""

import asyncio
import contextlib
import logging
import secrets
import socket
from collections.abc import Awaitable, Callable

from manta.cluster.links import LENGTH_BYTES, Link, LinkLostError, frame

logger = logging.getLogger(__name__)

_KEY_BYTES = 16
_KEY_TIMEOUT_S = 10.0
_RETRY_S = 1.0
_BACKLOG = 128


class LinkListener:
    """Calls `serve` for every link that begins with the key, which is sent back, and closes the link when that returns.

    Raises OSError if nothing can be listened on.
    """

    def __init__(self, host: str, serve: Callable[[Link], Awaitable[None]]) -> None:
        self.key = secrets.token_bytes(_KEY_BYTES)
        self._serve = serve
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        tcp = socket.create_server((host.strip("[]"), 0), family=family, backlog=_BACKLOG)
        self.port: int = tcp.getsockname()[1]
        self._listeners = [tcp]
        self.socket_name = ""
        name = f"manta-{secrets.token_hex(8)}"
        with contextlib.suppress(OSError, AttributeError):
            local = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            local.bind("\0" + name)
            local.listen(_BACKLOG)
            self._listeners.append(local)
            self.socket_name = name
        self._accepting: list[asyncio.Task[None]] = []
        self._links: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Listens on the running event loop."""
        for listener in self._listeners:
            listener.setblocking(False)
        self._accepting = [asyncio.create_task(self._accept(listener)) for listener in self._listeners]

    async def stop(self, grace_s: float | None) -> None:
        """Stops listening; links get `grace_s` to end by themselves."""
        await _cancel(self._accepting)
        for listener in self._listeners:
            listener.close()
        if grace_s and self._links:
            await asyncio.wait(self._links, timeout=grace_s)
        await _cancel(list(self._links))

    async def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                sock, _ = await asyncio.get_running_loop().sock_accept(listener)
            except OSError as error:  # most of all: too many open files
                logger.warning("could not accept a link: %s", error)
                await asyncio.sleep(_RETRY_S)
                continue
            task = asyncio.create_task(self._run(sock))
            self._links.add(task)
            task.add_done_callback(self._links.discard)

    async def _run(self, sock: socket.socket) -> None:
        try:
            if sock.family != socket.AF_UNIX:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            async with asyncio.timeout(_KEY_TIMEOUT_S):
                has_key = await self._begins_with_key(sock)
        except OSError:  # or too late
            has_key = False
        except BaseException:
            sock.close()
            raise
        if not has_key:
            logger.warning("closed a link that did not begin with the key")
            sock.close()
            return
        link = Link(sock, pings=False)
        try:
            link.write(self.key)
            await self._serve(link)
        except LinkLostError:
            pass
        except Exception:
            logger.exception("a link failed")
        finally:
            link.close()

    async def _begins_with_key(self, sock: socket.socket) -> bool:
        """Takes nothing that is longer than the key: it may be anybody's."""
        expected = frame(self.key)
        length = await _receive(sock, LENGTH_BYTES)
        if length != expected[:LENGTH_BYTES]:
            return False
        return secrets.compare_digest(await _receive(sock, _KEY_BYTES), self.key)


async def _receive(sock: socket.socket, num_bytes: int) -> bytes:
    """Fewer only if the other side has ended the connection."""
    data = b""
    while len(data) < num_bytes:
        part = await asyncio.get_running_loop().sock_recv(sock, num_bytes - len(data))
        if not part:
            break
        data += part
    return data


async def _cancel(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
