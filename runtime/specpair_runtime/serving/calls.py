"""The calls under way: from the drain on new ones are refused, and in the end those that are left are ended."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from specpair.errors import UnavailableError

__all__ = ["Calls"]


class Calls:
    """Counts a server's calls. To be used on the event loop only."""

    def __init__(self) -> None:
        self._running: set[asyncio.Timeout] = set()
        self._none = asyncio.Event()
        self._none.set()
        self._refusal: UnavailableError | None = None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Around a handler. Raises the refusal when `end` is called meanwhile: what the handler awaits is cancelled."""
        ending = asyncio.timeout(None)
        try:
            async with ending:
                self._running.add(ending)
                self._none.clear()
                try:
                    yield
                finally:
                    self._running.discard(ending)
                    if not self._running:
                        self._none.set()
        except TimeoutError:
            if ending.expired() and self._refusal is not None:
                raise self._refusal from None
            raise

    @property
    def count(self) -> int:
        """Calls under way."""
        return len(self._running)

    @property
    def refusal(self) -> UnavailableError | None:
        """What a new call gets; None as long as calls are taken."""
        return self._refusal

    def refuse(self, message: str, reason: str) -> None:
        """From now on no call is taken."""
        self._refusal = UnavailableError(message, reason=reason)

    async def ended(self, within: float) -> None:
        """Waits until no call is left, at most `within` seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(within):
                await self._none.wait()

    def end(self) -> None:
        """Ends the calls that run, with the refusal: to be called after `refuse`."""
        now = asyncio.get_running_loop().time()
        for ending in self._running:
            ending.reschedule(now)
