"""Reading the messages of clients: what is no message, or has fields that nobody here knows, is an error with a name.

gRPC itself answers the former with UNKNOWN and a traceback in the log, and protobuf drops the latter: a constraint that
a client with newer protos sets would be ignored in silence.
"""

from collections.abc import Callable
from typing import Any

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from google.protobuf.unknown_fields import UnknownFieldSet

from manta.cluster.doors.errors import RequestError


def add_service(server: Any, service: ServiceDescriptor, servicer: Any) -> None:
    """As the generated `add_..._to_server`, for methods with one request, which get a RequestError instead of it where
    it cannot be read: `answered` and `streamed` tell the client."""
    handlers = {}
    for method in service.methods:
        make = grpc.unary_stream_rpc_method_handler if method.server_streaming else grpc.unary_unary_rpc_method_handler
        handlers[method.name] = make(
            getattr(servicer, method.name),
            request_deserializer=reader(GetMessageClass(method.input_type)),
            response_serializer=GetMessageClass(method.output_type).SerializeToString,
        )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service.full_name, handlers),))


def reader(kind: type[Message]) -> Callable[[bytes], Any]:
    """Gives a message of the kind, or a RequestError that says why it is none."""

    def read(data: bytes) -> Message | RequestError:
        try:
            message = kind.FromString(data)
        except DecodeError:
            text = f"this is no {kind.DESCRIPTOR.name}, or has texts that are no UTF-8"
            return RequestError(text, code="invalid_message")
        size = message.ByteSize()
        message.DiscardUnknownFields()
        if message.ByteSize() == size:  # most messages are not walked through, which takes a microsecond for each part
            return message
        return _unknown(kind.FromString(data), "") or message

    return read


def _unknown(message: Message, where: str) -> RequestError | None:
    unknown = UnknownFieldSet(message)
    if len(unknown):
        number = unknown[0].field_number
        text = f"field {number} of {message.DESCRIPTOR.name} is unknown to this server; are the client's protos newer?"
        return RequestError(text, f"{where}{number}", "unknown_parameter")
    for field, value in message.ListFields():
        kind = field.message_type
        if kind is None or kind.GetOptions().map_entry:
            continue
        parts = [(field.name, value)]
        if not isinstance(value, Message):
            parts = [(f"{field.name}[{index}]", each) for index, each in enumerate(value)]
        for place, each in parts:
            error = _unknown(each, f"{where}{place}.")
            if error is not None:
                return error
    return None
