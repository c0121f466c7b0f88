"""Around every request: an id, who asks, one log line at the end, and an answer whatever happens."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Callable, Sequence
from urllib.parse import quote

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from specpair import SpecpairError, UnauthenticatedError
from specpair_gateway.problems import INVALID_API_KEY, internal, problem
from specpair_runtime.serving.auth import Token, owner

__all__ = ["HEALTH", "Calls", "current_request_id"]

HEALTH = "/health"

_REQUEST_ID = "x-request-id"
# A caller's id and path go into logs: no more than this is taken over.
_SHOWN_PATH = 256
_ACCEPTED_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}", re.ASCII)


def current_request_id() -> str:
    """The id of the request that is being answered."""
    found: str = structlog.contextvars.get_contextvars().get("request_id", "")
    return found


class Calls:
    """Wraps an application.

    - The id of a request comes from its header `x-request-id` or is made up; it stands on every log line and goes back
      in the answer.
    - A body of more than `max_body` bytes is read no further, and the request answered with 413.
    - With `keys` a request needs one of them as `Authorization: Bearer KEY`; health is open.
    - One line per request is logged at its end: counts, durations and names, never a text.
    - An exception that nothing else has answered is logged, and answered with 500.
    """

    def __init__(self, app: ASGIApp, *, max_body: int, keys: Callable[[], Sequence[Token]] | None = None) -> None:
        self._app = app
        self._max_body = max_body
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get(_REQUEST_ID, "")
        request_id = given if _ACCEPTED_ID.fullmatch(given) else uuid.uuid4().hex
        path: str = scope["path"]
        # A server runs every request in a task of its own, so what one leaves here is seen by no other.
        structlog.contextvars.clear_contextvars()
        shown = quote(path)[:_SHOWN_PATH]
        structlog.contextvars.bind_contextvars(request_id=request_id, method=scope["method"], path=shown)
        log = structlog.stdlib.get_logger("specpair.http")
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
            write = log.debug if path == HEALTH else log.info
            write("request", status=status or None, seconds=round(time.perf_counter() - started, 6))

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
