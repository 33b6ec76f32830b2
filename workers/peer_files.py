"""Files of a model that another worker has: small ones are copied, ranges of large ones are read as they are needed."""

import logging
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import grpc

from manta.configs.weights import WeightError
from manta.protos import model_files_pb2 as pb
from manta.protos.model_files_pb2_grpc import ModelFilesStub

logger = logging.getLogger(__name__)

NUM_READERS = 2  # a single stream does not fill a fast network
WINDOW_BYTES = 512 * 2**20  # that are fetched before they are asked for
MAX_SMALL_BYTES = 64 * 2**20  # of a file that is copied
_SILENT_S = 60.0
_SLOWEST_BYTES_PER_S = 2**20
_BUSY_RETRY_S = 0.05
_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 20_000),
)


class Range(NamedTuple):
    """Bytes begin : end of a file."""

    name: str
    begin: int
    end: int

    @property
    def num_bytes(self) -> int:
        return self.end - self.begin


class PeerFiles:
    """One thread asks; others fetch for it. A peer that fails is left for the next one, and asked again only where that
    one fails, too: a host that is gone costs seconds each time. `close` when done."""

    def __init__(self, peers: Sequence[str]) -> None:
        """peers: "host:port" of workers, those to be asked first in front. Raises WeightError if none has files."""
        self._channels = [grpc.insecure_channel(peer, options=_OPTIONS) for peer in peers]
        self._peers = deque(zip(peers, map(ModelFilesStub, self._channels), strict=True))
        self._readers = ThreadPoolExecutor(NUM_READERS, thread_name_prefix="peer-files")
        self._failed: set[str] = set()  # peers that did not answer a call
        self._expected: deque[Range] = deque()
        self._fetching: dict[Range, Future[bytearray]] = {}
        try:
            self.sizes = self._list()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._readers.shutdown(wait=False, cancel_futures=True)
        for channel in self._channels:
            channel.close()

    def copy_small(self, folder: Path) -> None:
        """All but the weights."""
        for name, size in self.sizes.items():
            if not name.endswith(".safetensors") and size <= MAX_SMALL_BYTES:
                (folder / name).write_bytes(self.read(Range(name, 0, size)))

    def expect(self, ranges: Sequence[Range]) -> None:
        """These will be read in this order: they are fetched ahead."""
        self._expected.extend(each for each in ranges if each.num_bytes)
        self._fetch_ahead()

    def read(self, wanted: Range) -> bytearray:
        """Raises WeightError when no peer gives it."""
        fetching = self._fetching.get(wanted)
        if fetching is None:
            return self._fetch(wanted)
        data = fetching.result()
        del self._fetching[wanted]
        self._fetch_ahead()
        return data

    def _fetch_ahead(self) -> None:
        num_bytes = sum(each.num_bytes for each in self._fetching)
        while self._expected and (not num_bytes or num_bytes + self._expected[0].num_bytes <= WINDOW_BYTES):
            following = self._expected.popleft()
            num_bytes += following.num_bytes
            self._fetching[following] = self._readers.submit(self._fetch, following)

    def _list(self) -> dict[str, int]:
        reason = ""
        for _ in range(len(self._peers)):
            peer, stub = self._peers[0]
            try:
                listed = stub.List(pb.ListRequest(), timeout=_SILENT_S)
                logger.info("the model's files come from the worker at %s", peer)
                return {file.name: file.num_bytes for file in listed.files}
            except grpc.RpcError as error:
                reason = f"{peer}: {_reason(error)}"
                self._peers.popleft()
        raise WeightError(f"no other worker has the model's files ({reason})")

    def _fetch(self, wanted: Range) -> bytearray:
        errors: dict[str, str] = {}
        while True:
            peers = [each for each in list(self._peers) if each[0] not in errors]
            peers.sort(key=lambda each: each[0] in self._failed)
            if not peers:
                raise WeightError(f"{wanted.name} could not be read from another worker: {errors}")
            for peer, stub in peers:
                try:
                    return _read(stub, wanted)
                except grpc.RpcError as error:
                    if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                        errors[peer] = _reason(error)
                        self._failed.add(peer)
            time.sleep(_BUSY_RETRY_S)


def _read(stub: ModelFilesStub, wanted: Range) -> bytearray:
    """Raises grpc.RpcError."""
    data = bytearray(wanted.num_bytes)
    filled = 0
    request = pb.ReadRequest(name=wanted.name, begin=wanted.begin, end=wanted.end)
    for piece in stub.Read(request, timeout=_SILENT_S + wanted.num_bytes / _SLOWEST_BYTES_PER_S):
        data[filled : filled + len(piece.data)] = piece.data
        filled += len(piece.data)
    return data


def _reason(error: grpc.RpcError) -> str:
    return str(error.details() or error.code().name)
