"""A session's way to a target: where it begins, and how it goes on after the target was lost.

A session is its committed tokens: whoever knows them can open it anew, at the same target or at one that runs the same,
and the tokens that follow are those that would have followed. What was on its way when the target was lost is computed
again. See docs/determinism.md for what that means in which format.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from specpair.backoff import Patience
from specpair.errors import SpecpairError, UnauthenticatedError, UnavailableError
from specpair.losses import TARGET_CHANGED, is_lost
from specpair.messages import Started
from specpair.replicas import Identity, Replica, Replicas
from specpair.transports import TargetTransport

__all__ = ["Way"]

_log = logging.getLogger("specpair")

# Seconds that one of several targets may take to open a session, if there are so many left.
_SILENCE = 5.0

T = TypeVar("T")


class Way:
    """The way of one session. `limit` is for how many seconds in a row a target may be away before that is an error; 0
    makes every loss one. `within` limits the whole session, from its beginning, to so many seconds.
    """

    def __init__(self, replicas: Replicas, limit: float, within: float | None = None) -> None:
        self._replicas = replicas
        self._patience = Patience(limit, replicas.timing)
        self._within = within
        self._end: float | None = None
        self._replica: Replica | None = None
        self._tried: Replica | None = None
        self._expected: Identity | None = None
        self._identity: Identity | None = None

    @property
    def left(self) -> float | None:
        """Seconds that the session may still take; None: it is not limited."""
        if self._within is None:
            return None
        now = self._replicas.timing.clock()
        self._end = now + self._within if self._end is None else self._end
        return max(self._end - now, 0.001)  # a call without any time would not be made

    async def begin(self, open: Callable[[TargetTransport], Awaitable[T]]) -> T:
        """Opens the session. Raises what the target raises."""
        return await self._replicas.first(lambda replica: self._at(replica, open))

    async def resume(self, lost: SpecpairError, request_id: str, open: Callable[[TargetTransport], Awaitable[T]]) -> T:
        """Opens the session again after it was lost: what `open` brings at the first target that can go on with it.
        `request_id` is what the log is to call it.

        Raises the failure itself if it is none to go on after, the last failure if no target was there in time, and
        UnavailableError with the reason TARGET_CHANGED if all that are there run something else.
        """
        error = lost
        several = self._replicas.several
        if is_lost(lost) and self._replica is not None:
            self._replicas.leave(self._replica)
        level, text = logging.WARNING, "target lost: %s; resuming"
        while is_lost(error):
            await self._patience.wait(error)
            _log.log(level, text, error, extra={"request_id": request_id})
            level, text = logging.INFO, "target not back: %s; trying again"
            left = self._patience.left
            try:
                # One that accepts calls and says nothing must not use up the time of the others.
                async with asyncio.timeout(max(left / 2, min(left, _SILENCE)) if several else left):
                    return await self.again(open)
            except TimeoutError:
                if not several:
                    break
                if self._tried is not None:
                    self._replicas.leave(self._tried)
                error = UnavailableError("the target did not open the session in time")
            except UnauthenticatedError as refused:
                if not several:
                    raise
                _log.warning("a target is passed over: %s", refused)
                error = UnavailableError(f"no target is left: {refused}")
            except SpecpairError as again:
                error = again
        raise error

    async def again(self, open: Callable[[TargetTransport], Awaitable[T]]) -> T:
        """Opens the session where it can go on now, without waiting. Raises what the target raises."""
        return await self._at(await self._replicas.matching(self._identity), open)

    def check(self, started: Started) -> None:
        """Raises UnavailableError if a target that has just opened the session is not the one that was asked what it
        runs: it was restarted as something else, or its address stands for several that differ.
        """
        if self._expected is not None and started.identity != self._expected.digest:
            raise UnavailableError("the target that opened the session runs something else than the one that was asked")

    def progress(self) -> None:
        """The target is there and works."""
        self._patience.progress()

    async def _at(self, replica: Replica, open: Callable[[TargetTransport], Awaitable[T]]) -> T:
        found = replica.identity
        if self._identity not in (None, found):
            raise UnavailableError(f"the target at {replica.address} was replaced by another", reason=TARGET_CHANGED)
        self._tried, self._expected = replica, found
        opened = await self._replicas.at(replica, lambda there: open(there.target))
        self._replica, self._identity = replica, found
        return opened
