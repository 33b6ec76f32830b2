"""A file that a client sends as a form, taken straight to the disk."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

from starlette.requests import Request

from manta.cluster.batches.database import StorageError, storage_error
from manta.cluster.batches.files import (
    FileRecord,
    NewFile,
    QuotaError,
    insert_upload,
    num_bytes_of,
    remove_contents,
)
from manta.cluster.batches.store import BatchStore
from manta.cluster.doors import patience
from manta.cluster.doors.caller import current_tenant
from manta.cluster.doors.checks import check_int, shown
from manta.cluster.doors.errors import Kind, RequestError
from manta.cluster.doors.fields import unknown_field
from manta.cluster.doors.multipart import Event, MultipartError, MultipartReader, PartBegin, PartData, read_boundary

LIFETIMES_S = (3600, 30 * 86400)  # that a client may give a file, as in the OpenAI API
_MAX_VALUE_BYTES = 1024  # of a field that is no file
_MAX_NAME_CHARACTERS = 255
_WRITE_BYTES = 1 << 20  # that are in memory before they are written
_FORM_BYTES = 1 << 16  # of a form beside its file
_FIELDS = frozenset({"file", "purpose", "expires_after[anchor]", "expires_after[seconds]"})


async def receive_upload(request: Request, store: BatchStore) -> FileRecord:
    """The file is on the disk and known when this returns. Raises RequestError, StorageError or ClientDisconnect."""
    reader = MultipartReader(_boundary(request))
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > store.max_file_bytes + _FORM_BYTES:
        raise _too_large(store)
    room = store.max_tenant_bytes - await store.database.read(num_bytes_of, current_tenant())
    if length.isdigit() and int(length) > room + _FORM_BYTES:
        raise _quota_used(store)
    try:
        with NewFile(store.folder) as file:
            form = _Form(file, store, room)
            async for piece in _pieces(request):
                for event in _read(reader, piece):
                    await form.take(event)
            if not reader.is_complete:
                raise RequestError("the form ends before its last boundary", code="invalid_form")
            record = form.record(current_tenant())
            await form.flush()
            await asyncio.to_thread(file.finish)
    except OSError as error:
        raise storage_error(store.folder, error) from None
    try:
        await store.database.write(insert_upload, record, store.max_tenant_bytes)
    except (StorageError, QuotaError) as error:
        await asyncio.to_thread(remove_contents, store.folder, [record.id])
        raise _quota_used(store) if isinstance(error, QuotaError) else error
    return record


class _Form:
    """What has come of a form so far."""

    def __init__(self, file: NewFile, store: BatchStore, room_bytes: int) -> None:
        self._file = file
        self._store = store
        self._room_bytes = room_bytes  # that the tenant may still fill
        self._values: dict[str, bytearray] = {}
        self._name: str | None = None  # of the file
        self._num_bytes = 0  # of the file
        self._part = ""  # the field at hand
        self._unwritten: list[bytes] = []
        self._num_unwritten_bytes = 0

    async def take(self, event: Event) -> None:
        """Raises RequestError or OSError."""
        if isinstance(event, PartBegin):
            self._begin(event)
        elif isinstance(event, PartData):
            if self._part == "file":
                await self._add(event.data)
                return
            value = self._values[self._part]
            value += event.data
            if len(value) > _MAX_VALUE_BYTES:
                raise RequestError(f"{self._part} is longer than {_MAX_VALUE_BYTES} bytes", self._part)

    def record(self, tenant: str) -> FileRecord:
        """Raises RequestError."""
        if self._name is None:
            message = "file is required: a part of the form with a file name"
            raise RequestError(message, "file", "missing_required_parameter")
        if not self._num_bytes:
            raise RequestError("file is empty", "file")
        purpose = self._text("purpose")
        if purpose is None:
            raise RequestError("purpose is required", "purpose", "missing_required_parameter")
        if purpose != "batch":
            raise RequestError(f"purpose must be 'batch', not {shown(purpose)}", "purpose")
        now_s = int(time.time())
        lifetime_s = self._lifetime_s()
        expires_s = None if lifetime_s is None else now_s + lifetime_s
        return FileRecord(self._file.id, tenant, "batch", self._name, self._num_bytes, now_s, expires_s)

    async def flush(self) -> None:
        pieces, self._unwritten, self._num_unwritten_bytes = self._unwritten, [], 0
        await asyncio.to_thread(self._file.write, pieces)

    def _begin(self, part: PartBegin) -> None:
        if part.name not in _FIELDS:
            raise unknown_field(part.name, _FIELDS, _FIELDS)
        if part.name in self._values or (part.name == "file" and self._name is not None):
            raise RequestError(f"{part.name} is there twice", part.name)
        self._part = part.name
        if part.name == "file":
            # Clients of some systems send the folder, too.
            self._name = (part.filename or "file").replace("\\", "/").rsplit("/", 1)[-1][:_MAX_NAME_CHARACTERS]
        else:
            self._values[part.name] = bytearray()

    async def _add(self, data: bytes) -> None:
        self._num_bytes += len(data)
        if self._num_bytes > self._store.max_file_bytes:
            raise _too_large(self._store)
        if self._num_bytes > self._room_bytes:
            raise _quota_used(self._store)
        self._unwritten.append(data)
        self._num_unwritten_bytes += len(data)
        if self._num_unwritten_bytes >= _WRITE_BYTES:
            await self.flush()

    def _lifetime_s(self) -> int | None:
        anchor, seconds = self._text("expires_after[anchor]"), self._text("expires_after[seconds]")
        if anchor is None and seconds is None:
            return None
        if anchor != "created_at":
            raise RequestError("expires_after[anchor] must be 'created_at'", "expires_after[anchor]")
        value = int(seconds) if seconds is not None and seconds.isascii() and seconds.isdigit() else seconds
        return check_int(value, "expires_after[seconds]", *LIFETIMES_S)

    def _text(self, name: str) -> str | None:
        return self._values[name].decode("utf-8", "replace") if name in self._values else None


def _boundary(request: Request) -> bytes:
    try:
        return read_boundary(request.headers.get("content-type", ""))
    except MultipartError as error:
        raise RequestError(str(error), code="invalid_content_type") from None


def _read(reader: MultipartReader, piece: bytes) -> list[Event]:
    try:
        return reader.feed(piece)
    except MultipartError as error:
        raise RequestError(str(error), code="invalid_form") from None


async def _pieces(request: Request) -> AsyncIterator[bytes]:
    async with contextlib.aclosing(request.stream()) as stream:
        while True:
            try:
                async with asyncio.timeout(patience.SLOW_SENDER_S):
                    piece = await anext(stream, None)
            except TimeoutError:
                message = f"nothing more of the body came for {patience.SLOW_SENDER_S:g} s"
                raise RequestError(message, code="request_timeout", kind=Kind.SLOW_SENDER) from None
            if piece is None:
                return
            yield piece


def _too_large(store: BatchStore) -> RequestError:
    message = f"the file is larger than {store.max_file_bytes} bytes, the limit of this server (--max-batch-file-bytes)"
    return RequestError(message, "file", "request_too_large", Kind.TOO_LARGE)


def _quota_used(store: BatchStore) -> RequestError:
    message = (
        f"your files would hold more than {store.max_tenant_bytes} bytes, the limit of this server "
        f"(--max-batch-bytes); delete some first"
    )
    return RequestError(message, "file", "quota_exceeded", Kind.TOO_LARGE)
