"""Around every request: an id, who asks, one log line at the end, and an answer whatever happens."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from urllib.parse import quote

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from specpair import SpecpairError, UnauthenticatedError
from specpair.request_ids import request_id_of
from specpair_gateway.metrics import RequestMetrics
from specpair_gateway.problems import INVALID_API_KEY, internal, problem
from specpair_runtime.serving.auth import Token, owner
from specpair_runtime.serving.tracing import Tracing

__all__ = ["HEALTH", "Calls", "current_request_id"]

HEALTH = "/health"

_REQUEST_ID = "x-request-id"
# A caller's path goes into logs: no more of it than this.
_SHOWN_PATH = 256


def current_request_id() -> str:
    """The id of the request that is being answered."""
    found: str = structlog.contextvars.get_contextvars().get("request_id", "")
    return found


class Calls:
    """Wraps an application.

    - The id of a request comes from its header `x-request-id` or is made up; it stands on every log line, is passed on
      to the services and goes back in the answer.
    - A body of more than `max_body` bytes is read no further, and the request answered with 413.
    - With `keys` a request needs one of them as `Authorization: Bearer KEY`; health is open.
    - One line per request is logged at its end: counts, durations and names, never a text.
    - With `tracing` a request is a span, joined to the caller's trace; health is not.
    - An exception that nothing else has answered is logged, and answered with 500.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        max_body: int,
        keys: Callable[[], Sequence[Token]] | None = None,
        metrics: RequestMetrics | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        self._app = app
        self._metrics = metrics or RequestMetrics()
        self._max_body = max_body
        self._keys = keys
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = request_id_of(headers.get(_REQUEST_ID))
        path: str = scope["path"]
        # A server runs every request in a task of its own, so what one leaves here is seen by no other.
        structlog.contextvars.clear_contextvars()
        shown = quote(path)[:_SHOWN_PATH]
        structlog.contextvars.bind_contextvars(request_id=request_id, method=scope["method"], path=shown)
        log = structlog.stdlib.get_logger("specpair.http")
        span = None
        if self._tracing is not None and path != HEALTH:
            attributes = {"http.request.method": scope["method"], "specpair.request_id": request_id}
            span = self._tracing.call(scope["method"], headers.items(), attributes)
            structlog.contextvars.bind_contextvars(trace_id=span.trace_id)
        started = time.perf_counter()
        status = 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[_REQUEST_ID] = request_id
            await send(message)

        try:
            self._authorize(headers, path)
            await self._app(scope, self._limited(receive), answer)
        except SpecpairError as error:
            await problem(error, request_id).response(scope, receive, answer)
        except Exception:
            log.exception("unexpected error")
            if not status:
                await internal(request_id).response(scope, receive, answer)
        finally:
            seconds = round(time.perf_counter() - started, 6)
            self._metrics.ended(path, status, seconds)
            write = log.debug if path == HEALTH else log.info
            write("request", status=status or None, seconds=seconds)
            if span is not None:
                span.end({"http.response.status_code": status}, str(status) if status >= 500 else "")

    def _limited(self, receive: Receive) -> Receive:
        length = 0

        async def receive_some() -> Message:
            nonlocal length
            message = await receive()
            length += len(message.get("body", b""))
            if length > self._max_body:
                raise HTTPException(413, f"the body is longer than {self._max_body} bytes")
            return message

        return receive_some

    def _authorize(self, headers: Headers, path: str) -> None:
        if self._keys is None or path == HEALTH:
            return
        name = owner(headers.get("authorization", ""), self._keys())
        if name is None:
            raise UnauthenticatedError("a valid API key is required", reason=INVALID_API_KEY)
        structlog.contextvars.bind_contextvars(caller=name)
