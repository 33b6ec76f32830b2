"""The workers of one replica as the scheduler process reaches them."""

import asyncio

import grpc
import grpc.aio

from manta.cluster.links import NUM_SILENT
from manta.cluster.streams import LinkAddress, Stream, link_address, open_stream
from manta.protos import worker_pb2 as pb
from manta.protos import worker_pb2_grpc

CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.keepalive_time_ms", 1_000),
    ("grpc.keepalive_timeout_ms", 2_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.use_local_subchannel_pool", 1),  # ranks of different groups never share a connection
)
_PING_EVERY_S = 0.4  # a stopped worker is noticed within 2 s. Its threads answer while it computes
SILENT_S = (NUM_SILENT - 1) * _PING_EVERY_S  # so long, at least, is a worker silent that is taken for lost
_RUN = f"/{pb.DESCRIPTOR.services_by_name['Worker'].full_name}/Run"


class WorkerError(Exception):
    """A worker cannot go on; the message is one sentence with rank, address and reason."""

    def __init__(self, rank: int, address: str, reason: str, *, was_silent: bool = False) -> None:
        """was_silent: nothing at all was heard of it for seconds."""
        super().__init__(f"worker rank {rank} at {address}: {reason}")
        self.rank = rank
        self.reason = reason
        self.was_silent = was_silent


class WorkerGroup:
    """The workers of one replica in rank order (rank = pp_rank * tp_size + tp_rank); `output_rank` answers steps."""

    def __init__(self, addresses: list[str], output_rank: int) -> None:
        self.addresses = addresses
        self.output_rank = output_rank
        self._links: list[LinkAddress | None] = [None] * len(addresses)
        self._channels = [grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) for address in addresses]
        self.stubs = [worker_pb2_grpc.WorkerStub(channel) for channel in self._channels]

    def error(self, rank: int, error: grpc.aio.AioRpcError) -> WorkerError:
        """What a failed call means, in one sentence."""
        return WorkerError(rank, self.addresses[rank], describe_rpc_error(error))

    def note_links(self, described: list[pb.DescribeResponse]) -> None:
        """What the ranks said of where they take links."""
        self._links = [
            link_address(address, response.link_port, response.link_socket, response.link_key)
            for address, response in zip(self.addresses, described, strict=True)
        ]

    async def open_run(self, rank: int) -> Stream:
        """A stream that carries plans down and results up."""
        return await open_stream(self._links[rank], self._channels[rank], _RUN, _PING_EVERY_S)

    async def check(self, timeout_s: float) -> None:
        """Raises WorkerError for the first rank whose process does not answer in time."""
        await asyncio.gather(*(self._check_rank(rank, timeout_s) for rank in range(len(self.addresses))))

    async def _check_rank(self, rank: int, timeout_s: float) -> None:
        """Twice: where something between has dropped the connections, the first call finds that out, and the second one
        connects anew."""
        for is_last in (False, True):
            try:
                await self.stubs[rank].Describe(pb.DescribeRequest(), timeout=timeout_s)
                return
            except grpc.aio.AioRpcError as error:
                if is_last or error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise self.error(rank, error) from None

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close()


def describe_rpc_error(error: grpc.aio.AioRpcError) -> str:
    """One sentence for a person: a lost process, a deadline, or the first line of what the worker said."""
    details = (error.details() or "").strip()
    first_line = details.splitlines()[0] if details else ""
    match error.code():
        case grpc.StatusCode.UNAVAILABLE:
            return f"the process does not answer ({first_line.rsplit(': ', 1)[-1] or 'connection lost'})"
        case grpc.StatusCode.CANCELLED:  # by the other side: a server that ends
            return "the process does not answer (it has ended the call)"
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return "the process did not answer in time"
        case grpc.StatusCode.UNKNOWN:  # an exception in the worker; gRPC puts its own words before the message
            return first_line.removeprefix("Exception calling application: ") or "failed without a message"
        case code:
            return first_line or code.name
