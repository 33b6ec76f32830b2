"""What a client is told when a request fails: one error type, with its HTTP status and its gRPC code side by side."""

import enum
from dataclasses import dataclass

import grpc

from manta.cluster.engine.client import (
    DrainingError,
    EngineError,
    EngineLostError,
    InvalidRequestError,
    QueueFullError,
    UnavailableError,
)

RETRY_AFTER_S = 1.0


@dataclass(frozen=True, slots=True)
class Status:
    http: int
    type: str  # `error.type` in the HTTP body
    grpc: grpc.StatusCode


class Kind(enum.Enum):
    """The ways to fail, each with the status that either door answers."""

    # fmt: off
    INVALID = Status(400, "BadRequestError", grpc.StatusCode.INVALID_ARGUMENT)
    UNAUTHENTICATED = Status(401, "AuthenticationError", grpc.StatusCode.UNAUTHENTICATED)
    NOT_FOUND = Status(404, "NotFoundError", grpc.StatusCode.NOT_FOUND)
    WRONG_METHOD = Status(405, "MethodNotAllowedError", grpc.StatusCode.UNIMPLEMENTED)
    DUPLICATE = Status(409, "ConflictError", grpc.StatusCode.ALREADY_EXISTS)
    SLOW_SENDER = Status(408, "RequestTimeoutError", grpc.StatusCode.DEADLINE_EXCEEDED)
    TOO_LARGE = Status(413, "RequestTooLargeError", grpc.StatusCode.RESOURCE_EXHAUSTED)
    LARGE_HEAD = Status(431, "RequestTooLargeError", grpc.StatusCode.RESOURCE_EXHAUSTED)
    INTERNAL = Status(500, "InternalServerError", grpc.StatusCode.INTERNAL)
    STORAGE = Status(507, "InsufficientStorageError", grpc.StatusCode.RESOURCE_EXHAUSTED)
    OVERLOADED = Status(503, "ServiceUnavailableError", grpc.StatusCode.RESOURCE_EXHAUSTED)
    UNAVAILABLE = Status(503, "ServiceUnavailableError", grpc.StatusCode.UNAVAILABLE)
    # fmt: on


class RequestError(Exception):
    """One request fails with this; nothing else is harmed.

    `param` names the field at fault, `code` is a word for programs, `retry_after_s` is set where retrying can help.
    """

    def __init__(
        self,
        message: str,
        param: str | None = None,
        code: str = "invalid_value",
        kind: Kind = Kind.INVALID,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code
        self.kind = kind
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, dict[str, str | None]]:
        """The error body of the OpenAI API."""
        error = {"message": self.message, "type": self.kind.value.type, "param": self.param, "code": self.code}
        return {"error": error}


def from_engine(error: EngineError) -> RequestError:
    """The client's view of what the engine answered."""
    message = str(error)
    if isinstance(error, InvalidRequestError):
        return RequestError(message, code="invalid_request")
    if isinstance(error, QueueFullError):
        return RequestError(message, code="queue_full", kind=Kind.OVERLOADED, retry_after_s=error.retry_after_s)
    if isinstance(error, DrainingError):
        return draining(message)
    if isinstance(error, UnavailableError):
        code = "engine_unavailable"
        return RequestError(message, code=code, kind=Kind.UNAVAILABLE, retry_after_s=RETRY_AFTER_S)
    if isinstance(error, EngineLostError):
        return RequestError(message, code="engine_lost", kind=Kind.UNAVAILABLE, retry_after_s=RETRY_AFTER_S)
    return RequestError(message, code="internal_error", kind=Kind.INTERNAL)


def draining(message: str = "the server is shutting down and takes no new requests") -> RequestError:
    return RequestError(message, code="draining", kind=Kind.UNAVAILABLE, retry_after_s=RETRY_AFTER_S)


def internal(error: Exception) -> RequestError:
    """For what nobody foresaw: the log has the traceback, the client only the kind of error."""
    return RequestError(
        f"internal error ({type(error).__name__}); the server's log has the details",
        code="internal_error",
        kind=Kind.INTERNAL,
    )
