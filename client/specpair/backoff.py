"""How long to wait before another try, and when to give up."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass

from specpair.clock import loop_time
from specpair.errors import SpecpairError

__all__ = ["Patience", "Timing", "delays"]

# gRPC's connection backoff has the same factor and jitter. It begins with a second and ends with two minutes; here
# somebody waits for the next token.
_FIRST = 0.1
_MOST = 2.0
_FACTOR = 1.6
_JITTER = 0.2


@dataclass(frozen=True, slots=True)
class Timing:
    """Where time and chance come from."""

    clock: Callable[[], float] = loop_time
    """Seconds from anywhere."""
    sleep: Callable[[float], Awaitable[object]] = asyncio.sleep
    chance: Callable[[], float] = random.random
    """A number from [0, 1)."""


def delays(chance: Callable[[], float]) -> Iterator[float]:
    """Seconds between tries, without end: each about 1.6 times as long as the one before, up to about two.

    The jitter of a fifth keeps the clients of a lost service from coming back at the same moment.
    """
    delay = _FIRST
    while True:
        yield delay * (1.0 + _JITTER * (2.0 * chance() - 1.0))
        delay = min(delay * _FACTOR, _MOST)


class Patience:
    """Waits between tries for at most `limit` seconds in a row without progress; 0: there is no second try.

    It begins with the first failure, or, if the time is `running`, at once. The first try after progress is made
    without a wait; every other one waits as long as `delays` or the failure says, whichever is longer.
    """

    def __init__(self, limit: float, timing: Timing | None = None, *, running: bool = False) -> None:
        self._limit = limit
        self._timing = timing or Timing()
        self._delays = delays(self._timing.chance)
        self._since = self._timing.clock() if running else None

    @property
    def left(self) -> float:
        """Seconds until it is at its end."""
        return self._limit if self._since is None else max(self._since + self._limit - self._timing.clock(), 0.0)

    def progress(self) -> None:
        """There was progress: what comes is counted anew."""
        if self._since is not None:
            self._since, self._delays = None, delays(self._timing.chance)

    async def wait(self, error: SpecpairError) -> None:
        """Waits before the next try. Raises `error` if there is none within the time, or if it says to let it be."""
        delay = 0.0
        if self._since is None:
            self._since = self._timing.clock()
        else:
            delay = next(self._delays)
        if error.retry_after is not None:
            delay = max(delay, error.retry_after)
        if delay >= self.left:
            raise error
        await self._timing.sleep(delay)
