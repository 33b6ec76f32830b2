"""The other frontends that listen on the same port: who asks one of them for what another one has is passed on.

Each frontend has a name, which is part of the ids of what it keeps, and listens on a Unix socket of that name in a
folder that only this user can enter.
"""

import contextlib
import os
import secrets
import socket
import stat
import tempfile
from pathlib import Path

import httpx
from starlette.datastructures import Headers
from starlette.types import Scope, Send

from manta.cluster.doors.exchange import ClientGoneError

NAME_CHARACTERS = 8
_REQUEST_HEADERS = ("authorization", "x-api-key", "content-type", "accept")
_ANSWER_HEADERS = ("content-type", "content-length", "retry-after", "cache-control", "x-accel-buffering")
_CONNECT_TIMEOUT_S = 5.0


class PeerError(OSError):
    """The socket cannot be made; the message is one sentence."""


class Peers:
    """Owns the socket of its frontend. Without `listen` there are no others."""

    def __init__(self) -> None:
        self.name = secrets.token_hex(NAME_CHARACTERS // 2)
        self._folder: Path | None = None

    def listen(self, http_port: int) -> socket.socket:
        """The socket for those who share `http_port`. Raises PeerError."""
        folder = Path(tempfile.gettempdir()) / f"manta-{os.getuid()}"
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            status = folder.lstat()
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
                raise PeerError(f"{folder} must be a folder that only this user can enter; remove it")
            _sweep(folder)
            self._folder = folder / str(http_port)
            self._folder.mkdir(mode=0o700, exist_ok=True)
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            listener.bind(str(self._folder / self.name))
        except OSError as error:
            if isinstance(error, PeerError):
                raise
            raise PeerError(f"frontends cannot reach each other through {folder}: {error.strerror or error}") from None
        listener.listen(2048)
        listener.setblocking(False)
        return listener

    def close(self) -> None:
        if self._folder is not None:
            (self._folder / self.name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # others are still there
                self._folder.rmdir()

    def socket_of(self, name: str) -> Path | None:
        """Where another frontend of this name listens; None if there is none."""
        if self._folder is None or name == self.name or not name.isalnum():
            return None
        path = self._folder / name
        return path if path.is_socket() else None

    async def pass_on(self, path: Path, scope: Scope, body: bytes, send: Send) -> bool:
        """Lets the frontend at `path` answer the request. False if nobody is there, or it ends before it answers."""
        given = Headers(scope=scope)
        headers = {name: given[name] for name in _REQUEST_HEADERS if name in given}
        headers |= {"x-request-id": scope["request_id"], "accept-encoding": "identity"}
        url = httpx.URL("http://frontend", raw_path=scope.get("raw_path", scope["path"].encode()) + _query(scope))
        timeout = httpx.Timeout(None, connect=_CONNECT_TIMEOUT_S)
        transport = httpx.AsyncHTTPTransport(uds=str(path), verify=False)  # no TLS here; its context would take 30 ms
        async with httpx.AsyncClient(transport=transport, timeout=timeout, trust_env=False) as client:
            try:
                request = client.build_request(scope["method"], url, headers=headers, content=body)
                answer = await client.send(request, stream=True)
            except (httpx.TransportError, FileNotFoundError):
                return False
            async with contextlib.aclosing(answer):
                named = [name for name in _ANSWER_HEADERS if name in answer.headers]
                kept = [(name.encode(), answer.headers[name].encode()) for name in named]
                await send({"type": "http.response.start", "status": answer.status_code, "headers": kept})
                try:
                    async for piece in answer.aiter_raw():
                        await send({"type": "http.response.body", "body": piece, "more_body": True})
                except httpx.HTTPError as error:  # what was sent cannot be taken back: the client sees a broken answer
                    raise ClientGoneError from error
        await send({"type": "http.response.body", "body": b""})
        return True


def _sweep(folder: Path) -> None:
    """Removes the sockets of processes that had no time to do it themselves."""
    for path in [*folder.glob("*/*")]:
        if _is_dead(path):
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # the others there may live
                path.parent.rmdir()


def _is_dead(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as trial:
        trial.setblocking(False)
        try:
            trial.connect(str(path))
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
    return False


def _query(scope: Scope) -> bytes:
    query: bytes = scope.get("query_string", b"")
    return b"?" + query if query else b""
