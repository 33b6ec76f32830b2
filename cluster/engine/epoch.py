"""One epoch of a replica: a stream of plans to every rank, results from one of them, errors from any."""

import asyncio

import grpc.aio
from google.protobuf.message import DecodeError

from manta.cluster.engine.codec import Reply, decode_reply
from manta.cluster.engine.workers import WorkerError, WorkerGroup
from manta.cluster.links import LinkLostError, LinkSilentError
from manta.cluster.streams import Stream


class EpochStreams:
    """A link to every rank, or a Run stream to one that takes none. Any failure of any rank is raised as WorkerError
    and ends the epoch. Build it with `await EpochStreams.open(group)`."""

    def __init__(self, group: WorkerGroup, streams: list[Stream]) -> None:
        self._group = group
        self._streams = streams

    @classmethod
    async def open(cls, group: WorkerGroup) -> "EpochStreams":
        """All ranks at once: one whose link cannot be reached takes seconds to go over gRPC."""
        opening = [asyncio.create_task(group.open_run(rank)) for rank in range(len(group.addresses))]
        try:
            return cls(group, list(await asyncio.gather(*opening)))
        except BaseException:
            for task in opening:
                task.cancel()
            for stream in await asyncio.gather(*opening, return_exceptions=True):
                if not isinstance(stream, BaseException):
                    stream.close()
            raise

    def send(self, plan: bytes) -> None:
        """Writes the same bytes to every rank; does not block."""
        for stream in self._streams:
            stream.write(plan)

    async def receive(self) -> Reply:
        """The output rank's next result."""
        output_rank = self._group.output_rank
        return await self._read(output_rank, self._streams[output_rank])

    async def watch(self, rank: int) -> None:
        """Never returns; raises when a rank that speaks only when something is wrong has spoken or is gone."""
        reply = await self._read(rank, self._streams[rank])
        raise self._failure(rank, f"answered step {reply.result.step}, but only rank {self._group.output_rank} may")

    def close(self) -> None:
        for stream in self._streams:
            stream.close()

    async def _read(self, rank: int, stream: Stream) -> Reply:
        try:
            message = await stream.read()
        except grpc.aio.AioRpcError as error:
            raise self._group.error(rank, error) from None
        except LinkLostError as error:
            reason, was_silent = f"the process does not answer ({error})", isinstance(error, LinkSilentError)
            raise WorkerError(rank, self._group.addresses[rank], reason, was_silent=was_silent) from None
        try:
            reply = decode_reply(message)
        except (DecodeError, ValueError) as error:
            raise self._failure(rank, f"sent what is no result ({error})") from None
        if reply.error:
            raise self._failure(rank, reply.error)
        return reply

    def _failure(self, rank: int, reason: str) -> WorkerError:
        return WorkerError(rank, self._group.addresses[rank], reason)
