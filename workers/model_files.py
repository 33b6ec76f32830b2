"""The ModelFiles service of `protos/model_files.proto`: a worker that has loaded gives the files to others.

They come from this host's page cache, where loading has put them.
"""

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc

from manta.protos import model_files_pb2 as pb
from manta.protos.model_files_pb2_grpc import ModelFilesServicer

PIECE_BYTES = 2 * 2**20
MAX_READERS = 4  # each holds a thread of the server, which has others to answer
SUFFIXES = (".json", ".safetensors", ".jinja", ".model", ".txt")


class ModelFilesService(ModelFilesServicer):
    """`folder`: where the files of the loaded model are; None while there are none."""

    def __init__(self, folder: Callable[[], Path | None]) -> None:
        self._folder = folder
        self._room = threading.BoundedSemaphore(MAX_READERS)

    def List(self, request: pb.ListRequest, context: grpc.ServicerContext) -> pb.ListResponse:
        files = self._files(context)
        return pb.ListResponse(files=[pb.File(name=name, num_bytes=os.stat(files[name]).st_size) for name in files])

    def Read(self, request: pb.ReadRequest, context: grpc.ServicerContext) -> Iterator[pb.Piece]:
        path = self._files(context).get(request.name)
        if path is None:
            context.abort(grpc.StatusCode.NOT_FOUND, f"{request.name!r} is not a file of the model")
            raise AssertionError("abort raises")
        if not self._room.acquire(blocking=False):
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{MAX_READERS} readers are served at a time")
        try:
            yield from _pieces(path, request, context)
        finally:
            self._room.release()

    def _files(self, context: grpc.ServicerContext) -> dict[str, Path]:
        """By name. The folder is the operator's; nothing outside of it can be named."""
        folder = self._folder()
        if folder is None:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "this worker has no files of a model")
            raise AssertionError("abort raises")
        return {path.name: path for path in sorted(folder.iterdir()) if path.suffix in SUFFIXES and path.is_file()}


def _pieces(path: Path, request: pb.ReadRequest, context: grpc.ServicerContext) -> Iterator[pb.Piece]:
    with path.open("rb") as file:
        begin = request.begin
        while begin < request.end:
            data = os.pread(file.fileno(), min(PIECE_BYTES, request.end - begin), begin)
            if not data:
                context.abort(grpc.StatusCode.OUT_OF_RANGE, f"{request.name!r} ends at {begin}")
            begin += len(data)
            yield pb.Piece(data=data)
