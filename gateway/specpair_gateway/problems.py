"""What goes wrong, in OpenAI's form: one table from exceptions to statuses, one way to write them down."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from starlette.responses import Response

from specpair import (
    DeadlineError,
    InvalidRequestError,
    OverloadedError,
    SpecpairError,
    UnavailableError,
)

__all__ = [
    "INVALID_API_KEY",
    "MODEL_NOT_FOUND",
    "Problem",
    "describe_http",
    "describe_validation",
    "internal",
    "problem",
]

# Reasons of errors that the gateway raises itself.
INVALID_API_KEY = "INVALID_API_KEY"
MODEL_NOT_FOUND = "MODEL_NOT_FOUND"

_INVALID = "invalid_request_error"
_BY_REASON: dict[str, tuple[int, str]] = {
    INVALID_API_KEY: (401, _INVALID),
    MODEL_NOT_FOUND: (404, _INVALID),
}
# A service that does not know the gateway's own credentials is no fault of the caller: 500, as everything else.
_BY_KIND: dict[type[SpecpairError], tuple[int, str]] = {
    InvalidRequestError: (400, _INVALID),
    OverloadedError: (429, "rate_limit_error"),
    UnavailableError: (503, "service_unavailable_error"),
    DeadlineError: (504, "timeout_error"),
}
_RETRIED = (429, 503)
# Seconds, where nobody said how many.
_RETRY_AFTER = 1.0

# Where a path of the protocol is called otherwise in a request; the rest of the path stays. "{prompt}" and the like
# depend on the request.
_PATHS = (
    (re.compile(r"^prompt\.chat\.messages\b"), "messages"),
    (re.compile(r"^prompt\.(chat|text|token_ids)(\.ids)?"), "{prompt}"),
    (re.compile(r"^prompt\b"), "{prompt}"),
    (re.compile(r"^sampling\.max_new_tokens"), "{max_tokens}"),
    (re.compile(r"^sampling\.min_new_tokens"), "min_tokens"),
    (re.compile(r"^sampling\."), ""),
    (re.compile(r"^stop\.stop_strings"), "stop"),
    (re.compile(r"^stop\."), ""),
    (re.compile(r"^logprobs\.top_n"), "{logprobs}"),
)


@dataclass(frozen=True)
class Problem:
    """An error as a caller of the API reads it."""

    status: int
    message: str
    type: str
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def body(self) -> dict[str, Any]:
        """The JSON object of the error."""
        said = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": said}

    @property
    def response(self) -> Response:
        """The whole answer to a request."""
        # In ASCII: a request may name fields that no encoding has characters for.
        return Response(json.dumps(self.body), self.status, dict(self.headers), "application/json")


def problem(error: SpecpairError, request_id: str, names: Mapping[str, str] | None = None) -> Problem:
    """What a caller learns of an exception: everything of those that are about the request, its time or the load, and
    of others where to look.

    `names` says what the request calls its "prompt", its "max_tokens" and its "logprobs"; None: the error's field is
    one of the request already.
    """
    found = _BY_REASON.get(error.reason) or next(
        (_BY_KIND[kind] for kind in type(error).__mro__ if kind in _BY_KIND), None
    )
    if found is None:
        return internal(request_id)
    status, kind = found
    headers = {"WWW-Authenticate": "Bearer"} if status == HTTPStatus.UNAUTHORIZED else {}
    if status in _RETRIED:
        headers |= _retry(error.retry_after)
    code = error.reason.lower() or None
    if status == HTTPStatus.SERVICE_UNAVAILABLE:  # its text names addresses
        return Problem(status, f"the model is not available; {_in_log(request_id)}", kind, None, code, headers)
    param = _param(error.field, names)
    # In the message too: many clients show nothing else.
    return Problem(status, f"{param}: {error.message}" if param else error.message, kind, param, code, headers)


def internal(request_id: str) -> Problem:
    """A failure that is none of the caller's business."""
    return Problem(500, f"internal error; {_in_log(request_id)}", "server_error")


def describe_http(status: int, detail: str, headers: Mapping[str, str] | None = None) -> Problem:
    """A request that did not get as far as an endpoint."""
    return Problem(
        status,
        detail,
        _INVALID if status < HTTPStatus.INTERNAL_SERVER_ERROR else "server_error",
        None,
        None,
        headers or {},
    )


def describe_validation(errors: Sequence[Any]) -> InvalidRequestError:
    """The first of pydantic's complaints about a request."""
    first = errors[0]
    # Behind "body" stands the path of the field, or where in the text JSON ends to be any.
    place = [part for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        return InvalidRequestError(f"the body is not JSON: {first['ctx']['error']} at {place[0]}")
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).removeprefix(".")
    if not path:  # a body that is not said to be JSON is not read as such
        return InvalidRequestError("the body has to be a JSON object, sent with Content-Type: application/json")
    message = "is required" if first["type"] == "missing" else first["msg"].removeprefix("Value error, ")
    return InvalidRequestError(message, field=path)


def _in_log(request_id: str) -> str:
    return f"the log has it as request {request_id}"


def _param(field: str, names: Mapping[str, str] | None) -> str | None:
    if names is None:
        return field or None
    path = field.removeprefix("start.")
    for pattern, name in _PATHS:
        if pattern.match(path):
            path = pattern.sub(name, path, count=1)
            break
    for name, called in names.items():
        path = path.replace(f"{{{name}}}", called)
    return path or None


def _retry(seconds: float | None) -> dict[str, str]:
    """Headers that say when to come back; none if that makes no sense."""
    seconds = _RETRY_AFTER if seconds is None else seconds
    if not math.isfinite(seconds):
        return {}
    return {"Retry-After": str(max(math.ceil(seconds), 1)), "Retry-After-Ms": str(max(round(seconds * 1000), 0))}
