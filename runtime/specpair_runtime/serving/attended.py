"""Streams that a client has left open and forgotten: they end, so that what they hold is free again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Generic, Self, TypeVar

from specpair.errors import SESSION_EXPIRED, UnavailableError

__all__ = ["Attended", "expired"]

_Message = TypeVar("_Message")

# Seconds for a stream's first message, before which it holds nothing but a call.
_FIRST_WITHIN = 30.0


def expired(message: str) -> UnavailableError:
    """What a forgotten stream ends with. A client that comes back opens another one and goes on there."""
    return UnavailableError(message, reason=SESSION_EXPIRED)


class Attended(Generic[_Message]):
    """A stream's messages, as long as the client says something when it is its turn.

    It is the client's turn before the first message, and when all messages that were read are `answered`. While the
    service owes an answer no time counts, however long that takes. Raises UnavailableError with the reason
    SESSION_EXPIRED in place of a message that does not come.
    """

    def __init__(self, messages: AsyncIterator[_Message], limit: float) -> None:
        """`limit` is in seconds, 0 for none."""
        self._messages = messages
        self._limit = limit or None
        self._read = self._answered = 0
        self._timer: asyncio.Timeout | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> _Message:
        patience = self._patience
        try:
            async with asyncio.timeout(patience) as self._timer:
                message = await anext(self._messages)
        except TimeoutError:
            raise expired("the client has been silent for too long") from None
        finally:
            self._timer = None
        self._read += 1
        return message

    def answered(self, count: int) -> None:
        """The first `count` messages have been answered."""
        self._answered = count
        patience = self._patience
        if self._timer is not None and patience is not None and not self._timer.expired():
            self._timer.reschedule(asyncio.get_running_loop().time() + patience)

    @property
    def _patience(self) -> float | None:
        """Seconds for which the next message may be waited for, from now on."""
        if self._answered < self._read or self._limit is None:
            return None
        return self._limit if self._read else min(self._limit, _FIRST_WITHIN)
