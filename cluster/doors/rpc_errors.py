"""Errors as gRPC tells them: a status code, a sentence, and what programs need of it in the trailing metadata."""

import functools
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, NoReturn, TypeVar

from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from manta.cluster.doors.errors import Kind, RequestError, from_engine, internal
from manta.cluster.doors.rpc_writer import RpcWriter, SlowReaderError, end_slow_call
from manta.cluster.engine.client import EngineError

DOMAIN = "manta"
# The sentence comes three times, twice of them in base64: with it all metadata stays below the 8 KiB that clients take.
MAX_MESSAGE_BYTES = 1500
_MAX_PARAM_CHARACTERS = 200

logger = logging.getLogger("manta.doors")
Context = Any  # grpc.aio.ServicerContext, which is generic in a way that says nothing here
Answer = TypeVar("Answer")


async def fail(context: Context, error: RequestError | EngineError) -> NoReturn:
    """Ends the call. Trailing metadata: `error-param`, `error-code`, `retry-after` in seconds, and all of it as a
    google.rpc.Status in `grpc-status-details-bin`."""
    if isinstance(error, EngineError):
        error = from_engine(error)
    message, param = _cut(error.message), _ascii(error.param or "")
    metadata: list[tuple[str, str | bytes]] = [("error-code", error.code)]
    if param:
        metadata.append(("error-param", param))
    if error.retry_after_s is not None:
        metadata.append(("retry-after", str(max(1, round(error.retry_after_s)))))
    metadata.append(("grpc-status-details-bin", _status(error, message, param).SerializeToString()))
    await context.abort(error.kind.value.grpc, message, tuple(metadata))
    raise AssertionError("abort raises")


def _status(error: RequestError, message: str, param: str) -> status_pb2.Status:
    details: list[Message] = [error_details_pb2.ErrorInfo(reason=error.code.upper(), domain=DOMAIN)]
    if param and error.kind is Kind.INVALID:
        violation = error_details_pb2.BadRequest.FieldViolation(field=param, description=message)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_after_s is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(round(error.retry_after_s * 1e9))
        details.append(retry)
    status = status_pb2.Status(code=error.kind.value.grpc.value[0], message=message)
    for detail in details:
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def _cut(message: str) -> str:
    """At most MAX_MESSAGE_BYTES as gRPC writes them: %XX for each byte that is no printable ASCII."""
    num_bytes = 0
    for index, character in enumerate(message):
        is_plain = " " <= character <= "~" and character != "%"
        num_bytes += 1 if is_plain else 3 * len(character.encode(errors="replace"))
        if num_bytes > MAX_MESSAGE_BYTES:
            return message[:index] + "..."
    return message


def _ascii(param: str) -> str:
    """What metadata can hold of a field's name, which may have parts that the client chose."""
    plain = "".join(character if " " < character <= "~" else "?" for character in param)
    return plain[:_MAX_PARAM_CHARACTERS]


def answered(method: Callable[[Any, Any], Awaitable[Answer]]) -> Callable[[Any, Any, Context], Awaitable[Answer]]:
    """Turns the errors of a unary call into its status."""

    @functools.wraps(method)
    async def run(self: Any, request: Any, context: Context) -> Answer:
        try:
            if isinstance(request, RequestError):
                raise request
            return await method(self, request)
        except (RequestError, EngineError) as error:
            await fail(context, error)
        except Exception as error:
            logger.exception("%s failed", method.__name__)
            await fail(context, internal(error))

    return run


def streamed(
    method: Callable[[Any, Any], AsyncGenerator[Any, None]],
) -> Callable[[Any, Any, Context], Awaitable[None]]:
    """Writes what the method yields, as fast as its reader takes it, and turns errors into the status of the call."""

    @functools.wraps(method)
    async def run(self: Any, request: Any, context: Context) -> None:
        try:
            if isinstance(request, RequestError):
                raise request
            async with aclosing(method(self, request)) as responses:
                with RpcWriter(context) as writer:
                    async for response in responses:
                        await writer.write(response)
        except SlowReaderError:
            await end_slow_call(context)
        except (RequestError, EngineError) as error:
            await fail(context, error)
        except Exception as error:
            logger.exception("%s failed", method.__name__)
            await fail(context, internal(error))

    return run
