"""How a frontend talks to the engine: one gRPC stream for all its requests, plain calls for the rest."""

from collections.abc import AsyncIterator
from typing import Protocol

from manta.cluster.engine.types import (
    DrainingError,
    EngineError,
    EngineLostError,
    GenerationRequest,
    InvalidRequestError,
    QueueFullError,
    TokenChunk,
    UnavailableError,
    resolve_sampling,
)
from manta.protos import engine_pb2 as pb

__all__ = [
    "Client",
    "DrainingError",
    "EngineClient",
    "EngineError",
    "EngineLostError",
    "GenerationRequest",
    "InvalidRequestError",
    "QueueFullError",
    "TokenChunk",
    "UnavailableError",
    "resolve_sampling",
]


class Client(Protocol):
    """What frontends use; `EngineClient` reaches another process, `InProcessClient` an engine in this one."""

    def generate(self, request: GenerationRequest) -> AsyncIterator[TokenChunk]:
        """Yields chunks until one has a finish_reason. Closing the iterator early aborts the request.

        Raises InvalidRequestError, QueueFullError, DrainingError or UnavailableError before the first chunk when the
        engine does not take the request, EngineLostError when the connection breaks.
        """
        ...

    async def info(self) -> pb.InfoResponse: ...
    async def load(self) -> pb.LoadResponse: ...
    async def metrics(self) -> bytes: ...
    async def block_tables(self) -> pb.BlockTablesResponse: ...
    async def drain(self, timeout_s: float) -> bool: ...
    async def close(self) -> None: ...


class EngineClient:
    """A `Client` over one gRPC channel. Build it with `await EngineClient.connect(address)`."""

    @classmethod
    async def connect(cls, address: str, timeout_s: float = 30.0) -> "EngineClient":
        """Raises EngineLostError when no engine answers at `address` ("host:port") in time."""
        raise NotImplementedError

    def generate(self, request: GenerationRequest) -> AsyncIterator[TokenChunk]:
        raise NotImplementedError

    async def info(self) -> pb.InfoResponse:
        raise NotImplementedError

    async def load(self) -> pb.LoadResponse:
        raise NotImplementedError

    async def metrics(self) -> bytes:
        raise NotImplementedError

    async def block_tables(self) -> pb.BlockTablesResponse:
        raise NotImplementedError

    async def drain(self, timeout_s: float) -> bool:
        raise NotImplementedError

    async def close(self) -> None:
        raise NotImplementedError
