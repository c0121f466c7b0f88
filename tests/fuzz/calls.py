"""Calls with bytes in place of messages, and how they may end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grpc
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from specpair.errors import from_rpc_error

from ..e2e.processes import Service
from ..e2e.sessions import violations
from .schema import exists

# Seconds that stand for "does not hang".
_WITHIN = 30.0

# How a bad request may be answered besides INVALID_ARGUMENT: a message that must not come here; a value of the protocol
# that this server does not carry out; a message above the limit of 4 MiB, or no slot.
ANSWERS = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}
# Those of them that name a field.
_NAMED = ANSWERS - {grpc.StatusCode.RESOURCE_EXHAUSTED}


def answers(
    service: Service, service_name: str, method: str, messages: Sequence[bytes], response: type[Message]
) -> list[Any]:
    """All responses to a stream of these messages. Raises grpc.RpcError."""
    # On the wire a unary call is a stream of one message.
    call = service.channel.stream_stream(
        f"/specpair.v1.{service_name}/{method}", request_serializer=bytes, response_deserializer=response.FromString
    )
    return list(call(iter(messages), timeout=_WITHIN))


def outcome(
    service: Service,
    service_name: str,
    method: str,
    messages: Sequence[bytes],
    response: type[Message],
    request: Descriptor,
) -> grpc.StatusCode:
    """How a call ends, which must be in one of the documented ways.

    An error names a field that there is, or says that bytes are no message, if there are such.
    """
    try:
        answers(service, service_name, method, messages, response)
    except grpc.RpcError as failed:
        error = failed
    else:
        return grpc.StatusCode.OK
    code, field = violations(error)
    assert code in ANSWERS, f"{method}: {code}: {error.details()}"
    if from_rpc_error(error).reason == "MALFORMED_MESSAGE":
        assert not all(_decodes(data, request) for data in messages)
    elif code in _NAMED:
        assert exists(field, request), f"{method} names {field!r}: {error.details()}"
    return code


def _decodes(data: bytes, message: Descriptor) -> bool:
    try:
        GetMessageClass(message).FromString(data)
    except DecodeError:
        return False
    return True
