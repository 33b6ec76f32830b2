"""One epoch of a replica: a stream of plans to every rank, results from one of them, errors from any."""

import grpc.aio

from manta.cluster.engine.codec import Reply, decode_reply
from manta.cluster.engine.workers import WorkerError, WorkerGroup
from manta.cluster.links import LinkLostError
from manta.cluster.streams import Stream


class EpochStreams:
    """A link to every rank, or a Run stream to one that takes none. Any failure of any rank is raised as WorkerError
    and ends the epoch. Build it with `await EpochStreams.open(group)`."""

    def __init__(self, group: WorkerGroup, streams: list[Stream]) -> None:
        self._group = group
        self._streams = streams

    @classmethod
    async def open(cls, group: WorkerGroup) -> "EpochStreams":
        opened: list[Stream] = []
        try:
            for rank in range(len(group.addresses)):
                stream = await group.open_run(rank)
                opened.append(stream)
        except BaseException:
            for stream in opened:
                stream.close()
            raise
        return cls(group, opened)

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
            raise self._failure(rank, f"the process does not answer ({error})") from None
        reply = decode_reply(message)
        if reply.error:
            raise self._failure(rank, reply.error)
        return reply

    def _failure(self, rank: int, reason: str) -> WorkerError:
        return WorkerError(rank, self._group.addresses[rank], reason)
