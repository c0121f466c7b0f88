"""Everything that specpair raises, and the gRPC status of each.

    SpecpairError
    ├── InvalidRequestError      the request names a value that cannot be used (`field` says which)
    │   └── UnsupportedError     a value of the protocol that this server does not carry out
    ├── DraftMismatchError       draft and target do not speak the same vocabulary
    ├── ModelLoadError           a model cannot be loaded as configured
    ├── OverloadedError          no KV slot became free in time
    ├── UnavailableError         the service cannot be reached, is loading, or stops
    ├── DeadlineError            the caller's time ran out
    ├── CancelledError           the other side cancelled the call
    ├── UnauthenticatedError     no or a wrong token or certificate
    ├── ProtocolError            a peer broke the protocol
    └── InternalError            the service failed; details are in its log

The server's interceptor turns an exception into a google.rpc.Status with `to_status`; the client turns the failed call
back into the same exception with `from_rpc_error`. Both read one table.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable
from math import inf, isfinite
from typing import cast

import grpc
from google.protobuf.any_pb2 import Any
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

__all__ = [
    "PUSHBACK",
    "REQUEST_ID",
    "SESSION_EXPIRED",
    "CancelledError",
    "DeadlineError",
    "DraftMismatchError",
    "InternalError",
    "InvalidRequestError",
    "ModelLoadError",
    "OverloadedError",
    "ProtocolError",
    "SpecpairError",
    "UnauthenticatedError",
    "UnavailableError",
    "UnsupportedError",
    "from_rpc_error",
    "status_of",
    "to_status",
]


class SpecpairError(Exception):
    """Base of all errors of this package.

    `field` is the path of the offending field from the request message or the configuration, "" when there is none.
    `reason` is a stable word in capitals for programs, "" when the class says it all. `retry_after` is after how many
    seconds another try makes sense, None when that is not known, infinity when none does. `request_id` is the id under
    which logs have the failed call or generation; "" when a call by itself failed by something on the way.
    """

    def __init__(
        self,
        message: str,
        *,
        field: str = "",
        reason: str = "",
        retry_after: float | None = None,
        request_id: str = "",
    ) -> None:
        super().__init__(f"{field}: {message}" if field else message)
        self.message = message
        self.field = field
        self.reason = reason
        self.retry_after = retry_after
        self.request_id = request_id


class InvalidRequestError(SpecpairError):
    """A request names a value that cannot be used."""


class UnsupportedError(InvalidRequestError):
    """A request asks for something that the protocol knows and this server does not carry out."""


class DraftMismatchError(SpecpairError):
    """Draft and target do not speak the same vocabulary."""


class ModelLoadError(SpecpairError):
    """A model cannot be loaded as configured."""


class OverloadedError(SpecpairError):
    """No KV slot became free in time."""


class UnavailableError(SpecpairError):
    """The service cannot be reached, is loading, or stops."""


class DeadlineError(SpecpairError):
    """The caller's time ran out."""


class CancelledError(SpecpairError):
    """The other side cancelled the call."""


class UnauthenticatedError(SpecpairError):
    """No credentials, or wrong ones."""


class ProtocolError(SpecpairError):
    """A peer broke the protocol."""


class InternalError(SpecpairError):
    """The service failed."""


_STATUS: dict[type[SpecpairError], grpc.StatusCode] = {
    InvalidRequestError: grpc.StatusCode.INVALID_ARGUMENT,
    UnsupportedError: grpc.StatusCode.UNIMPLEMENTED,
    DraftMismatchError: grpc.StatusCode.FAILED_PRECONDITION,
    ModelLoadError: grpc.StatusCode.NOT_FOUND,
    OverloadedError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    UnavailableError: grpc.StatusCode.UNAVAILABLE,
    DeadlineError: grpc.StatusCode.DEADLINE_EXCEEDED,
    CancelledError: grpc.StatusCode.CANCELLED,
    UnauthenticatedError: grpc.StatusCode.UNAUTHENTICATED,
    ProtocolError: grpc.StatusCode.ABORTED,
    InternalError: grpc.StatusCode.INTERNAL,
}
_DOMAIN = "specpair"
# Trailing metadata: under which id the service's log has a call, and when its client may try again.
REQUEST_ID = "x-request-id"
PUSHBACK = "grpc-retry-pushback-ms"
# Reason of an UnavailableError: the service has ended a stream on which nothing was said for too long.
SESSION_EXPIRED = "SESSION_EXPIRED"
_ERROR: dict[grpc.StatusCode, type[SpecpairError]] = {status: error for error, status in _STATUS.items()}


def status_of(error: SpecpairError) -> grpc.StatusCode:
    """The gRPC status that stands for an exception."""
    return next(_STATUS[kind] for kind in type(error).__mro__ if kind in _STATUS)


def to_status(error: SpecpairError) -> status_pb2.Status:
    """The google.rpc.Status of an exception: its field, reason and time to retry as details."""
    status = status_pb2.Status(code=status_of(error).value[0], message=str(error))
    if error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=error.message)
        _pack(status, error_details_pb2.BadRequest(field_violations=[violation]))
    if error.reason:
        _pack(status, error_details_pb2.ErrorInfo(reason=error.reason, domain=_DOMAIN))
    if error.retry_after is not None and isfinite(error.retry_after):
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(round(error.retry_after * 1000))
        _pack(status, retry)
    return status


def from_rpc_error(failed: grpc.RpcError) -> SpecpairError:
    """The exception that a failed call stands for; InternalError with the status as its reason for one outside the
    table."""
    # An RpcError that a call raised is the call itself, sync and aio alike; grpc's types do not say so.
    code: grpc.StatusCode = failed.code()
    message: str = failed.details() or code.name
    field = ""
    reason = "" if code in _ERROR else code.name
    metadata = cast("Iterable[tuple[str, str | bytes]]", failed.trailing_metadata() or ())
    trailing = {key: value for key, value in metadata if isinstance(value, str)}
    retry_after = _pushback(trailing.get(PUSHBACK))
    # Details that contradict the call's own status, or that are no message, say nothing: code and message stand.
    with contextlib.suppress(ValueError, DecodeError):
        status = rpc_status.from_call(failed)
        for detail in status.details if status is not None else ():
            bad_request, info = error_details_pb2.BadRequest(), error_details_pb2.ErrorInfo()
            retry = error_details_pb2.RetryInfo()
            if detail.Unpack(bad_request) and bad_request.field_violations:
                field = bad_request.field_violations[0].field
                message = bad_request.field_violations[0].description
            elif detail.Unpack(info):
                reason = info.reason
            elif detail.Unpack(retry) and retry_after is None:
                retry_after = retry.retry_delay.ToMilliseconds() / 1000
    return _ERROR.get(code, InternalError)(
        message, field=field, reason=reason, retry_after=retry_after, request_id=trailing.get(REQUEST_ID, "")
    )


def _pushback(milliseconds: str | None) -> float | None:
    """Seconds until another try makes sense, as gRPC reads it: none does if the number is negative, or is none."""
    if milliseconds is None:
        return None
    return int(milliseconds) / 1000 if re.fullmatch(r"\d{1,9}", milliseconds, re.ASCII) else inf


def _pack(status: status_pb2.Status, detail: Message) -> None:
    packed = Any()
    packed.Pack(detail)
    status.details.append(packed)
