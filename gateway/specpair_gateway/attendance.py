"""Somebody waits for an answer, or does not any more."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import structlog
from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

__all__ = ["Disconnected", "EventStream", "while_connected"]


class Disconnected(Exception):  # noqa: N818 - nobody's fault
    """The client has gone before it had its answer."""


class _Stalled(Exception):  # noqa: N818
    """The client does not take what it asked for."""


@contextlib.asynccontextmanager
async def while_connected(receive: Receive) -> AsyncIterator[None]:
    """Cancels the body, once, when the client goes away, and raises Disconnected then.

    The request's body must have been read.
    """
    try:
        # A deadline that is set when the client goes: the body is cancelled as by a timeout, within its own task.
        async with asyncio.timeout(None) as deadline:
            watcher = asyncio.create_task(_watch(receive, deadline))
            try:
                yield
            finally:
                watcher.cancel()
    except TimeoutError:
        if deadline.expired():
            raise Disconnected from None
        raise


async def _watch(receive: Receive, deadline: asyncio.Timeout) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    deadline.reschedule(asyncio.get_running_loop().time())


class EventStream(StreamingResponse):
    """Server-sent events, each taken from the generator when the client has taken the one before it.

    The generator and its `source` are closed when it ends, when the client goes away, and when that takes nothing for
    `patience` seconds; None waits for ever. What the server and the system buffer counts as taken.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes], source: AsyncGenerator[Any], patience: float | None) -> None:
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._events = events
        self._source = source  # closing a generator that was never asked closes nothing behind it
        self._patience = patience

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_patiently(message: Message) -> None:
            try:
                async with asyncio.timeout(self._patience):
                    await send(message)
            except TimeoutError:
                raise _Stalled from None

        try:
            async with contextlib.aclosing(self._source), contextlib.aclosing(self._events), while_connected(receive):
                await self.stream_response(send_patiently)
        except Disconnected:
            structlog.contextvars.bind_contextvars(ended="the client has gone")
        except _Stalled:
            structlog.contextvars.bind_contextvars(ended="the client takes nothing")
