"""/v1/files of the OpenAI API, for the input and the output of batches."""

import asyncio

from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from manta.cluster.batches.files import (
    FileInUseError,
    FileRecord,
    content_path,
    delete_file,
    get_file,
    list_files,
    remove_contents,
)
from manta.cluster.batches.store import BatchStore
from manta.cluster.doors.caller import current_tenant
from manta.cluster.doors.errors import Kind, RequestError
from manta.cluster.doors.state import json_response
from manta.cluster.doors.stored import missing, opened, page, read_choice, read_limit, telling
from manta.cluster.doors.uploads import receive_upload

MAX_LISTED = 10_000


class Files:
    """Without a store every endpoint says what is missing. Nobody sees another tenant's files."""

    def __init__(self, store: BatchStore | None) -> None:
        self._store = store

    def routes(self) -> list[Route]:
        return [
            Route("/v1/files", self.files, methods=["GET", "POST"]),
            Route("/v1/files/{id}", self.file, methods=["GET", "DELETE"]),
            Route("/v1/files/{id}/content", self.content),
        ]

    async def files(self, request: Request) -> Response:
        store = opened(self._store)
        with telling():
            if request.method != "POST":
                return await self._list(request, store)
            try:
                return json_response((await receive_upload(request, store)).body())
            except ClientDisconnect:
                return Response()  # to nobody

    async def file(self, request: Request) -> Response:
        if request.method == "DELETE":
            return await self._delete(request)
        return json_response((await self._find(request)).body())

    async def content(self, request: Request) -> Response:
        record = await self._find(request)
        path = content_path(opened(self._store).folder, record.id)
        if not await asyncio.to_thread(path.is_file):
            missing("content of file", record.id, "file_id")  # it has been deleted since
        return FileResponse(path, media_type="application/octet-stream", filename=record.name)

    async def _list(self, request: Request, store: BatchStore) -> Response:
        limit = read_limit(request, MAX_LISTED, MAX_LISTED)
        purpose = request.query_params.get("purpose")
        newest_first = read_choice(request, "order", ("asc", "desc")) != "asc"
        after = request.query_params.get("after")
        found = await store.database.read(
            list_files, current_tenant(), purpose, after, limit + 1, newest_first=newest_first
        )
        if found is None:
            missing("file", after or "", "after")
        return json_response(page(found, limit))

    async def _delete(self, request: Request) -> Response:
        store, file_id = opened(self._store), request.path_params["id"]
        with telling():
            try:
                if not await store.database.write(delete_file, current_tenant(), file_id):
                    missing("file", file_id, "file_id")
            except FileInUseError as error:
                message = f"{error} reads {file_id} and has not ended; cancel it first"
                raise RequestError(message, "file_id", "file_in_use", Kind.DUPLICATE) from None
            await asyncio.to_thread(remove_contents, store.folder, [file_id])
        return json_response({"id": file_id, "object": "file", "deleted": True})

    async def _find(self, request: Request) -> FileRecord:
        store, file_id = opened(self._store), request.path_params["id"]
        with telling():
            record = await store.database.read(get_file, current_tenant(), file_id)
        if record is None:
            missing("file", file_id, "file_id")
        return record
