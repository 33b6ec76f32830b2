"""uvicorn's HTTP/1.1 with limits for its clients: size of the head, time for it, and time to take an answer."""

import asyncio
from http import HTTPStatus
from typing import Any

import orjson
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from manta.cluster.doors import patience
from manta.cluster.doors.errors import Kind, RequestError


class _LargeHeadError(Exception):
    """Ends the parsing of a head that is too large."""


class DoorProtocol(HttpToolsProtocol):
    """One connection. What its client does not take stays in a buffer of 64 KiB; its answer then waits, and so does
    the reading from the engine. A buffer that is not nearly empty again after SLOW_READER_S ends the connection."""

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self._in_head = True
        self._num_head_bytes = 0  # of the headers that are complete
        self._num_unfinished_bytes = 0  # of the head that is not, but for what came with its beginning
        self._head_timer: asyncio.TimerHandle | None = None
        self._reader_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._time_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timers()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        was_in_head = self._in_head
        super().data_received(data)
        if not self._in_head or self.transport.is_closing():
            return
        if self._head_timer is None:
            self._time_head()
        if was_in_head:
            self._num_unfinished_bytes += len(data)
            if self._num_unfinished_bytes > patience.MAX_HEAD_BYTES:
                self._refuse_head()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True
        self._num_head_bytes = self._num_unfinished_bytes = 0

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value) + 4)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head = False
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """The parser gave up: the head is too large, or no HTTP."""
        if self._num_head_bytes > patience.MAX_HEAD_BYTES:
            self._refuse_head()
        else:
            self._answer(RequestError("this is not valid HTTP/1.1", code="invalid_http"))

    def pause_writing(self) -> None:
        super().pause_writing()
        self._time_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._reader_timer is not None:
            self._reader_timer.cancel()
            self._reader_timer = None

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing() and self.transport.get_write_buffer_size():
            self._time_reader()  # a transport waits for ever to be rid of its last bytes

    def timeout_keep_alive_handler(self) -> None:
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        super().timeout_keep_alive_handler()

    def _count(self, num_bytes: int) -> None:
        self._num_head_bytes += num_bytes
        if self._num_head_bytes > patience.MAX_HEAD_BYTES:
            raise _LargeHeadError

    def _time_head(self) -> None:
        self._head_timer = self.loop.call_later(patience.SLOW_SENDER_S, self.transport.abort)

    def _time_reader(self) -> None:
        if self._reader_timer is None:
            self._reader_timer = self.loop.call_later(patience.SLOW_READER_S, self.transport.abort)

    def _stop_timers(self) -> None:
        for timer in (self._head_timer, self._reader_timer):
            if timer is not None:
                timer.cancel()

    def _refuse_head(self) -> None:
        message = f"the request line and the headers are larger than {patience.MAX_HEAD_BYTES // 2**10} KiB"
        self._answer(RequestError(message, code="headers_too_large", kind=Kind.LARGE_HEAD))

    def _answer(self, error: RequestError) -> None:
        """As the last answer of the connection."""
        status, body = error.kind.value.http, orjson.dumps(error.body())
        head = (
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()
