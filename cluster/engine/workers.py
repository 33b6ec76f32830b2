"""The workers of one replica as the scheduler process reaches them: a channel each, and one Run stream per epoch."""

import asyncio

import grpc
import grpc.aio

from manta.cluster.engine.codec import Reply, decode_reply
from manta.protos import worker_pb2 as pb
from manta.protos import worker_pb2_grpc

CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 10_000),  # a worker on a loaded CPU host may answer late
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.use_local_subchannel_pool", 1),  # ranks of different groups never share a connection
)
_RUN = f"/{pb.DESCRIPTOR.services_by_name['Worker'].full_name}/Run"


class WorkerError(Exception):
    """A worker cannot go on; the message is one sentence with rank, address and reason."""

    def __init__(self, rank: int, address: str, reason: str) -> None:
        super().__init__(f"worker rank {rank} at {address}: {reason}")
        self.rank = rank
        self.reason = reason


class WorkerGroup:
    """The workers of one replica in rank order (rank = pp_rank * tp_size + tp_rank); `output_rank` answers steps."""

    def __init__(self, addresses: list[str], output_rank: int) -> None:
        self.addresses = addresses
        self.output_rank = output_rank
        self._channels = [grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) for address in addresses]
        self.stubs = [worker_pb2_grpc.WorkerStub(channel) for channel in self._channels]

    def error(self, rank: int, error: grpc.aio.AioRpcError) -> WorkerError:
        """What a failed call means, in one sentence."""
        return WorkerError(rank, self.addresses[rank], describe_rpc_error(error))

    def open_epoch(self) -> "EpochStreams":
        """A Run stream to every rank, for one epoch."""
        calls = [channel.stream_stream(_RUN)() for channel in self._channels]
        return EpochStreams(self, calls)

    async def check(self, timeout_s: float) -> None:
        """Raises WorkerError for the first rank whose process does not answer in time."""
        await asyncio.gather(*(self._check_rank(rank, timeout_s) for rank in range(len(self.addresses))))

    async def _check_rank(self, rank: int, timeout_s: float) -> None:
        try:
            await self.stubs[rank].Describe(pb.DescribeRequest(), timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            raise self.error(rank, error) from None

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close()


class EpochStreams:
    """One open Run stream per rank. Any failure of any rank is raised as WorkerError and ends the epoch."""

    def __init__(self, group: WorkerGroup, calls: list["grpc.aio.StreamStreamCall[bytes, bytes]"]) -> None:
        self._group = group
        self._calls = calls
        self._output = calls[group.output_rank]

    async def send(self, plan: bytes) -> None:
        """Writes the same bytes to every rank."""
        if len(self._calls) == 1:
            await self._write(0, plan)
        else:
            await asyncio.gather(*(self._write(rank, plan) for rank in range(len(self._calls))))

    async def receive(self) -> Reply:
        """The output rank's next result."""
        return await self._read(self._group.output_rank)

    async def watch(self, rank: int) -> None:
        """Returns never; raises when a rank that only speaks on errors has spoken or is gone."""
        reply = await self._read(rank)
        raise self._failure(rank, f"answered step {reply.result.step}, but only rank {self._group.output_rank} may")

    def close(self) -> None:
        for call in self._calls:
            call.cancel()

    async def _write(self, rank: int, plan: bytes) -> None:
        try:
            await self._calls[rank].write(plan)
        except grpc.aio.AioRpcError as error:
            raise self._group.error(rank, error) from None
        except asyncio.InvalidStateError:  # the stream ended before this write: the reader knows the reason better
            await self._read(rank)
            raise self._failure(rank, "ended its stream") from None

    async def _read(self, rank: int) -> Reply:
        try:
            message = await self._calls[rank].read()
        except grpc.aio.AioRpcError as error:
            raise self._group.error(rank, error) from None
        if not isinstance(message, bytes):
            raise self._failure(rank, "ended its stream")
        reply = decode_reply(message)
        if reply.error:
            raise self._failure(rank, reply.error)
        return reply

    def _failure(self, rank: int, reason: str) -> WorkerError:
        return WorkerError(rank, self._group.addresses[rank], reason)


def describe_rpc_error(error: grpc.aio.AioRpcError) -> str:
    """One sentence for a person: a lost process, a deadline, or the first line of what the worker said."""
    details = (error.details() or "").strip()
    first_line = details.splitlines()[0] if details else ""
    match error.code():
        case grpc.StatusCode.UNAVAILABLE:
            return f"the process does not answer ({first_line.rsplit(': ', 1)[-1] or 'connection lost'})"
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return "the process did not answer in time"
        case grpc.StatusCode.UNKNOWN:  # an exception in the worker; gRPC puts its own words before the message
            return first_line.removeprefix("Exception calling application: ") or "failed without a message"
        case code:
            return first_line or code.name
