"""Reading a stream ahead of its answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from typing import TypeVar

__all__ = ["read_ahead"]

_Message = TypeVar("_Message")
_Answer = TypeVar("_Answer")


async def read_ahead(
    messages: AsyncIterator[_Message],
    submit: Callable[[_Message], Sequence[asyncio.Future[_Answer]] | None],
    limit: int,
) -> AsyncGenerator[tuple[_Message, Sequence[asyncio.Future[_Answer]] | None], None]:
    """Each message in order, with its answers to come; reads further while the answers before them are awaited.

    A message is handed to `submit` the moment it is read. At most `limit` messages are held that the consumer has not
    come back from; beyond that nothing is read, and the sender's flow control takes over. `submit` returns None for a
    message that has to wait for all answers before it: nothing behind that one is read before the consumer is done with
    it. What `submit` or the stream raises, is raised in its place, behind the messages before it. Close the generator:
    then the reading ends, and answers that nobody awaited are cancelled.
    """
    read: asyncio.Queue[tuple[_Message, Sequence[asyncio.Future[_Answer]] | None] | Exception | None] = asyncio.Queue()
    room = asyncio.Semaphore(limit)
    passed = asyncio.Event()

    async def reading() -> None:
        try:
            while True:
                await room.acquire()
                message = await anext(messages)
                answer = submit(message)
                read.put_nowait((message, answer))
                if answer is None:
                    await passed.wait()
                    passed.clear()
        except StopAsyncIteration:
            read.put_nowait(None)
        except Exception as error:
            read.put_nowait(error)

    reader = asyncio.create_task(reading())
    item = None
    try:
        while (item := await read.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item
            room.release()
            if item[1] is None:
                passed.set()
    finally:
        reader.cancel()
        await asyncio.wait([reader])
        left = [item, *(read.get_nowait() for _ in range(read.qsize()))]
        for answer in (answer for one in left if isinstance(one, tuple) for answer in one[1] or ()):
            if not answer.cancel() and not answer.cancelled():
                answer.exception()  # seen, so that asyncio does not report it as lost
