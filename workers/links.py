"""Plans over plain sockets: see "link" in `protos/worker.proto`."""

import contextlib
import io
import logging
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from manta.protos import worker_pb2 as pb
from manta.workers.failures import OrderError

logger = logging.getLogger(__name__)

KEY_BYTES = 16
_LENGTH_BYTES = 4
_BACKLOG = 16
_RETRY_S = 1.0
_SILENT_S = 10.0  # the scheduler pings every few seconds
_NUM_SILENT = 3  # so many times silent, and it counts as lost: not one long time, as this process may be stopped, too
Serve = Callable[[Iterator[pb.StepPlan]], Iterator[pb.StepResult]]


class LinkServer:
    """Listens on TCP and, where there are abstract sockets (Linux), on a Unix socket. Each connection that begins with
    the key, which is sent back, gets two threads: one reads its plans, one runs `serve` and writes the results.

    Raises OSError if nothing can be listened on.
    """

    def __init__(self, host: str, serve: Serve) -> None:
        self.key = secrets.token_bytes(KEY_BYTES)
        self._serve = serve
        self._lock = threading.Lock()  # guards the two below
        self._connections: set[socket.socket] = set()
        self._closed = False
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        tcp = socket.create_server((host.strip("[]"), 0), family=family, backlog=_BACKLOG)
        self.port: int = tcp.getsockname()[1]
        self._listeners = [tcp]
        self.socket_name = ""
        name = f"manta-worker-{secrets.token_hex(8)}"
        with contextlib.suppress(OSError, AttributeError):
            local = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            local.bind("\0" + name)
            local.listen(_BACKLOG)
            self._listeners.append(local)
            self.socket_name = name

    def start(self) -> None:
        for listener in self._listeners:
            threading.Thread(target=self._accept, args=(listener,), name="links", daemon=True).start()

    def stop(self) -> None:
        """Stops listening and ends the connections; their plans under way are finished."""
        with self._lock:
            self._closed = True
            connections = list(self._connections)
        for each in (*self._listeners, *connections):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits for it
        for listener in self._listeners:
            listener.close()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
                threading.Thread(target=self._run, args=(connection,), name="link", daemon=True).start()
            except (OSError, RuntimeError) as error:  # most of all: too many open files, or threads
                if self._closed:
                    return
                logger.warning("could not accept a link: %s", error)
                time.sleep(_RETRY_S)

    def _run(self, connection: socket.socket) -> None:
        with self._lock:
            if self._closed:
                connection.close()
                return
            self._connections.add(connection)
        try:
            if connection.family != socket.AF_UNIX:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            frames = _Frames(connection)
            if not frames.begin_with(self.key):
                logger.warning("closed a link that did not begin with the key of Describe")
                return
            frames.write(self.key)
            for result in self._serve(frames.plans()):
                frames.write(result.SerializeToString())
        except OSError:
            logger.info("a link broke; waiting for a new one")
        except OrderError as error:
            logger.warning("closed a link: %s", error)
        finally:
            with self._lock:
                self._connections.discard(connection)
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)  # for the thread that reads: its stream keeps the file open
            connection.close()


class _PatientReader(io.RawIOBase):
    """The bytes that come in. Raises TimeoutError when the connection's timeout has passed several times in a row."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._keeps_open = connection.makefile("rb", buffering=0)  # until nobody reads any more

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        for _ in range(_NUM_SILENT - 1):
            try:
                return self._connection.recv_into(buffer)
            except TimeoutError:
                continue
        return self._connection.recv_into(buffer)


class _Frames:
    """Frames of one connection: one thread reads, any may write."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(_SILENT_S)
        self._connection = connection
        self._stream = io.BufferedReader(_PatientReader(connection))
        self._lock = threading.Lock()  # held while a frame is written

    def write(self, data: bytes) -> None:
        frame = len(data).to_bytes(_LENGTH_BYTES, "little") + data
        with self._lock:
            self._connection.sendall(frame)

    def begin_with(self, key: bytes) -> bool:
        """Whether the first frame is the key. Takes nothing longer: it may be anybody's."""
        length = self._stream.read(_LENGTH_BYTES)
        return int.from_bytes(length, "little") == len(key) and secrets.compare_digest(self._stream.read(len(key)), key)

    def read(self) -> bytes:
        """The next frame that is not empty; an empty one is sent back. b"" when the other side has ended the link.
        Raises OSError when it breaks or the other side is silent for too long."""
        while True:
            length = self._stream.read(_LENGTH_BYTES)
            num_bytes = int.from_bytes(length, "little")
            if num_bytes:
                data = self._stream.read(num_bytes)
                return data if len(data) == num_bytes else b""
            if len(length) < _LENGTH_BYTES:
                return b""
            self.write(b"")

    def plans(self) -> Iterator[pb.StepPlan]:
        """Until the link ends. Raises OSError as `read`, DecodeError for what is no plan."""
        while data := self.read():
            yield pb.StepPlan.FromString(data)
