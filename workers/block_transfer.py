"""KV blocks from one worker to another, rank to rank: see ImportBlocks and ExportBlocks in `protos/worker.proto`.

Chunks are what gRPC's flow control lets through: a rank holds a few of them at most, whatever is copied. They are read
and written beside the steps, not between them: the blocks of a move are nobody else's. A lock keeps a chunk that is
being written from reaching into the next epoch, whose plans may give its blocks to others. Blocks that come for an
epoch before its first plan wait for the end of the step under way: it may write to them.
"""

import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import grpc
import numpy as np

from manta.protos import worker_pb2 as pb
from manta.protos import worker_pb2_grpc
from manta.workers.columns import Ints, PlanError, decode_uint32
from manta.workers.epochs import EpochGuard

if TYPE_CHECKING:  # it needs torch
    from manta.workers.block_bytes import BlockBytes

CHUNK_BYTES = 4 << 20
_LEAST_BYTES_PER_S = 4 << 20  # slower, and the copy is given up
_PATIENCE_S = 10.0
_MAX_CHANNELS = 8  # to other workers: replicas are few

# As the scheduler calls workers: a peer that is stopped is given up within seconds.
_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.keepalive_time_ms", 1_000),
    ("grpc.keepalive_timeout_ms", 2_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.lookahead_bytes", 2 * CHUNK_BYTES),
    ("grpc.use_local_subchannel_pool", 1),
)


class TransferError(RuntimeError):
    """The blocks did not come, or nobody needs them any more; the message is one sentence."""


class BlockTransfers:
    """One rank's end of copies. Its methods run on gRPC's threads."""

    def __init__(self, guard: Callable[[], EpochGuard], finish_steps: Callable[[], None]) -> None:
        """guard: the one that the rank follows now. finish_steps: returns when the steps whose plans have been taken
        write no more; raises TimeoutError."""
        self._guard = guard
        self._finish_steps = finish_steps
        self._channels: dict[str, grpc.Channel] = {}
        self._lock = threading.Lock()  # guards the channels
        self.writing = threading.Lock()  # held while blocks are written, and while a new epoch begins

    def export(self, request: pb.ExportBlocksRequest, own: "BlockBytes") -> Iterator[pb.BlockChunk]:
        """Raises PlanError for blocks that are not here or a layout that is not this rank's, TransferError."""
        blocks = _checked(request.blocks, own, "blocks")
        if request.layout != own.layout:
            raise PlanError(f"blocks are kept in {own.layout}; they are wanted in {request.layout}")
        for part in _chunks(blocks, own.block_bytes):
            if request.epoch != self._guard().epoch:
                raise TransferError(f"epoch {request.epoch} is over")
            yield pb.BlockChunk(num_blocks=len(part), data=own.read(part))

    def fetch(self, request: pb.ImportBlocksRequest, own: "BlockBytes") -> pb.ImportBlocksResponse:
        """Returns when all blocks are written. Raises PlanError for blocks that are not here, TransferError."""
        began_s = time.perf_counter()
        blocks, sources = _checked(request.blocks, own, "blocks"), decode_uint32(request.peer_blocks, "peer_blocks")
        if len(np.unique(blocks)) != len(blocks) or len(blocks) != len(sources):
            raise PlanError(f"{len(sources)} peer_blocks are to come to {len(blocks)} blocks, each once")
        export = pb.ExportBlocksRequest(epoch=request.peer_epoch, blocks=request.peer_blocks, layout=own.layout)
        timeout_s = _PATIENCE_S + len(blocks) * own.block_bytes / _LEAST_BYTES_PER_S
        guard, num_written = self._guard(), 0
        if guard.epoch != request.epoch:
            self._begin_epoch(guard, request.epoch)
        chunks = worker_pb2_grpc.WorkerStub(self._channel(request.peer)).ExportBlocks(export, timeout=timeout_s)
        try:
            for chunk in chunks:
                part = blocks[num_written : num_written + chunk.num_blocks]
                if len(chunk.data) != len(part) * own.block_bytes:
                    raise TransferError(f"{len(chunk.data)} bytes came for {len(part)} blocks")
                self._write(guard, request.epoch, own, part, chunk.data)
                num_written += len(part)
        except grpc.RpcError as error:
            raise TransferError(f"the worker at {request.peer} did not give its blocks: {_reason(error)}") from None
        finally:
            chunks.cancel()
        if num_written != len(blocks):
            raise TransferError(f"{num_written} of {len(blocks)} blocks came")
        return pb.ImportBlocksResponse(num_bytes=num_written * own.block_bytes, took_s=time.perf_counter() - began_s)

    def close(self) -> None:
        with self._lock:
            for channel in self._channels.values():
                channel.close()
            self._channels.clear()

    def _begin_epoch(self, guard: EpochGuard, epoch: int) -> None:
        """Plans of earlier epochs are refused from now on."""
        with self.writing:
            self._check_epoch(guard, epoch)
        try:
            self._finish_steps()
        except TimeoutError:
            raise TransferError(f"a step from before epoch {epoch} does not end") from None

    def _write(self, guard: EpochGuard, epoch: int, own: "BlockBytes", blocks: Ints, data: bytes) -> None:
        with self.writing:
            self._check_epoch(guard, epoch)
            own.write(blocks, data)

    def _check_epoch(self, guard: EpochGuard, epoch: int) -> None:
        """`writing` is held."""
        if guard is not self._guard() or not guard.admits_blocks(epoch):
            raise TransferError(f"epoch {epoch} is over")

    def _channel(self, peer: str) -> grpc.Channel:
        with self._lock:
            channel = self._channels.pop(peer, None) or grpc.insecure_channel(peer, options=_OPTIONS)
            self._channels[peer] = channel  # the last one used is the last one closed
            if len(self._channels) > _MAX_CHANNELS:
                self._channels.pop(next(iter(self._channels))).close()
            return channel


def _checked(data: bytes, own: "BlockBytes", what: str) -> Ints:
    blocks = decode_uint32(data, what)
    if len(blocks) and blocks.max() >= own.num_blocks:
        raise PlanError(f"{what} name block {blocks.max()} of {own.num_blocks} on this worker")
    return blocks


def _chunks(blocks: Ints, block_bytes: int) -> list[Ints]:
    """Of CHUNK_BYTES at most, or of one block."""
    step = max(1, CHUNK_BYTES // block_bytes)
    return [blocks[start : start + step] for start in range(0, len(blocks), step)]


def _reason(error: grpc.RpcError) -> str:
    details = error.details() if isinstance(error, grpc.Call) else str(error)
    return str(details).partition("\n")[0]
